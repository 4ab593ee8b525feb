"""What the simulated comparisons serve: traces from SHARED and synthetic ones, each with its SLOs.

A trace's cut is sped up to the rate that is asked for; seeds cut at other places, and spread
arrivals that Mooncake's clock put on a grid of 3 s. The same requests come at every rate, so that a
search compares like with like; how long a cut lasts follows from its rate. SLOs: time to first
token leaves room for the longest prompts to be computed alone on one engine; time per output token
is faster than people read.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Final

from router.core.costs import Slo
from simulator import traces, workloads
from simulator.traces import TracedRequest

SEEDS: Final = 5
"""Cuts of one trace, spread over it."""


@dataclass(frozen=True, slots=True)
class Workload:
    """One of them."""

    name: str
    slo: Slo
    """On the 8B model; the 70B model's are `LARGE` times as long."""
    start_rps: float
    """About what 8 GPUs serve of it with the 8B model: where a search begins."""
    grid_s: float = 0.0
    """Of the trace's clock."""
    most_requests: int = 4000
    """Of a cut: of a trace 20 minutes by its own clock or more, and enough to last for several
    times as long as a request."""

    def requests(self, shared: Path, rate_rps: float, seed: int) -> Iterator[TracedRequest]:
        """At this mean rate, in the order of their arrival."""
        made = workloads.SYNTHETIC.get(self.name)
        if made is not None:
            return islice(made(workloads.Wish(rate_rps, math.inf, seed)), self.most_requests)
        whole = _trace(shared / "traces" / f"{self.name}.jsonl.gz")
        skipped = max(0, len(whole) - self.most_requests) * (seed % SEEDS) // max(1, SEEDS - 1)
        window = whole[skipped : skipped + self.most_requests]
        begin_s = window[0].arrival_s
        base_rps = len(window) / (window[-1].arrival_s - begin_s)
        moved: Iterator[TracedRequest] = (
            each._replace(arrival_s=each.arrival_s - begin_s) for each in window
        )
        if self.grid_s:
            moved = workloads.jittered(moved, self.grid_s, seed)
        return workloads.sped_up(moved, rate_rps / base_rps)


LARGE: Final = 2.5
_LONG: Final = Slo(12.0, 0.1)
_SHORT: Final = Slo(1.0, 0.05)
WORKLOADS: Final[dict[str, Workload]] = {
    each.name: each
    for each in (
        Workload("mooncake_conversation", _LONG, 9.0, grid_s=3.0),
        Workload("prefix-groups", _SHORT, 60.0),
        Workload("bursty", _SHORT, 200.0, most_requests=8_000),
        # Long enough for most of its requests to come once as many chains end as begin.
        Workload("agents", _SHORT, 60.0, most_requests=10_000),
        Workload("azure2023_conv", _SHORT, 130.0, most_requests=6_600),
        Workload("mooncake_arxiv_first1000", _LONG, 12.0, grid_s=3.0),
        Workload("servegen_m-large_day9_24h", _SHORT, 200.0, most_requests=6_000),
    )
}


@lru_cache(maxsize=1)
def _trace(path: Path) -> list[TracedRequest]:
    return list(traces.read(path))
