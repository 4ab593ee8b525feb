"""The simulator beside the live system: `python -m benchmarks.live_fidelity [--output FILE]`.

The same requests (8 groups whose prompts begin alike, Poisson arrivals, seeded lengths) go to a
`baton serve` over HTTP, open loop and streamed, and to the simulated cluster, with the same
placement on both sides: the default one with simulated engines, with real ones one that hands every
request over where there are two. What clients see is compared: time to first token (TTFT), mean
time between later tokens of a request (TPOT), and the share of prompt tokens that were cached where
their prompts were computed. Each run has an instance and a seed of its own; differences are
simulated against live, pair by pair; tables show medians (smallest to largest) over the pairs.

What simulated engines take the simulation is told. Of real ones it is measured, in each run's own
instance, before the load and after it: their steps' costs, what waking takes, and as many times as
long as alone a prompt takes while the other engine decodes, since engines share the cores here. A
decode step beside a prompt is taken to be slowed down as much.

With `--real-time`, processes in the requests' path and the client run with real-time priority: for
machines on which others work as well. Real engines never do: with it, their threads starve each
other, and tokens come in bursts. Prints Markdown.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Final

from benchmarks.engine_steps import configuration, measure
from benchmarks.fidelity import Bounds, Pair, compare, compared_table
from benchmarks.fidelity_runs import (
    Hops,
    LiveRun,
    default_placement,
    measure_hops,
    run_live,
    run_simulated,
    simulated_engines,
    split_share,
)
from benchmarks.report import machine, spread, table
from benchmarks.serving import Serving
from benchmarks.steps_fit import Measured, fit, mean
from benchmarks.steps_fit import report as fit_report
from engine.profiles import PROFILES
from router.core.placement import LeastPredictedWork, Placement
from simulator.cluster import Layout
from simulator.traces import TracedRequest
from simulator.workloads import Wish, grouped

GROUPS: Final = 8
RUNS: Final = 3

SIMULATED_PROFILE: Final = replace(PROFILES["llama-3.1-70b-h100x4"], max_model_len_tokens=16_384)
"""Its steps are long enough that two cores carry four engines, a router and a client."""
SIMULATED: Final = Layout(SIMULATED_PROFILE, prefill=2, decode=2, block_tokens=128)
COSTS_REPEATS: Final = 8
"""Of each point, before a run with real engines and after it."""


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
HIGH: Final = replace(MEDIUM, rate_rps=24)
QUICK: Final = replace(MEDIUM, duration_s=15)
SIMULATED_BOUNDS: Final = Bounds(share=0.10, points=3)
TINY_LOW: Final = Load(2, 40, shared_tokens=512, own_tokens=300, output_tokens=40)
TINY_MEDIUM: Final = replace(TINY_LOW, rate_rps=6)
TINY_SPARSE: Final = replace(TINY_LOW, rate_rps=1, duration_s=60, output_tokens=10)
"""So little that a prompt is seldom computed while the other engine decodes."""
TINY_LAYOUTS: Final = {
    0: "1 worker for both, real vLLM",
    1: "1 prefill and 1 decode worker, real vLLM, every request handed over",
}
"""By prefill workers."""
TINY_QUICK: Final = replace(TINY_MEDIUM, duration_s=15)
TINY_BOUNDS: Final = Bounds(share=0.20, points=3)


class Comparison:
    """Runs under one load, live and simulated."""

    def __init__(self) -> None:
        self.pairs: list[Pair] = []
        self._lives: list[LiveRun] = []
        self._split: list[float] = []
        """Of the simulated runs."""

    def add(
        self, live: LiveRun, layout: Layout, placement: Placement, hops: Hops,
        requests: Sequence[TracedRequest],
    ) -> None:  # fmt: skip
        """A live run; the simulated one is made of the same requests."""
        simulated, reasons = run_simulated(layout, placement, hops, requests)
        self.pairs.append(Pair(live.seen, simulated))
        self._lives.append(live)
        self._split.append(split_share(reasons))

    def report(self, load: Load, bounds: Bounds) -> str:
        """Markdown."""
        measures = compared_table(compare(self.pairs, bounds))
        return "\n".join([f"### {load.name}\n", measures, conditions(self._lives, self._split)])


def conditions(lives: Sequence[LiveRun], simulated_shares: Sequence[float]) -> str:
    """What the runs ran beside, and what was decided in them."""
    rows = [
        ("split over two workers, live, %", spread([100 * each.split for each in lives])),
        ("split, simulated, %", spread([100 * share for share in simulated_shares])),
        ("requests' path and client, cores", spread([each.own_cores for each in lives], 2)),
        ("others on the machine, cores", spread([each.others_cores for each in lives], 2)),
        ("engines waited for a core, %", spread([100 * each.engines_waited for each in lives])),
        ("client late at most, ms", spread([1e3 * each.client_late_s for each in lives])),
    ]
    return table(("beside it", ""), rows)


def hops_table(hops: Hops, prompt_tokens: int) -> str:
    """What the simulation is told of the way."""
    names = ("client to router", "router to client", "router to engine, one way")
    cells = [f"{1e3 * seconds:.2f}" for seconds in hops]
    heading = f"requests alone, {prompt_tokens:,} tokens, simulated engines"
    return table((heading, "ms"), zip(names, cells, strict=True))


def with_simulated_engines(runs: int, quick: bool, prioritised: bool) -> Iterator[str]:
    """Parts of the report, as they are known."""
    yield "## 2 prefill and 2 decode workers, simulated engines (Llama-3.1-70B on 4 H100s each)"
    prompt_tokens = MEDIUM.shared_tokens + MEDIUM.own_tokens
    hops = measure_hops(SIMULATED, prompt_tokens, prioritised)
    yield hops_table(hops, prompt_tokens)
    for load in (QUICK,) if quick else (MEDIUM, HIGH):
        compared = Comparison()
        for seed in range(1, runs + 1):
            requests = load.requests(seed)
            live = run_live(simulated_engines(SIMULATED), requests, prioritised)
            compared.add(live, SIMULATED, default_placement(SIMULATED, seed), hops, requests)
        yield compared.report(load, SIMULATED_BOUNDS)


def with_real_engines(runs: int, quick: bool, _: bool) -> Iterator[str]:
    """Likewise. What engines take is measured in each run's own instance, before the load and
    after it: how fast the machine is changes within minutes."""
    yield "## The tiny model on this machine's CPU, real vLLM engines"
    prompt_tokens = TINY_LOW.shared_tokens + TINY_LOW.own_tokens
    hops = measure_hops(SIMULATED, prompt_tokens, prioritised=False)
    yield hops_table(hops, prompt_tokens)
    for prefill, name in TINY_LAYOUTS.items():
        yield f"## {name}"
        loads = [TINY_SPARSE] if prefill else []
        costs: list[Measured] = []
        for load in [TINY_QUICK] if quick else [*loads, TINY_LOW, TINY_MEDIUM]:
            compared = Comparison()
            for seed in range(1, runs + 1):
                costs.append(add_real(compared, prefill, load.requests(seed), hops, seed))
            yield compared.report(load, TINY_BOUNDS) + "\n" + costs_table(costs[-runs:])
        yield f"### Engines' times, means of all runs\n\n{fit_report(mean(costs))}"


def add_real(
    compared: Comparison, prefill: int, requests: Sequence[TracedRequest], hops: Hops, seed: int
) -> Measured:
    """A run with real engines, and its simulation. Returns what these took."""
    looks: list[Measured] = []

    def look(baton: Serving) -> None:
        looks.append(measure(baton, hops.link_s, COSTS_REPEATS, salt=len(looks)))

    live = run_live(configuration(prefill), requests, look=look)
    costs = mean(looks)
    found = fit(costs)
    layout = Layout(
        found.profile, prefill, decode=1, block_tokens=costs.block_tokens,
        contention=found.contention,
    )  # fmt: skip
    # Of every request, though not every one comes to an engine that has idled.
    woken = hops._replace(front_in_s=hops.front_in_s + found.wake_s)
    compared.add(live, layout, LeastPredictedWork(Random(seed).randrange), woken, requests)
    return costs


def costs_table(costs: Sequence[Measured]) -> str:
    """How they differ between runs."""
    fits = [fit(each) for each in costs]
    rows = [
        ("prompt of 1,024 tokens alone, ms", spread([1e3 * each.prompts[1024] for each in costs])),
        ("step of 1 x 1,024 tokens, ms", spread([1e3 * each.decodes[1, 1024] for each in costs])),
    ]
    if contentions := [each.contention for each in fits if each.contention is not None]:
        rows.append(
            ("a prompt's step while the other engine decodes, times", spread(contentions, 2))
        )
    return table(("costs, of each run", ""), rows)


PARTS: Final = {"simulated": with_simulated_engines, "vllm": with_real_engines}


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=RUNS)
    parser.add_argument("--engines", choices=PARTS, help="only these; else both")
    parser.add_argument("--quick", action="store_true", help="one short run")
    parser.add_argument("--real-time", action="store_true", help="needs the right to")
    parser.add_argument("--output", type=Path, help="also write the report to this file")
    arguments = parser.parse_args()
    parts = [machine()]
    print(machine(), end="\n\n", flush=True)
    for name, part in PARTS.items():
        if arguments.engines in (None, name):
            runs = 1 if arguments.quick else arguments.runs
            for text in part(runs, arguments.quick, arguments.real_time):
                print(text, end="\n\n", flush=True)
                parts.append(text)
    if arguments.output:
        arguments.output.write_text("\n\n".join(parts))


if __name__ == "__main__":
    main()
