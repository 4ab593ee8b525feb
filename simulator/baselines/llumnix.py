"""Llumnix: dispatch by freeness.

Source: AlibabaPAI/llumnix @24220fb8 (v0), `llumnix/load_computation.py` and
`global_scheduler/dispatch_policy.py`.

Sees: reports of all workers, every 50 ms.

    F_i = (free blocks - blocks wanted by waiting requests) / (running + waiting),  idle: infinite

Most free wins. With a prefill pool (v0): prefill by the least (used + wanted) / total blocks,
decode by F. Nothing is counted between two reports, so all requests of one period go to the same
worker, unless several are equal.

Ignores: prefix caches, prefill time, output lengths.

Deviations: engines here do not report the blocks that waiting requests want. They are taken as the
waiting requests times the mean prompt of those that are counted at that worker, at the time of the
report. Equals are broken at random (upstream: the order of instances). No rebalancing (upstream's
default is off, the paper's on); the published thresholds for it and for scaling are unused.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar, Final, NamedTuple

from router.core.candidates import Candidate
from router.core.workers import Worker
from simulator.baselines.policy import Ask, Choice, Part, PeerPolicy, least
from simulator.baselines.sampling import Sampled
from simulator.baselines.setup import Setup

REPORT_PERIOD_S: Final = 0.05


class _Report(NamedTuple):
    freeness: float
    demand: float
    """Used and wanted blocks over all."""


class Llumnix(PeerPolicy):
    """Most free, as last reported."""

    compared: ClassVar = ("freeness", "demand")

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        setup.read({})
        self._reports = Sampled[_Report](REPORT_PERIOD_S, self._report)

    def choose(self, ask: Ask, workers: Sequence[Worker], part: Part) -> Choice:
        """See `PeerPolicy`."""
        reports = self._reports.at(ask.now_s, ask.view.pool)
        role = part.role
        if part is Part.PREFILL:
            candidates = [
                Candidate(worker.id, role, (report := reports[worker.id]).demand, report)
                for worker in workers
            ]
        else:
            candidates = [
                Candidate(worker.id, role, -(report := reports[worker.id]).freeness, report)
                for worker in workers
            ]
        return Choice(least(candidates, self._rng), candidates)

    def _report(self, worker: Worker) -> _Report:
        load = worker.load
        # Before its first report a worker is empty.
        total = load.kv_blocks_total or worker.kv_blocks_total
        wanted = load.waiting * self._mean_prompt_blocks(worker)
        requests = load.running + load.waiting
        freeness = (total - load.kv_blocks_used - wanted) / requests if requests else math.inf
        demand = (load.kv_blocks_used + wanted) / total if total else math.inf
        return _Report(freeness, demand)

    def _mean_prompt_blocks(self, worker: Worker) -> float:
        count = self.counts.at(worker.id)
        if not count.in_flight:
            return 0.0
        return count.context_tokens / count.in_flight / worker.block_size_tokens
