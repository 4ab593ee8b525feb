"""Mooncake's ordering of prefill schedulers comes out on the beginning of its trace."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

from benchmarks.mooncake_scheduling import PUBLISHED_S, SCHEDULERS, Case, conversation, simulate

BEGINNING = 1000
BUSY = 1.2
"""Of the trace's rate: caches are empty still, but its queues are as long as later."""


def test_each_scheduler_is_better_than_the_one_before(shared: Path) -> None:
    requests = conversation(shared, 0, BEGINNING)
    seen = [simulate(Case(each, rate=BUSY), requests) for each in SCHEDULERS.values()]
    assert list(SCHEDULERS) == sorted(PUBLISHED_S, key=PUBLISHED_S.__getitem__, reverse=True)
    for before, after in pairwise(seen):
        assert before.ttft_mean_s > 1.15 * after.ttft_mean_s
    _, load, local, fetching = seen
    assert load.hit_rate < local.hit_rate < fetching.hit_rate
