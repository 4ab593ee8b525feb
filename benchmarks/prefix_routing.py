"""llm-d's measured prefix routing, simulated: `python -m benchmarks.prefix_routing`.

SHARED/perf/llm-d_prefix_routing_by_qps.csv (`--shared`, default ../shared) holds a sweep of rates
on 8 pods of Qwen3-32B on two H100s each: 150 groups of 5 prompts, 6,000 tokens shared within a
group and 1,200 of a prompt's own, up to 1,000 of output. Working set: 73 % of all KV caches. The
same workload is simulated with the schedulers that were compared there, and with Baton's. Stages
and weights are those that the sweep's own report names (llm-d, "73-capacity", workload profile and
scheduler configurations).

Assumptions, since nothing says them: prompts are asked for in a random order, each as often as the
others; outputs are of any length up to the 1,000 that were asked for, evenly: tokens per second at
3 to 20 requests/s are those of 500 to 700 tokens each. Of the 6,000 tokens 5,632 are whole blocks
here, and shared.
"""

from __future__ import annotations

import csv
import itertools
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np

from benchmarks import shared_files
from benchmarks.report import table
from engine.profiles import PROFILES
from router.core.costs import Slo
from router.core.events import End, Ended
from simulator.cluster import Cluster, Layout
from simulator.experiment import policy_named, setup_of
from simulator.traces import BLOCK_TOKENS, TracedRequest

STAGES: Final = (
    (15, 50), (3, 20), (10, 20), (15, 20), (20, 38), (22, 34), (25, 30), (30, 25), (35, 21),
    (40, 38), (43, 36), (46, 33), (49, 30), (52, 29), (55, 27), (57, 26), (60, 25),
)  # fmt: skip
"""Requests per second, and for how many seconds. The first fills the caches and is not counted."""
RATES_RPS: Final = tuple(rate_rps for rate_rps, _ in STAGES[1:])
SHOWN_RPS: Final = (3, 10, 15, 20, 30, 40, 60)
APART_S: Final = 600.0
"""From one stage's begin to the next: longer than any takes to end."""
PODS: Final = 8
GROUPS: Final = 150
PROMPTS: Final = 5
SHARED_TOKENS: Final = 6000
OWN_TOKENS: Final = 1200
MOST_OUTPUT_TOKENS: Final = 1000


class Scheduler(NamedTuple):
    """One that is simulated."""

    policy: str
    knobs: dict[str, float]
    measured_as: str | None
    """What the table calls it, or what is nearest to it there."""


SCHEDULERS: Final = {
    "random": Scheduler("random", {}, "random-scheduling"),
    "load-aware": Scheduler(
        "llmd_builtin",
        {"queue_weight": 1.0, "kv_weight": 1.0, "prefix_weight": 0.0},
        "load-scheduling",
    ),
    # Another system's guess of what caches hold, in place of llm-d's.
    "estimated (SGLang's)": Scheduler("sglang_cache_aware", {}, "estimated-scheduling"),
    "precise": Scheduler("llmd_builtin", {}, "precise-scheduling"),
    "baton": Scheduler("baton", {}, None),
}


class Stage(NamedTuple):
    """What was seen at one rate."""

    ttft_mean_s: float
    ttft_p90_s: float
    itl_mean_s: float


def requests(seed: int) -> Iterator[tuple[int, TracedRequest]]:
    """With the number of their stage."""
    rng = np.random.default_rng(seed)
    shared_blocks = SHARED_TOKENS // BLOCK_TOKENS
    tokens = SHARED_TOKENS + OWN_TOKENS
    own_blocks = -(-tokens // BLOCK_TOKENS) - shared_blocks
    first_own = GROUPS * shared_blocks
    order = itertools.cycle(rng.permutation(GROUPS * PROMPTS).tolist())
    for stage, (rate_rps, lasts_s) in enumerate(STAGES):
        at_s = rng.exponential(1 / rate_rps)
        while at_s < lasts_s:
            prompt = next(order)
            shared = range(
                prompt // PROMPTS * shared_blocks, (prompt // PROMPTS + 1) * shared_blocks
            )
            own = range(first_own + prompt * own_blocks, first_own + (prompt + 1) * own_blocks)
            output = int(rng.integers(1, MOST_OUTPUT_TOKENS, endpoint=True))
            yield stage, TracedRequest(stage * APART_S + at_s, tokens, output, (*shared, *own))
            at_s += rng.exponential(1 / rate_rps)


def simulate(scheduler: Scheduler, seed: int = 0) -> dict[int, Stage]:
    """By rate."""
    profile = PROFILES["qwen3-32b-h100x2"]
    layout = Layout(profile, 0, PODS)
    made = list(requests(seed))
    stage_of = {f"0:{number}": stage for number, (stage, _) in enumerate(made)}
    ends: list[list[Ended]] = [[] for _ in STAGES]

    def on_end(ended: Ended) -> None:
        ends[stage_of[ended.key]].append(ended)

    setup = setup_of(layout, seed, knobs=scheduler.knobs)
    placement = policy_named(scheduler.policy)(setup, Slo(2.0, 0.05))
    Cluster(layout, [placement], on_end).run(request for _, request in made)
    return {rate: _stage(stage_ends) for rate, stage_ends in zip(RATES_RPS, ends[1:], strict=True)}


def _stage(ends: list[Ended]) -> Stage:
    assert all(each.end is End.COMPLETE for each in ends)
    # All are complete, and an output of one token has no time between tokens.
    firsts = sorted(s for each in ends if (s := each.time_to_first_token_s) is not None)
    gaps = [s for each in ends if (s := each.time_per_output_token_s) is not None]
    p90 = firsts[int(0.9 * (len(firsts) - 1))]
    return Stage(statistics.mean(firsts), p90, statistics.mean(gaps))


def measured(shared: Path) -> dict[str, dict[int, Stage]]:
    """By scheduler and rate."""
    found: dict[str, dict[int, Stage]] = {}
    with (shared / "perf" / "llm-d_prefix_routing_by_qps.csv").open() as file:
        for row in csv.DictReader(file):
            if row["benchmark"] == "73-capacity" and row["qps"] != "summary":
                numbers = (row["ttft_mean_s"], row["ttft_p90_s"], row["itl_mean_s"])
                stage = Stage(*map(float, numbers))
                found.setdefault(row["scheduler"], {})[round(float(row["qps"]))] = stage
    return found


def report(shared: Path) -> str:
    """As Markdown: simulated, and measured in brackets."""
    known = measured(shared)
    rows = []
    for name, scheduler in SCHEDULERS.items():
        seen, there = simulate(scheduler), known.get(scheduler.measured_as or "", {})
        for what, place, scale, digits in (("TTFT p90, s", 1, 1, 2), ("ITL mean, ms", 2, 1000, 0)):
            cells = []
            for rate in SHOWN_RPS:
                text = f"{seen[rate][place] * scale:.{digits}f}"
                if rate in there:
                    text += f" ({there[rate][place] * scale:.{digits}f})"
                cells.append(text)
            rows.append([name, what, *cells])
    return table(["scheduler", "", *(f"{rate}/s" for rate in SHOWN_RPS)], rows)


def main() -> None:
    """Entry point."""
    given = shared_files.parser(__doc__).parse_args()
    with shared_files.needed():
        print(report(given.shared))


if __name__ == "__main__":
    main()
