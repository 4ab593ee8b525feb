"""Forecasts side by side, as numpy columns: a decision compares all workers at once.

Pure. A column has one value for each worker, prefill workers first. Whoever changes a forecast has
its row written again before the next question.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from protos.ids import WorkerId
from router.core.candidates import Column
from router.core.events import Role
from router.core.forecast import LARGEST_SHARE, LEAST_SEEN_S, Forecast
from router.core.workers import Worker


class Columns:
    """All workers that may be given work."""

    def __init__(
        self, prefill: Sequence[Worker], decode: Sequence[Worker],
        forecast_of: Callable[[WorkerId], Forecast],
    ) -> None:  # fmt: skip
        self._of = (prefill, decode)
        workers = self._workers = (*prefill, *decode)
        self.prefill = slice(0, len(prefill))
        self.decode = slice(len(prefill), len(workers))
        self.last = self.decode if decode else self.prefill
        """Those that make the tokens."""
        self.computing = len(prefill) or len(decode)
        """How many of them compute prompts, but for those that are computed where they decode."""
        self.ids = [worker.id for worker in workers]
        self._at = {worker: at for at, worker in enumerate(self.ids)}
        self.block_tokens = _column([worker.block_size_tokens for worker in workers])
        self.none = np.zeros(len(workers))
        # Of an engine that does not tell nobody knows that it is full.
        self.kv_blocks = _column([worker.kv_blocks_total or math.inf for worker in workers])
        rows = [forecast_of(worker).figures() for worker in self.ids]
        self._rows = np.ascontiguousarray(np.array(rows, np.float64).T)
        # In the order of `Figures`; each follows what is written into the rows.
        (
            self._free_s, self._first_due_s, self.waiting, self._load_s, self._load_at_s,
            self._began_s, self.decodes, self.context_tokens, self.running,
            self.running_context_tokens, self.coming_tokens, self.routers,
        ) = self._rows  # fmt: skip

    def role(self, at: int) -> Role:
        """Of the worker at this place."""
        return Role.PREFILL if at < self.prefill.stop else Role.DECODE

    def by_role(self, prefill: float, decode: float) -> Column:
        """A value for all of a pool."""
        column = self.none + decode
        column[self.prefill] = prefill
        return column

    def is_of(self, prefill: Sequence[Worker], decode: Sequence[Worker]) -> bool:
        """Whether these are its workers still: a pool's tuples are made anew when it changes."""
        return self._of[0] is prefill and self._of[1] is decode

    def write(self, worker: WorkerId, forecast: Forecast) -> None:
        """A forecast has changed; of a worker that can't be used nothing is written."""
        at = self._at.get(worker)
        if at is not None:
            self._rows[:, at] = forecast.figures()

    def spread(self, by_worker: Mapping[str, int], others: int) -> Column:
        """These values, and for all workers without one the same."""
        column = self.none + others
        for worker, value in by_worker.items():
            at = self._at.get(WorkerId(worker))
            if at is not None:
                column[at] = value
        return column

    def queue_s(self, now_s: float) -> Column:
        """As `Forecast.queue_s`."""
        late_s = np.maximum(0.0, now_s - self._first_due_s)
        queue_s: Column = np.maximum(0.0, self._free_s + late_s - now_s)
        return queue_s

    def prefill_share(self, now_s: float, window_s: float) -> Column:
        """Of their time, what goes to prompts: exponentially averaged over the window."""
        load_s = self._load_s * np.exp((self._load_at_s - now_s) / window_s)
        # Of a window that has only begun, what has been of it: else a worker that was given its
        # first prompts a moment ago would seem to have time for as many again.
        seen_s = np.maximum(LEAST_SEEN_S, now_s - self._began_s)
        share: Column = np.minimum(
            LARGEST_SHARE, load_s / (window_s * -np.expm1(-seen_s / window_s))
        )
        return share

    def kv_blocks_used(self) -> Column:
        """As last reported."""
        return _column([worker.load.kv_blocks_used for worker in self._workers])


def _column(values: Sequence[float]) -> Column:
    return np.array(values, np.float64)
