"""The simulator beside the live system: `python -m benchmarks.live_fidelity [--output FILE]`.

The same requests (8 groups whose prompts begin alike, Poisson arrivals, seeded lengths) go to a
`baton serve` over HTTP, open loop and streamed, and to the simulated cluster, with the default
placement on both sides. What clients see is compared: time to first token (TTFT), mean time
between later tokens of a request (TPOT), and the share of prompt tokens that were cached where
their prompts were computed. Each run has an instance and a seed of its own; differences are
simulated against live, pair by pair; tables show medians (smallest to largest) over the pairs.

With `--real-time`, processes in the requests' path and the client run with real-time priority: for
machines on which others work as well. Prints Markdown.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from benchmarks.fidelity import Bounds, Pair, compare, compared_table
from benchmarks.fidelity_runs import Hops, LiveRun, Scenario, run_live, run_simulated
from benchmarks.report import machine, spread, table
from engine.profiles import PROFILES
from simulator.cluster import Layout
from simulator.traces import TracedRequest
from simulator.workloads import Wish, grouped

GROUPS: Final = 8
RUNS: Final = 3

SIMULATED_PROFILE: Final = replace(PROFILES["llama-3.1-70b-h100x4"], max_model_len_tokens=16_384)
"""Its steps are long enough that two cores carry four engines, a router and a client."""
SIMULATED: Final = Scenario(
    "2 prefill and 2 decode workers, simulated engines (Llama-3.1-70B on 4 H100s each)",
    Layout(SIMULATED_PROFILE, prefill=2, decode=2, block_tokens=128),
    engine="simulated",
)


@dataclass(frozen=True, slots=True)
class Load:
    """How much is asked."""

    rate_rps: float
    duration_s: float
    shared_tokens: int
    own_tokens: int
    output_tokens: int

    def requests(self, seed: int) -> list[TracedRequest]:
        """Clients tell how long their outputs may get, which is how long they get."""
        wish = Wish(self.rate_rps, self.duration_s, seed)
        made = grouped(wish, GROUPS, self.shared_tokens, self.own_tokens, self.output_tokens)
        return [each._replace(max_tokens=each.output_tokens) for each in made]

    @property
    def name(self) -> str:
        return (
            f"{self.rate_rps:g} requests/s for {self.duration_s:g} s: {self.shared_tokens} shared "
            f"tokens, about {self.own_tokens} of its own, about {self.output_tokens} of output"
        )


MEDIUM: Final = Load(12, 60, shared_tokens=2048, own_tokens=700, output_tokens=60)
HIGH: Final = replace(MEDIUM, rate_rps=30)
QUICK: Final = replace(MEDIUM, duration_s=15)
SIMULATED_BOUNDS: Final = Bounds(share=0.10, points=3)


def compared(scenario: Scenario, load: Load, bounds: Bounds, runs: int, prioritised: bool) -> str:
    """Markdown: one scenario under one load."""
    pairs, lives, simulated_reasons = [], [], []
    for seed in range(1, runs + 1):
        requests = load.requests(seed)
        live = run_live(scenario, requests, prioritised)
        assert live.hops is not None
        simulated, reasons = run_simulated(scenario, live.hops, requests, seed)
        pairs.append(Pair(live.seen, simulated))
        lives.append(live)
        simulated_reasons.append(reasons)
    parts = [f"### {load.name}", compared_table(compare(pairs, bounds)), conditions(lives)]
    return "\n\n".join(parts)


def conditions(lives: Sequence[LiveRun]) -> str:
    """What was measured beside the runs, and what they ran beside."""
    rows = [
        ("requests' path and client, cores", spread([each.own_cores for each in lives], 2)),
        ("others on the machine, cores", spread([each.others_cores for each in lives], 2)),
        ("client late at most, ms", spread([1e3 * each.client_late_s for each in lives], 1)),
    ]
    hops = [each.hops for each in lives if each.hops is not None]
    for field in Hops._fields:
        what = {"front_in_s": "client to router", "front_out_s": "router to client"}
        name = what.get(field, "router to engine, one way")
        rows.append((f"{name}, ms", spread([1e3 * getattr(each, field) for each in hops], 2)))
    return table(("measured beside it", ""), rows)


def report(runs: int, quick: bool, prioritised: bool) -> Iterator[str]:
    """Parts of it, as they are known."""
    yield machine()
    yield f"## {SIMULATED.name}"
    for load in (QUICK,) if quick else (MEDIUM, HIGH):
        yield compared(SIMULATED, load, SIMULATED_BOUNDS, 1 if quick else runs, prioritised)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=RUNS)
    parser.add_argument("--quick", action="store_true", help="one short run")
    parser.add_argument("--real-time", action="store_true", help="needs the right to")
    parser.add_argument("--output", type=Path, help="also write the report to this file")
    arguments = parser.parse_args()
    parts = []
    for part in report(arguments.runs, arguments.quick, arguments.real_time):
        print(part, end="\n\n", flush=True)
        parts.append(part)
    if arguments.output:
        arguments.output.write_text("\n\n".join(parts))


if __name__ == "__main__":
    main()
