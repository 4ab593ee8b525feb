"""Load as a peer sees it: read from all workers at once, every so often.

A sample is taken with the first question after the period, so it is between nothing and one period
old; a peer's own clock would take it a little earlier.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Generic, TypeVar

from protos.ids import WorkerId
from router.core.workers import Worker, WorkerPool

Value = TypeVar("Value")


class Sampled(Generic[Value]):
    """What `read` finds on every worker, renewed once per period."""

    def __init__(self, period_s: float, read: Callable[[Worker], Value]) -> None:
        self._period_s = period_s
        self._read = read
        self._taken_s = -math.inf
        self._values: dict[WorkerId, Value] = {}

    def at(self, now_s: float, pool: WorkerPool) -> Mapping[WorkerId, Value]:
        """By worker; one that came since is read now."""
        if now_s >= self._taken_s + self._period_s:
            self._taken_s = now_s
            self._values = {worker.id: self._read(worker) for worker in pool}
        else:
            for worker in pool:
                if worker.id not in self._values:
                    self._values[worker.id] = self._read(worker)
        return self._values
