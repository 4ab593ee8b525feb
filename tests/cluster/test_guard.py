"""The guard ends what carries its instance's id, and nothing else."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cluster.guard import VARIABLE
from cluster.instance import Instance, remove_leftovers
from protos.errors import ConfigError

_PARENT = """
import subprocess, sys, time
from cluster.instance import Instance
instance = Instance(sys.argv[1])
instance.start_guard()
polite = subprocess.Popen(["sleep", "1000"], start_new_session=True)
deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1, flush=True)"
deaf = subprocess.Popen(
    [sys.executable, "-c", deaf + "; time.sleep(1000)"], stdout=subprocess.PIPE
)
deaf.stdout.readline()
orphan = subprocess.run(
    ["sh", "-c", "setsid sleep 1000 >/dev/null & echo $!"], stdout=subprocess.PIPE, text=True
)
(instance.directory / "some.sock").touch()
print(instance.id, polite.pid, deaf.pid, orphan.stdout.strip(), flush=True)
sys.stdin.readline()
instance.end(force=sys.argv[2] == "force")
"""


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def until(condition: Callable[[], bool], limit_s: float) -> float:
    """Wait for it; returns how long it took."""
    began_s = time.monotonic()
    while not condition():
        assert time.monotonic() - began_s < limit_s, "took too long"
        time.sleep(0.02)
    return time.monotonic() - began_s


@pytest.fixture
def bystander() -> Iterator[subprocess.Popen[bytes]]:
    """A process of another instance."""
    process = subprocess.Popen(["sleep", "1000"], env={**os.environ, VARIABLE: "another"})
    yield process
    assert alive(process.pid), "a process of another instance was ended"
    process.kill()
    process.wait()


def start_parent(tmp_path: Path, mode: str) -> tuple[subprocess.Popen[str], str, list[int]]:
    parent = subprocess.Popen(
        [sys.executable, "-c", _PARENT, str(tmp_path), mode],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert parent.stdout is not None
    instance, *pids = parent.stdout.readline().split()
    assert all(alive(int(pid)) for pid in pids)
    return parent, instance, [int(pid) for pid in pids]


@pytest.fixture
def short_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("g")


@pytest.mark.parametrize("mode", ["orderly", "force"])
def test_the_sweep_at_an_orderly_end(
    short_path: Path, bystander: subprocess.Popen[bytes], mode: str
) -> None:
    parent, instance, pids = start_parent(short_path, mode)
    began_s = time.monotonic()
    parent.communicate("end\n", timeout=10)
    took_s = time.monotonic() - began_s
    assert parent.returncode == 0
    assert not any(alive(pid) for pid in pids)
    assert took_s < (1.5 if mode == "force" else 4)
    assert not (short_path / instance).exists()


def test_the_sweep_after_sigkill_of_the_parent(
    short_path: Path, bystander: subprocess.Popen[bytes]
) -> None:
    parent, instance, pids = start_parent(short_path, "orderly")
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    until(lambda: not any(alive(pid) for pid in pids), 5)
    until(lambda: not (short_path / instance / "some.sock").exists(), 2)


def test_old_leftovers_are_removed_and_recent_ones_kept(tmp_path: Path) -> None:
    for name, age_s in (("old", 2 * 86400), ("recent", 60)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "lock").touch()
        then_s = time.time() - age_s
        os.utime(tmp_path / name / "lock", (then_s, then_s))
    (tmp_path / "not-ours").mkdir()
    remove_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["not-ours", "recent"]


def test_a_directory_that_is_no_directory(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="run_directory"):
        Instance(str(tmp_path / "file"))
