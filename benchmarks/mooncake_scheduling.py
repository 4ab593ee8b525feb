"""Mooncake's comparison of schedulers, simulated: `python -m benchmarks.mooncake_scheduling`.

FAST'25 figure 5: the conversation trace replayed on 16 machines of eight A800 each with a dummy
LLaMA3-70B; mean time to first token of random placement, of the fewest requests assigned, and of
Algorithm 1 with each instance's own cache alone ("local") and with prefixes fetched from others
("global"). The same trace (`--shared`, default ../shared) is placed here by policies of the same
kinds: `mooncake` with an infinite theta is the local one.

Assumptions:

- 8 prefill and 8 decode instances, a machine each: figure 5 does not say; 1:1 is what the paper
  finds best (figure 15).
- An instance computes at a share of its peak that the paper does not tell: COMPUTE_SHARES are
  scanned, as are rates around the trace's own (the paper replays timestamps; those published sit on
  a grid of 3 s, within which requests are spread evenly here).
- Each instance caches 3M tokens: a terabyte of its machine's memory, which the paper takes for a
  local cache. What is there is as near as if it were on the GPUs.
- Prefixes move at 87 GB/s, the paper's measurement, and never slow each other down.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import islice, pairwise
from pathlib import Path
from typing import Final, NamedTuple

from benchmarks import shared_files
from benchmarks.report import table
from benchmarks.rooflines import A800, LLAMA_70B, roofline
from router.core.costs import Slo
from simulator import traces, workloads
from simulator.baselines.mooncake import KNOBS
from simulator.cluster import Layout
from simulator.experiment import run
from simulator.traces import TracedRequest

PREFILL: Final = 8
DECODE: Final = 8
CACHE_TOKENS: Final = 3_000_000
GRID_S: Final = 3.0
SLO: Final = Slo(30.0, 0.1)
COMPUTE_SHARE: Final = 0.4
COMPUTE_SHARES: Final = (0.35, 0.4, 0.45, 0.5)
RATES: Final = (0.8, 0.9, 1.0, 1.1)
THETAS: Final = (1.0, 2.0, 4.0, 8.0, 16.0, math.inf)
SEEDS: Final = 3
PUBLISHED_S: Final = {"random": 19.65, "load": 5.27, "local": 3.58, "global": 3.07}


class Scheduler(NamedTuple):
    """What stands for one of the paper's."""

    policy: str
    theta: float | None = None


SCHEDULERS: Final = {
    "random": Scheduler("random"),
    "load": Scheduler("least_loaded"),
    "local": Scheduler("mooncake", math.inf),
    "global": Scheduler("mooncake", KNOBS["theta"]),
}


class Case(NamedTuple):
    """One run."""

    scheduler: Scheduler
    compute_share: float = COMPUTE_SHARE
    rate: float = 1.0
    """Of the trace's own."""
    seed: int = 0


class Seen(NamedTuple):
    """What came of it."""

    ttft_mean_s: float
    hit_rate: float
    busy: float
    """The share of the time in which prefill instances computed."""


def conversation(shared: Path, seed: int, most_requests: int | None = None) -> list[TracedRequest]:
    """The trace, or its beginning."""
    read = traces.read(shared / "traces" / "mooncake_conversation.jsonl.gz")
    return list(workloads.jittered(islice(read, most_requests), GRID_S, seed))


def simulate(case: Case, requests: Sequence[TracedRequest]) -> Seen:
    """Serve these; raises AssertionError if not all are served."""
    profile = roofline(LLAMA_70B, A800, 8, case.compute_share, CACHE_TOKENS)
    layout = Layout(profile, PREFILL, DECODE)
    policy, theta = case.scheduler
    knobs = {} if theta is None else {"theta": theta}
    moved = workloads.sped_up(requests, case.rate)
    outcome = run(layout, policy, SLO, moved, case.seed, knobs)
    assert not outcome.measured.failed
    busy = [share for worker, share in outcome.busy.items() if worker.startswith("prefill")]
    return Seen(outcome.measured.ttft.mean_s, outcome.hit_rate, statistics.mean(busy))


def _simulate(case: Case, shared: Path) -> Seen:
    return simulate(case, conversation(shared, case.seed))


def cases() -> list[Case]:
    """All of the report."""
    compared = list(SCHEDULERS.values())
    shares = [Case(each, share) for share in COMPUTE_SHARES for each in compared]
    rates = [Case(each, rate=rate) for rate in RATES for each in compared]
    seeds = [Case(each, seed=seed) for seed in range(SEEDS) for each in compared]
    thetas = [Case(Scheduler("mooncake", theta)) for theta in THETAS]
    return list(dict.fromkeys(shares + rates + seeds + thetas))


def report(shared: Path, jobs: int) -> str:
    """As Markdown."""
    todo = cases()
    with ProcessPoolExecutor(jobs) as pool:
        found = list(pool.map(_simulate, todo, [shared] * len(todo)))
    seen = dict(zip(todo, found, strict=True))
    published = list(PUBLISHED_S.values())
    rows = [["published", "", *(f"{s:.2f}" for s in published), *_ratios(published), "", ""]]
    for share in COMPUTE_SHARES:
        rows.append(_row([seen[Case(each, share)] for each in SCHEDULERS.values()], share, 1.0))
    for rate in RATES:
        if rate != 1.0:
            line = [seen[Case(each, rate=rate)] for each in SCHEDULERS.values()]
            rows.append(_row(line, COMPUTE_SHARE, rate))
    headings = [
        "share of peak", "rate", *SCHEDULERS, "load/random", "local/load", "global/local",
        "hit rate: load, local, global", "prefill busy, random",
    ]  # fmt: skip
    seeds = [
        [name, *(f"{seen[Case(each, seed=seed)].ttft_mean_s:.2f}" for seed in range(SEEDS))]
        for name, each in SCHEDULERS.items()
    ]
    thetas = [seen[Case(Scheduler("mooncake", theta))] for theta in THETAS]
    return "\n".join(
        (
            "Mean time to first token, s:\n",
            table(headings, rows),
            f"By seed (share {COMPUTE_SHARE}, rate 1), s:\n",
            table(["", *map(str, range(SEEDS))], seeds),
            f"Algorithm 1 by theta (share {COMPUTE_SHARE}, rate 1):\n",
            table(
                ["theta", *(f"{theta:g}" for theta in THETAS)],
                [
                    ["TTFT mean, s", *(f"{each.ttft_mean_s:.2f}" for each in thetas)],
                    ["hit rate", *(f"{each.hit_rate:.1%}" for each in thetas)],
                ],
            ),
        )
    )


def _row(line: Sequence[Seen], share: float, rate: float) -> list[str]:
    times_s = [each.ttft_mean_s for each in line]
    hits = ", ".join(f"{each.hit_rate:.0%}" for each in line[1:])
    return [
        f"{share:g}", f"{rate:g}", *(f"{s:.2f}" for s in times_s), *_ratios(times_s), hits,
        f"{line[0].busy:.0%}",
    ]  # fmt: skip


def _ratios(times_s: Sequence[float]) -> list[str]:
    return [f"{after / before:.2f}" for before, after in pairwise(times_s)]


def main() -> None:
    """Entry point."""
    parser = shared_files.parser(__doc__)
    parser.add_argument("--jobs", type=int, default=2)
    given = parser.parse_args()
    with shared_files.needed():
        print(report(given.shared, given.jobs))


if __name__ == "__main__":
    main()
