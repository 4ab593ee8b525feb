"""llm-d's measured prefix routing, simulated: `python -m benchmarks.prefix_routing`.

SHARED/perf/llm-d_prefix_routing_by_qps.csv (`--shared`, default ../shared) holds a sweep of rates
on 8 pods of Qwen3-32B on two H100s each: 150 groups of 5 prompts, 6,000 tokens shared within a
group and 1,200 of a prompt's own, up to 1,000 of output. Working set: 73 % of all KV caches. The
same workload is simulated with the policies that were compared there, and with Baton's.

Assumptions, since the table does not say them: every stage sends for STAGE_S at its rate, and all
of it ends before the next begins; prompts are asked for in a random order, each as often as the
others; outputs are of any length up to 1,000, evenly. Lengths and duration go together: tokens per
second at 3 to 15 requests/s are those of outputs of about 450 tokens, or of longer ones in shorter
stages. Of the 6,000 tokens 5,632 are whole blocks here, and shared.
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

RATES_RPS: Final = (3, 10, 15, 20, 30, 40, 60)
STAGE_S: Final = 20.0
APART_S: Final = 600.0
"""From one stage's begin to the next: longer than any takes to end."""
PODS: Final = 8
GROUPS: Final = 150
PROMPTS: Final = 5
SHARED_TOKENS: Final = 6000
OWN_TOKENS: Final = 1200
MOST_OUTPUT_TOKENS: Final = 1000
MEASURED_AS: Final = {
    "random": "random-scheduling",
    "least_loaded": "load-scheduling",
    "sglang_cache_aware": "estimated-scheduling",
    "llmd_builtin": "precise-scheduling",
    "baton": None,
}
"""By policy, what the table calls it, or what is nearest to it there."""


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
    for stage, rate_rps in enumerate(RATES_RPS):
        order = itertools.cycle(rng.permutation(GROUPS * PROMPTS).tolist())
        at_s = rng.exponential(1 / rate_rps)
        while at_s < STAGE_S:
            prompt = next(order)
            shared = range(
                prompt // PROMPTS * shared_blocks, (prompt // PROMPTS + 1) * shared_blocks
            )
            own = range(first_own + prompt * own_blocks, first_own + (prompt + 1) * own_blocks)
            output = int(rng.integers(1, MOST_OUTPUT_TOKENS, endpoint=True))
            yield stage, TracedRequest(stage * APART_S + at_s, tokens, output, (*shared, *own))
            at_s += rng.exponential(1 / rate_rps)


def simulate(policy: str, seed: int = 0) -> dict[int, Stage]:
    """By rate."""
    profile = PROFILES["qwen3-32b-h100x2"]
    layout = Layout(profile, 0, PODS)
    made = list(requests(seed))
    stage_of = {f"0:{number}": stage for number, (stage, _) in enumerate(made)}
    ends: list[list[Ended]] = [[] for _ in RATES_RPS]

    def on_end(ended: Ended) -> None:
        ends[stage_of[ended.key]].append(ended)

    placement = policy_named(policy)(setup_of(layout, seed), Slo(2.0, 0.05))
    Cluster(layout, [placement], on_end).run(request for _, request in made)
    return {rate: _stage(stage_ends) for rate, stage_ends in zip(RATES_RPS, ends, strict=True)}


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
    for policy, name in MEASURED_AS.items():
        seen, there = simulate(policy), known.get(name or "", {})
        for what, place, scale, digits in (("TTFT p90, s", 1, 1, 2), ("ITL mean, ms", 2, 1000, 0)):
            cells = []
            for rate, stage in seen.items():
                text = f"{stage[place] * scale:.{digits}f}"
                if rate in there:
                    text += f" ({there[rate][place] * scale:.{digits}f})"
                cells.append(text)
            rows.append([policy, what, *cells])
    return table(["policy", "", *(f"{rate}/s" for rate in RATES_RPS)], rows)


def main() -> None:
    """Entry point."""
    given = shared_files.parser(__doc__).parse_args()
    with shared_files.needed():
        print(report(given.shared))


if __name__ == "__main__":
    main()
