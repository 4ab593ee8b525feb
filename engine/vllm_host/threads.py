"""What Linux tells of the engine's processes: is one stopped, how much did each thread compute."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from kvstore.pollers import POLLER_NAME

_WAITING_COUNTS: Final = 0.1
"""One that computes waits nearly all the time that it gets no core; one that hangs, and wakes now
and then to look around, a tenth of it or less."""
_PAGE_READ_S: Final = 0.005
"""What a page fault that waits for the disk counts."""
_TICKS_PER_S: Final = os.sysconf("SC_CLK_TCK")


def is_stopped(pid: int) -> bool:
    """Whether a signal has stopped the process; one that is gone is not."""
    with contextlib.suppress(OSError):
        return _fields(Path(f"/proc/{pid}/stat"))[1][0] == "T"
    return False


def cpu_times_s(pid: int) -> dict[str, float]:
    """CPU seconds by thread, of the process and all its descendants, pollers left out.

    What children used that have ended counts for one more thread of their parent. Waiting for a
    core counts a little, and reading one's own pages from disk: on a machine with too much to do,
    or too little memory, who computes is seldom seen to.
    """
    times: dict[str, float] = {}
    for process in _with_descendants(pid):
        with contextlib.suppress(OSError):  # It has just ended.
            used = _fields(Path(f"/proc/{process}/stat"))[1]
            times[f"{process} children"] = (int(used[13]) + int(used[14])) / _TICKS_PER_S
        for task in _tasks(process):
            with contextlib.suppress(OSError):
                name, used = _fields(task / "stat")
                if name != POLLER_NAME:
                    used_s = (int(used[11]) + int(used[12])) / _TICKS_PER_S
                    read_s = _PAGE_READ_S * int(used[9])
                    times[task.name] = used_s + read_s + _WAITING_COUNTS * _waited_s(task)
    return times


def _waited_s(task: Path) -> float:
    """For a core, ready to run; 0 where the system does not tell (proc(5), schedstat)."""
    try:
        return int((task / "schedstat").read_text().split()[1]) / 1e9
    except OSError:
        return 0.0


def _with_descendants(pid: int) -> Iterator[int]:
    yield pid
    for task in _tasks(pid):
        with contextlib.suppress(OSError):
            for child in (task / "children").read_text().split():
                yield from _with_descendants(int(child))


def _tasks(pid: int) -> list[Path]:
    try:
        return list(Path(f"/proc/{pid}/task").iterdir())
    except OSError:
        return []


def _fields(stat: Path) -> tuple[str, list[str]]:
    """A thread's or process's name, and what follows it: state, parent, ... (proc(5), from 3)."""
    head, _, rest = stat.read_text().rpartition(")")
    return head.partition("(")[2], rest.split()
