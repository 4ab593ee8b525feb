"""One policy on one workload, and what is looked at where peers' publications are checked."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping
from typing import Final, NamedTuple

from router.core.costs import Slo
from router.core.events import End, Ended
from simulator.baselines import BASELINES
from simulator.baselines.policy import PeerPolicy
from simulator.cluster import Cluster, Layout
from simulator.experiment import setup_of
from simulator.measure import Measurement
from simulator.traces import TracedRequest

SIZE: Final = 1.5
"""A ratio within this factor of the published one is of its size."""


class Seen(NamedTuple):
    """What a policy gave its clients."""

    latencies: Measurement
    e2e_mean_s: float
    hit_rate: float
    output_tokens_s: float
    spread: float
    """Between the most and the fewest requests in flight on a worker: its mean."""

    @property
    def ttft_mean_s(self) -> float:
        return self.latencies.ttft.mean_s

    def ttft_s(self, share: float) -> float:
        return self.latencies.ttft.quantile_s(share)


class Finding(NamedTuple):
    """One row."""

    published: str
    found: str
    order: bool | None
    """None where nothing is published."""
    size: bool | None = None


def serve(
    layout: Layout, policy: str, requests: Iterable[TracedRequest], warm_up: int = 0,
    knobs: Mapping[str, float] | None = None,
) -> Seen:  # fmt: skip
    """The first `warm_up` requests are served and not looked at."""
    placement = BASELINES[policy](setup_of(layout, knobs=knobs))
    assert isinstance(placement, PeerPolicy)
    measured = Measurement(Slo(math.inf, math.inf))
    begun_s: list[float] = []
    took_s: list[float] = []
    spreads: list[int] = []

    def on_end(ended: Ended) -> None:
        if int(ended.key.partition(":")[2]) < warm_up:
            return
        assert ended.end is End.COMPLETE, f"{ended.key} was not served: {ended.error}"
        assert ended.duration_s is not None
        begun_s.append(cluster.now_s - ended.duration_s)
        took_s.append(ended.duration_s)
        measured.observe(ended)
        counts = [placement.counts.in_flight(worker) for worker in cluster.workers]
        spreads.append(max(counts) - min(counts))

    cluster = Cluster(layout, [placement], on_end)
    cluster.run(requests)
    cached = sum(worker.cached_tokens for worker in cluster.workers.values())
    return Seen(
        measured,
        statistics.mean(took_s),
        cached / cluster.prompt_tokens,
        measured.output_tokens / (cluster.ended_s - min(begun_s)),
        statistics.mean(spreads),
    )


def of_size(found: float, published: float) -> bool:
    """Whether a ratio is of the published one's size."""
    return published / SIZE <= found <= published * SIZE
