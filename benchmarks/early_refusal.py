"""Twice the load that can be served, simulated: `python -m benchmarks.early_refusal [--picture F]`.

For each workload and split (Llama-3.1-8B on 8 H100s, `benchmarks.workloads`): the highest rate at
which 90 % are served as promised with Baton, and at twice that rate what becomes of the requests
with Baton (five cuts) and with its peers (two of them): means, and in brackets the least and the
most of a cut. Late: of those that were let in, the share that missed an SLO. All cuts come at twice
the rate that is found with the first. Those of one trace overlap.

Where prompts and tokens are made by different engines, refusing by what is there *now* makes the
two pools full in turns (Mooncake, FAST'25, section 6.3): while many prompts wait, the decode pool
runs empty, and the other way round. Every second of the second half of the arrivals it is noted how
much each pool has: prompts' tokens that are reserved there, requests that are. `correlation` is
between the two: towards -1 they take turns. `swing` is a pool's standard deviation over its mean.
With `--picture` both are drawn over time.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Final

from benchmarks import shared_files
from benchmarks.report import table
from benchmarks.workloads import WORKLOADS, Workload
from engine.profiles import PROFILES
from router.core.events import Role
from simulator import picture
from simulator.cluster import Cluster, Layout
from simulator.experiment import OURS, Outcome, run
from simulator.figures import WIDTH, Canvas, Figure, Stroke
from simulator.goodput import highest_rate
from simulator.measure import Measurement
from simulator.traces import BLOCK_TOKENS, TracedRequest

ENGINES: Final = 8
SPLITS: Final = (0, 3)
"""Of the engines, those that only compute prompts."""
PEERS: Final = (
    "least_loaded", "sglang_cache_aware", "dynamo_kv", "llmd_guide", "mooncake",
    "mooncake_rejecting",
)  # fmt: skip
LOADS: Final = ("mooncake_conversation", "bursty", "azure2023_conv", "agents")
OVERLOAD: Final = 2.0
SHARE: Final = 0.9
SEEDS: Final = 5
PEER_SEEDS: Final = 2
"""They are far off: two cuts tell it."""
PRECISION: Final = 0.1
SAMPLE_S: Final = 1.0


@dataclass(slots=True)
class Pools:
    """How much each pool had, at every sample."""

    at_s: list[float] = field(default_factory=list)
    prefill: list[float] = field(default_factory=list)
    """Prompt tokens."""
    decode: list[float] = field(default_factory=list)
    """Requests."""

    def look(self, cluster: Cluster) -> None:
        """Note what is there, if it is time to."""
        if self.at_s and cluster.now_s < self.at_s[-1] + SAMPLE_S:
            return
        self.at_s.append(cluster.now_s)
        workers = list(cluster.routers[0].pool)
        self.prefill.append(
            sum(each.reserved_prefill_tokens for each in workers if each.role is Role.PREFILL)
        )
        self.decode.append(sum(each.reserved_requests for each in workers))

    def settled(self, until_s: float) -> Pools:
        """The second half of the time until then."""
        kept = [n for n, at_s in enumerate(self.at_s) if until_s / 2 <= at_s <= until_s]
        return Pools(
            [self.at_s[n] for n in kept], [self.prefill[n] for n in kept],
            [self.decode[n] for n in kept],
        )  # fmt: skip

    def correlation(self) -> float:
        """Pearson's, between the pools; none (nan) where one of them stands still."""
        if any(len(set(each)) < 2 for each in self.columns()):
            return math.nan
        return statistics.correlation(self.prefill, self.decode)

    def swings(self) -> tuple[float, float]:
        """Standard deviation over mean, of each."""
        swing = [
            statistics.pstdev(each) / statistics.mean(each) if any(each) else 0.0
            for each in self.columns()
        ]
        return swing[0], swing[1]

    def columns(self) -> tuple[list[float], list[float]]:
        """Prefill, decode."""
        return self.prefill, self.decode


def requests_of(
    workload: Workload, shared: Path, rate_rps: float, most: int, seed: int
) -> list[TracedRequest]:
    """A cut of it."""
    cut = replace(workload, most_requests=min(most, workload.most_requests))
    return list(cut.requests(shared, rate_rps, seed))


def serve(
    workload: Workload, shared: Path, prefill: int, policy: str, rate_rps: float, most: int,
    seed: int,
) -> tuple[Outcome, Pools]:  # fmt: skip
    """One run, to its end."""
    layout = Layout(PROFILES["llama-3.1-8b-h100"], prefill, ENGINES - prefill, BLOCK_TOKENS)
    requests = requests_of(workload, shared, rate_rps, most, seed)
    pools = Pools()
    outcome = run(layout, policy, workload.slo, requests, watch=pools.look)
    return outcome, pools.settled(requests[-1].arrival_s)


