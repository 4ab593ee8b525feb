"""CPU time of groups of processes, from /proc.

Boundary: counts what it is told to; which process is what, the caller knows.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import psutil


@dataclass(frozen=True, slots=True)
class CpuUse:
    """What was used in a span of time."""

    span_s: float
    cpu_s: dict[str, float]
    """By group."""
    machine_s: float
    """What all cores of the machine did, for whoever it was, and what its host took away."""


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
        used = {
            name: sum(now[pid] - self._before[pid] for pid in pids if pid in now)
            for name, pids in self._groups.items()
        }
        use = CpuUse(now_s - self._since_s, used, machine_s - self._machine_before_s)
        self._since_s, self._before, self._machine_before_s = now_s, now, machine_s
        return use

    def _read(self) -> dict[int, float]:
        """What each process has used so far, in seconds."""
        used_s = {}
        for name, pids in self._groups.items():
            for pid in pids:
                try:
                    process = self._processes.setdefault(pid, psutil.Process(pid))
                    used_s[pid] = sum(process.cpu_times()[:2])
                except psutil.NoSuchProcess:
                    if name not in self._may_end:
                        raise
        return used_s


def _machine_s() -> float:
    times = psutil.cpu_times()
    return float(sum(times) - times.idle - times.iowait - times.guest - times.guest_nice)
