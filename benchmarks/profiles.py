"""Profiles of Baton's own processes while they work: starts the sampler in them, reads its files.

Boundary: `sampler/sitecustomize.py` does the sampling, in the process itself.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final

import psutil

from benchmarks.report import table

MODULES: Final = {"router": "router.process", "anchor": "router.unit.anchor.process"}
_SAMPLER: Final = Path(__file__).parent / "sampler"
_ROOT: Final = Path(__file__).parents[1]
_WRITTEN_S: Final = 10.0

Samples = list[tuple[list[str], float]]
"""Stacks from the outermost call on, and seconds."""


def environment(directory: Path) -> dict[str, str]:
    """What a process and its children must be started with."""
    paths = [str(_SAMPLER), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        "PYTHONPATH": os.pathsep.join(paths),
        "SAMPLED_MODULES": " ".join(MODULES.values()),
        "SAMPLES_DIRECTORY": str(directory),
    }


class Profile:
    """Of one process, by its name in MODULES; runs from its making to `end`."""

    def __init__(self, name: str, pid: int, directory: Path) -> None:
        self._name = name
        self._process = psutil.Process(pid)
        self._file = directory / f"{MODULES[name]}.{pid}.json"
        self._file.unlink(missing_ok=True)
        self._threads_s = self._by_thread_s()
        self._process.send_signal(signal.SIGUSR1)

    def end(self, requests: int) -> str:
        """A report, per request. Raises TimeoutError if the process writes nothing."""
        self._process.send_signal(signal.SIGUSR2)
        spent_s = {
            thread: total_s - self._threads_s.get(thread, 0.0)
            for thread, total_s in self._by_thread_s().items()
        }
        deadline_s = time.monotonic() + _WRITTEN_S
        while not self._file.exists():
            if time.monotonic() > deadline_s:
                raise TimeoutError(f"the process {self._process.pid} wrote no {self._file}")
            time.sleep(0.01)
        samples: Samples = json.loads(self._file.read_bytes())
        main_s = spent_s.pop(self._process.pid)
        return _report(self._name, samples, requests, main_s, sum(spent_s.values()))

    def _by_thread_s(self) -> dict[int, float]:
        return {
            thread.id: thread.user_time + thread.system_time for thread in self._process.threads()
        }


def _report(
    name: str, samples: Samples, requests: int, main_s: float, others_s: float, rows: int = 25
) -> str:
    def per_request(seconds: float) -> str:
        return f"{seconds / requests * 1e6:.1f}"

    sections = [
        f"### {name}: µs of CPU per request\n\n"
        f"Main thread {per_request(main_s)}, all others {per_request(others_s)}.\n"
    ]
    for heading, keys in (
        ("function alone", lambda stack: [_function(stack[-1])]),
        ("line alone", lambda stack: [_shortened(stack[-1])]),
        ("function with what it calls", lambda stack: {_function(frame) for frame in stack}),
    ):
        largest = _seconds_by(samples, keys).most_common(rows)
        lines = [(f"`{key}`", per_request(seconds)) for key, seconds in largest]
        sections.append(table((heading, "µs"), lines))
    return "\n".join(sections)


def _seconds_by(samples: Samples, keys: Callable[[list[str]], Iterable[str]]) -> Counter[str]:
    seconds: Counter[str] = Counter()
    for stack, spent_s in samples:
        for key in keys(stack):
            seconds[key] += spent_s  # type: ignore[assignment]
    return seconds


def _function(frame: str) -> str:
    return _shortened(frame).rpartition(":")[0]


def _shortened(frame: str) -> str:
    """Paths below the project, or below site-packages."""
    return frame.removeprefix(f"{_ROOT}/").rpartition("site-packages/")[2]
