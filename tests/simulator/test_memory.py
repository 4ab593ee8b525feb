"""What a run needs of memory does not depend on how long its trace is."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

_COMMAND = """
import sys
from pathlib import Path
from cluster.cli import app
app(["simulate", sys.argv[1], "--gpus", "2"], standalone_mode=False)
# Not getrusage's, which begins with what the parent had.
status = Path("/proc/self/status").read_text().splitlines()
print(next(line.split()[1] for line in status if line.startswith("VmHWM:")))
"""
ROOT = Path(__file__).parents[2]


def peak_kib(directory: Path, requests: int) -> int:
    """Of a process that simulates so many requests of 16 conversations."""
    path = directory / f"{requests}.jsonl"
    with path.open("w") as file:
        for number in range(requests):
            line = {
                "timestamp": 60 * number,
                "input_length": 1500,
                "output_length": 100,
                "hash_ids": [number % 16, 100 + number % 16, 1000 + number],
            }
            file.write(json.dumps(line) + "\n")
    command = [sys.executable, "-c", _COMMAND, str(path)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert f"{requests:,} in " in ended.stdout
    return int(ended.stdout.split()[-1])


def test_four_times_as_many_requests_need_no_more(tmp_path: Path) -> None:
    assert peak_kib(tmp_path, 8000) < 1.04 * peak_kib(tmp_path, 2000)
