"""What the front door carries and costs: `python -m benchmarks.front_door`.

The whole chain of `baton serve` on this machine, with engines that compute nothing: edge, ticket,
fast front, anchor, router process, workers whose simulated engines step every millisecond. Two
topologies: aggregated (two decode workers serve requests whole) and P/D (one prefill and one decode
worker, every request handed over). Each round starts each topology anew and sends it every load;
the figures are medians over the rounds with their spread. Prints Markdown.
`--profile` tells instead where router and anchor spend their time under the first load.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from benchmarks import profiles
from benchmarks.load import Load, LoadClient
from benchmarks.measure import Figure, cpu_table, measure
from benchmarks.report import machine, spread, table
from benchmarks.serving import Serving, serving
from cluster.model import TINY_NAME, tiny_directory
from engine.tiny_model import build

BUSY: Final = Load(concurrency=256, prompt_tokens=128, output_tokens=32, requests=6000)
LONG: Final = Load(concurrency=64, prompt_tokens=4096, output_tokens=32, requests=1500)
ALONE: Final = Load(concurrency=1, prompt_tokens=128, output_tokens=32, requests=150)
SOME: Final = Load(concurrency=64, prompt_tokens=128, output_tokens=32, requests=3000)
LOADS: Final = {"busy": BUSY, "long": LONG, "alone": ALONE, "some": SOME}
QUICK_LOADS: Final = (
    Load(concurrency=32, prompt_tokens=128, output_tokens=32, requests=200),
    Load(concurrency=1, prompt_tokens=128, output_tokens=32, requests=20),
)
GOALS: Final = {
    BUSY: "≥ 2,000 requests/s",
    LONG: "≥ 900 requests/s",
    ALONE: "TTFT p50 ≤ 2.5 ms",
}

AGGREGATED: Final = "aggregated"
DISAGGREGATED: Final = "P/D"
WORKERS: Final = {AGGREGATED: (0, 2), DISAGGREGATED: (1, 1)}
"""Of each topology: prefill and decode workers."""


class Bench:
    """Rounds over topologies and loads, and what they gave."""

    def __init__(
        self, topologies: Sequence[str], loads: Sequence[Load], client: LoadClient
    ) -> None:
        self._topologies = topologies
        self._loads = loads
        self._client = client
        self.figures: dict[tuple[str, Load], list[Figure]] = {}
        self._link_bytes: dict[tuple[str, Load], dict[str, float]] = {}
        """Per request, of the last round; by link and direction."""

    def round(self, number: int) -> None:
        """Every topology, anew, with every load."""
        for topology in self._topologies:
            with serving(configuration(topology)) as baton:
                for index, load in enumerate(self._loads):
                    self._client.warm_up(baton.port, load)
                    seed = number * len(self._loads) + index
                    figure = self._measure(baton, topology, load, seed)
                    self.figures.setdefault((topology, load), []).append(figure)

    def _measure(self, baton: Serving, topology: str, load: Load, seed: int) -> Figure:
        before = baton.metric("baton_handoffs_total")
        bytes_before = baton.link_bytes()
        figure = measure(self._client, baton.port, baton.groups, load, seed)
        handed_over = baton.metric("baton_handoffs_total") - before
        self._link_bytes[topology, load] = {
            link: (count - bytes_before.get(link, 0.0)) / load.requests
            for link, count in baton.link_bytes().items()
        }
        if handed_over != (load.requests if topology == DISAGGREGATED else 0):
            raise RuntimeError(f"{topology}: {handed_over:.0f} of {load.requests} handed over")
        return figure

    def report(self) -> str:
        """Markdown."""
        columns = {
            f"{topology}, {load.name}": figures
            for (topology, load), figures in self.figures.items()
        }
        return "\n".join([machine(), "", self._results(), cpu_table(columns), self._bytes_table()])

    def _bytes_table(self) -> str:
        links = dict.fromkeys(link for counts in self._link_bytes.values() for link in counts)
        rows = [
            (link, *(f"{counts[link]:,.0f}" for counts in self._link_bytes.values()))
            for link in links
        ]
        columns = [f"{topology}, {load.name}" for topology, load in self._link_bytes]
        return table(("bytes per request, last round", *columns), rows)

    def _results(self) -> str:
        rows = []
        for (topology, load), figures in self.figures.items():
            results = [figure.result for figure in figures]
            rows.append(
                (
                    topology,
                    load.name,
                    spread([result.requests_per_s for result in results], 0),
                    spread([result.ttft_p50_ms for result in results], 2),
                    spread([result.ttft_p99_ms for result in results], 2),
                    spread([result.whole_p50_ms for result in results]),
                    GOALS.get(load, "") if topology == AGGREGATED else "",
                )
            )
        headings = ("topology", "load", "requests/s", "TTFT p50, ms", "TTFT p99, ms")
        return table((*headings, "whole p50, ms", "goal"), rows)


def configuration(topology: str) -> dict[str, Any]:
    """Of an instance whose engines take a millisecond a step, whatever is in it."""
    prefill, decode = WORKERS[topology]
    return {
        "engine": "simulated",
        "prefill": {"replicas": prefill},
        "decode": {"replicas": decode},
        # Every request is handed over, whatever its length.
        "router": {"policy": "least_predicted_work", "local_prefill_max_tokens": 0},
        # What bounds a real engine must not bound this one.
        "engine_args": {
            "block_size": 128,
            "num_gpu_blocks_override": 16_384,
            "max_model_len": 8192,
            "max_num_seqs": 1024,
            "max_num_batched_tokens": 1 << 20,
        },
        "simulated": {
            "step_base_s": 0.001,
            "prefill_token_s": 0.0,
            "decode_request_s": 0.0,
            "transfer_block_s": 0.0,
        },
    }


def profile(topology: str, load: Load, client: LoadClient, samples: Path) -> Iterator[str]:
    """Router and anchor one after the other, so that neither's sampling burdens the other."""
    yield f"{topology}, {load.name}\n"
    with serving(configuration(topology), profiles.environment(samples)) as baton:
        client.warm_up(baton.port, load)
        for seed, name in enumerate(profiles.MODULES):
            running = profiles.Profile(name, baton.groups[name][0], samples)
            client.run(baton.port, load, seed)
            yield running.end(load.requests)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="one round of short loads")
    parser.add_argument("--topologies", nargs="+", choices=WORKERS, default=list(WORKERS))
    parser.add_argument("--loads", nargs="+", choices=LOADS, default=list(LOADS))
    parser.add_argument("--profile", action="store_true", help="where router and anchor spend it")
    parser.add_argument("--output", type=Path, help="also write the report to this file")
    arguments = parser.parse_args()
    loads = QUICK_LOADS if arguments.quick else [LOADS[name] for name in arguments.loads]
    model = build(tiny_directory())
    with tempfile.TemporaryDirectory(prefix="baton-bench-") as name:
        client = LoadClient(TINY_NAME, model, Path(name))
        if arguments.profile:
            text = "\n".join(profile(arguments.topologies[0], loads[0], client, Path(name)))
        else:
            bench = Bench(arguments.topologies, loads, client)
            for number in range(1 if arguments.quick else arguments.rounds):
                bench.round(number)
            text = bench.report()
    print(text)
    if arguments.output:
        arguments.output.write_text(text)


if __name__ == "__main__":
    main()
