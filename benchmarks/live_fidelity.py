"""The simulator beside the live system: `python -m benchmarks.live_fidelity [--output FILE]`.

The same requests (8 groups whose prompts begin alike, Poisson arrivals, seeded lengths) go to a
`baton serve` over HTTP, open loop and streamed, and to the simulated cluster, with the same
placement on both sides: the default one, but where every request is handed over. What clients see
is compared: time to first token (TTFT), mean time between later tokens of a request (TPOT), and the
share of prompt tokens that were cached where their prompts were computed. Each run has an instance
and a seed of its own; differences are simulated against live, pair by pair; tables show medians
(smallest to largest) over the pairs.

With `--real-time`, processes in the requests' path and the client run with real-time priority: for
machines on which others work as well. Real engines never do: with it, their threads starve each
other, and tokens come in bursts. Prints Markdown.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Final

import yaml

from benchmarks import engine_steps
from benchmarks.fidelity import Bounds, Pair, compare, compared_table
from benchmarks.fidelity_runs import (
    Hops,
    LiveRun,
    Scenario,
    measure_hops,
    run_live,
    run_simulated,
    split_share,
)
from benchmarks.report import machine, spread, table
from benchmarks.steps_fit import fit
from benchmarks.steps_fit import report as fit_report
from engine.profiles import PROFILES, EngineProfile
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
HIGH: Final = replace(MEDIUM, rate_rps=24)
QUICK: Final = replace(MEDIUM, duration_s=15)
SIMULATED_BOUNDS: Final = Bounds(share=0.10, points=3)
TINY_LOW: Final = Load(2, 40, shared_tokens=512, own_tokens=300, output_tokens=40)
TINY_MEDIUM: Final = replace(TINY_LOW, rate_rps=6)
TINY_SPARSE: Final = replace(TINY_LOW, rate_rps=1, duration_s=60, output_tokens=10)
"""So little that a prompt is seldom computed while the other engine decodes: the simulator knows
nothing of cores that engines share."""
TINY_QUICK: Final = replace(TINY_MEDIUM, duration_s=15)
TINY_BOUNDS: Final = Bounds(share=0.20, points=3)


def compared(
    scenario: Scenario, load: Load, hops: Hops, bounds: Bounds, runs: int, prioritised: bool
) -> str:
    """Markdown: one scenario under one load."""
    pairs, lives, shares = [], [], []
    for seed in range(1, runs + 1):
        requests = load.requests(seed)
        live = run_live(scenario, requests, prioritised)
        simulated, reasons = run_simulated(scenario, hops, requests, seed)
        pairs.append(Pair(live.seen, simulated))
        lives.append(live)
        shares.append(split_share(reasons))
    measures = compared_table(compare(pairs, bounds))
    return "\n".join([f"### {load.name}\n", measures, conditions(lives, shares)])


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


def simulated_engines(runs: int, quick: bool, prioritised: bool) -> Iterator[str]:
    """Parts of the report, as they are known."""
    yield f"## {SIMULATED.name}"
    prompt_tokens = MEDIUM.shared_tokens + MEDIUM.own_tokens
    hops = measure_hops(SIMULATED, prompt_tokens, prioritised)
    yield hops_table(hops, prompt_tokens)
    for load in (QUICK,) if quick else (MEDIUM, HIGH):
        yield compared(SIMULATED, load, hops, SIMULATED_BOUNDS, runs, prioritised)


def real_engines(runs: int, quick: bool, prioritised: bool) -> Iterator[str]:
    """Likewise."""
    yield "## The tiny model on this machine's CPU, real vLLM engines"
    prompt_tokens = TINY_LOW.shared_tokens + TINY_LOW.own_tokens
    hops = measure_hops(SIMULATED, prompt_tokens, prioritised)
    yield hops_table(hops, prompt_tokens)
    for prefill in (0, 1):
        engine = engine_steps.measure(hops.link_s, prefill)
        found = fit(engine)
        # Of every request, though not every one comes to an engine that has idled.
        woken = hops._replace(front_in_s=hops.front_in_s + found.wake_s)
        with tempfile.TemporaryDirectory(prefix="baton-bench-") as directory:
            file = Path(directory) / "profile.yaml"
            file.write_text(yaml.safe_dump(asdict(found.profile.timing(engine.block_tokens))))
            scenario = tiny_scenario(found.profile, engine.block_tokens, file, prefill)
            yield f"## {scenario.name}"
            yield fit_report(engine, found)
            loads = [TINY_SPARSE] if scenario.always_split else []
            for load in [TINY_QUICK] if quick else [*loads, TINY_LOW, TINY_MEDIUM]:
                yield compared(scenario, load, woken, TINY_BOUNDS, runs, prioritised=False)


def tiny_scenario(profile: EngineProfile, block_tokens: int, file: Path, prefill: int) -> Scenario:
    """One worker for all, or every request handed over."""
    name = "1 worker for both, real vLLM"
    if prefill:
        name = "1 prefill and 1 decode worker, real vLLM, every request handed over"
    layout = Layout(profile, prefill=prefill, decode=1, block_tokens=block_tokens)
    return Scenario(name, layout, engine="vllm", profile_file=file, always_split=bool(prefill))


PARTS: Final = {"simulated": simulated_engines, "vllm": real_engines}


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