def capacity_rps(workload: Workload, shared: Path, prefill: int, most: int) -> float:
    """What Baton serves of the first cut as promised, coarsely."""

    def serves(rate_rps: float) -> bool:
        outcome, _ = serve(workload, shared, prefill, OURS, rate_rps, most, seed=0)
        return outcome.measured.attainment >= SHARE

    return highest_rate(serves, workload.start_rps, 0.05, PRECISION)


def rows(
    shared: Path, loads: Sequence[str], most: int, policies: Sequence[str], pictured: list[Figure]
) -> Iterator[tuple[str, ...]]:
    """One for each workload, split and policy."""
    for name, prefill in itertools.product(loads, SPLITS):
        workload = WORKLOADS[name]
        rate_rps = OVERLOAD * capacity_rps(workload, shared, prefill, most)
        load = f"{name}, {prefill} + {ENGINES - prefill}, {rate_rps:.3g}/s"
        for policy in policies:
            cuts = range(SEEDS if policy == OURS else PEER_SEEDS)
            served = [
                serve(workload, shared, prefill, policy, rate_rps, most, seed) for seed in cuts
            ]
            pools = [each for _, each in served]
            if prefill and policy == OURS:
                pictured.append(Figure(load, _HEIGHT, partial(_draw, pools[0])))
            told = turns(pools) if prefill else ("", "")
            yield (load, policy, *shares([each.measured for each, _ in served]), *told)


def shares(measured: Sequence[Measurement]) -> tuple[str, str, str]:
    """Served as promised, refused, late."""
    return (
        _range([each.attainment for each in measured], ".1%"),
        _range([each.refused / each.requests for each in measured], ".1%"),
        _range([each.late for each in measured], ".2%"),
    )


def turns(pools: Sequence[Pools]) -> tuple[str, str]:
    """How the two pools swing, and whether against each other: `-` where one is still."""
    swings = [
        statistics.mean(each) for each in zip(*(each.swings() for each in pools), strict=True)
    ]
    correlations = [each.correlation() for each in pools]
    known = [each for each in correlations if not math.isnan(each)]
    told = _range(known, "+.2f") if known else "-"
    return " / ".join(f"{swing:.2f}" for swing in swings), told


def _range(values: Sequence[float], form: str) -> str:
    return f"{statistics.mean(values):{form}} ({min(values):{form}} to {max(values):{form}})"


_HEIGHT: Final = 220


def _draw(pools: Pools, canvas: Canvas) -> None:
    """Prefill as a line, decode dashed; each over its largest."""
    left, bottom = 20.0, _HEIGHT - 40.0
    canvas.line([(left, 10), (left, bottom), (WIDTH - 10, bottom)], "axis")
    began_s, lasts_s = pools.at_s[0], pools.at_s[-1] - pools.at_s[0]
    strokes: tuple[Stroke, Stroke] = ("curve", "limit")
    for column, stroke in zip(pools.columns(), strokes, strict=True):
        largest = max(column) or 1.0
        points = [
            (
                left + (at_s - began_s) / lasts_s * (WIDTH - 10 - left),
                bottom - value / largest * (bottom - 10),
            )
            for at_s, value in zip(pools.at_s, column, strict=True)
        ]
        for part in itertools.pairwise(points):
            canvas.line(part, stroke)
    canvas.text(WIDTH / 2, bottom + 20, f"{lasts_s:.0f} s", "middle")


def main() -> None:
    """Entry point."""
    parser = shared_files.parser(__doc__)
    parser.add_argument("--picture", type=Path, help="a PNG of the pools over time")
    parser.add_argument("--requests", type=int, default=8000, help="of each cut, at most")
    parser.add_argument(
        "--policies", type=lambda text: text.split(","), default=(OURS, *PEERS), help="with commas"
    )
    given = parser.parse_args()
    pictured: list[Figure] = []
    heads = (
        "workload, prefill + decode, rate", "policy", "served as promised", "refused", "late",
        "swing prefill / decode", "correlation",
    )  # fmt: skip
    with shared_files.needed():
        print(table(heads, rows(given.shared, LOADS, given.requests, given.policies, pictured)))
    if given.picture is not None:
        summary = "Prompt tokens in the prefill pool (line), requests in the decode pool (dashed)."
        picture.write(given.picture, "Both pools at twice what can be served", summary, pictured)


if __name__ == "__main__":
    main()
