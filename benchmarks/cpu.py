"""CPU time of groups of processes, and how long they waited for it, from /proc.

Boundary: counts what it is told to; which process is what, the caller knows.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

import psutil

_WAITED: Final = 1
"""Of a thread's schedstat: nanoseconds in which it could have run and had no core (Linux,
Documentation/scheduler/sched-stats.rst)."""


@dataclass(frozen=True, slots=True)
class CpuUse:
    """What was used in a span of time."""

    span_s: float
    cpu_s: dict[str, float]
    """By group."""
    waited_s: dict[str, float]
    """For a core, by group: of all their threads that are there still."""
    machine_s: float
    """What all cores of the machine did, for whoever it was, and what its host took away."""


class _Times(NamedTuple):
    """Of a process."""

    used_s: float
    waited_s: float


class CpuMeter:
    """Counts from its making, or from the last `read`, on."""

    def __init__(self, groups: Mapping[str, Sequence[int]], may_end: Collection[str] = ()) -> None:
        """Processes of the groups in `may_end` may go; then what they used last is not counted."""
        self._groups = groups
        self._may_end = may_end
        self._processes: dict[int, psutil.Process] = {}
        self._since_s = time.perf_counter()
        self._before = self._read()
        self._machine_before_s = _machine_s()

    def read(self) -> CpuUse:
        """Raises psutil.NoSuchProcess if one has ended that must not."""
        now_s, now, machine_s = time.perf_counter(), self._read(), _machine_s()
        used, waited = (
            {
                name: sum(now[pid][kind] - self._before[pid][kind] for pid in pids if pid in now)
                for name, pids in self._groups.items()
            }
            for kind in range(len(_Times._fields))
        )
        use = CpuUse(now_s - self._since_s, used, waited, machine_s - self._machine_before_s)
        self._since_s, self._before, self._machine_before_s = now_s, now, machine_s
        return use

    def _read(self) -> dict[int, _Times]:
        """Of each process, so far."""
        times = {}
        for name, pids in self._groups.items():
            for pid in pids:
                try:
                    process = self._processes.setdefault(pid, psutil.Process(pid))
                    times[pid] = _Times(sum(process.cpu_times()[:2]), _waited_s(pid))
                except psutil.NoSuchProcess:
                    if name not in self._may_end:
                        raise
        return times


def _waited_s(pid: int) -> float:
    waited_ns = 0
    for thread in Path(f"/proc/{pid}/task").glob("*/schedstat"):
        try:
            waited_ns += int(thread.read_text().split()[_WAITED])
        except (FileNotFoundError, ProcessLookupError):
            continue  # It has ended.
    return waited_ns / 1e9


def _machine_s() -> float:
    times = psutil.cpu_times()
    return float(sum(times) - times.idle - times.iowait - times.guest - times.guest_nice)
