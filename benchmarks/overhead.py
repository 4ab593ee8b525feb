"""What Baton adds to vLLM: `python -m benchmarks.overhead`.

Four servers side by side on this machine with the tiny model and real engines: a plain vLLM API
server, once as it is shipped and once with its engine in one process, as Baton runs it; Baton
aggregated (one decode worker); Baton P/D (one prefill and one decode worker, every request handed
over). Targets refer to the quicker plain one, that with Baton's kind of engine. Each round sends
each of them the same requests, one at a time and then 16 at a time; only one server works at any
time, and what the idle ones use is told. Medians over the rounds with their spread, targets beside
them, and where a request's time goes. Prints Markdown.
All engines compute with one thread: with more, this model's small layers wait for each other.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median, quantiles
from typing import Any, Final, Protocol

from benchmarks.cpu import CpuMeter
from benchmarks.load import Load, LoadClient, LoadResult
from benchmarks.measure import BACKGROUND, Figure, cpu_table, measure
from benchmarks.plain import engine_environment, plain_server
from benchmarks.report import machine, spread, table
from benchmarks.serving import Serving, serving
from benchmarks.targets import AGGREGATED, DISAGGREGATED, PLAIN, SHIPPED, Summary, targets
from benchmarks.timeline import timelines
from cluster.model import TINY_NAME, tiny_directory
from engine.tiny_model import build

ALONE: Final = Load(concurrency=1, prompt_tokens=128, output_tokens=32, requests=60)
CROWD: Final = Load(concurrency=16, prompt_tokens=128, output_tokens=32, requests=320)
QUICK_LOADS: Final = (
    Load(concurrency=1, prompt_tokens=128, output_tokens=32, requests=5),
    Load(concurrency=16, prompt_tokens=128, output_tokens=32, requests=32),
)
TIMELINES: Final = 100
QUICK_TIMELINES: Final = 5
IDLE_S: Final = 5.0
QUICK_IDLE_S: Final = 1.0

WORKERS: Final = {AGGREGATED: (0, 1), DISAGGREGATED: (1, 1)}
"""Of each Baton: prefill and decode workers."""


def configuration(name: str, threads: int) -> dict[str, Any]:
    """Of one Baton."""
    prefill, decode = WORKERS[name]
    environment = engine_environment(threads)
    return {
        "prefill": {"replicas": prefill, "environment": environment},
        "decode": {"replicas": decode, "environment": environment},
        # Every request is handed over, whatever its length.
        "router": {"policy": "least_predicted_work", "local_prefill_max_tokens": 0},
    }


class Server(Protocol):
    """One of those compared."""

    @property
    def port(self) -> int:
        """Where it listens."""
        ...

    @property
    def groups(self) -> dict[str, list[int]]:
        """Process ids by what they do."""
        ...


class Bench:
    """Rounds over the servers, and what they gave."""

    def __init__(
        self, servers: Mapping[str, Server], client: LoadClient, alone: Load, crowd: Load
    ) -> None:
        self._servers = servers
        self._client = client
        self._alone = alone
        self._crowd = crowd
        self._figures: dict[tuple[str, Load], list[Figure]] = {}

    def warm_up(self) -> None:
        """Each server, with each load."""
        for server in self._servers.values():
            for load in (self._alone, self._crowd):
                self._client.warm_up(server.port, load)

    def round(self, number: int) -> None:
        """The same requests to each server, one after the other."""
        for index, load in enumerate((self._alone, self._crowd)):
            for name, server in self._servers.items():
                figure = self._measure(name, server, load, 2 * number + index)
                self._figures.setdefault((name, load), []).append(figure)

    def _measure(self, name: str, server: Server, load: Load, seed: int) -> Figure:
        before = _handoffs(server)
        figure = measure(self._client, server.port, server.groups, load, seed, detailed=True)
        handed_over = _handoffs(server) - before
        if handed_over != (load.requests if name == DISAGGREGATED else 0):
            raise RuntimeError(f"{name}: {handed_over:.0f} of {load.requests} handed over")
        return figure

    def report(self) -> str:
        """Markdown."""
        summaries = {name: self._summary(name) for name in self._servers}
        columns = {
            f"{name}, {load.name}": self._figures[name, load]
            for load in (self._alone, self._crowd)
            for name in self._servers
        }
        return "\n".join(
            [self._alone_table(), self._crowd_table(), targets(summaries), cpu_table(columns)]
        )

    def _results(self, name: str, load: Load) -> list[LoadResult]:
        return [figure.result for figure in self._figures[name, load]]

    def _summary(self, name: str) -> Summary:
        alone, crowd = self._results(name, self._alone), self._results(name, self._crowd)
        return Summary(
            ttft_ms=median(result.ttft_p50_ms for result in alone),
            second_token_ms=median(median(_first_gaps_ms(result)) for result in alone),
            token_ms=median(median(_gaps_ms(result)) for result in alone),
            whole_ms=median(result.whole_p50_ms for result in alone),
            requests_per_s=median(result.requests_per_s for result in crowd),
        )

    def _alone_table(self) -> str:
        rows = []
        for name in self._servers:
            runs = self._results(name, self._alone)
            rows.append(
                (
                    name,
                    spread([run.ttft_p50_ms for run in runs]),
                    spread([run.ttft_p99_ms for run in runs]),
                    spread([median(_first_gaps_ms(run)) for run in runs]),
                    spread([_p99(_first_gaps_ms(run)) for run in runs]),
                    spread([median(_gaps_ms(run)) for run in runs], 2),
                    spread([run.whole_p50_ms for run in runs]),
                )
            )
        headings = ("TTFT p50", "TTFT p99", "first gap p50", "first gap p99", "any gap p50")
        return table((f"{self._alone.name}: ms", *headings, "whole p50"), rows)

    def _crowd_table(self) -> str:
        rows = []
        for name in self._servers:
            runs = self._results(name, self._crowd)
            rows.append(
                (
                    name,
                    spread([run.requests_per_s for run in runs]),
                    spread([run.ttft_p50_ms for run in runs]),
                    spread([run.ttft_p99_ms for run in runs]),
                    spread([run.whole_p50_ms for run in runs]),
                )
            )
        headings = ("requests/s", "TTFT p50, ms", "TTFT p99, ms", "whole p50, ms")
        return table((self._crowd.name, *headings), rows)


def idle(servers: Mapping[str, Server], span_s: float) -> str:
    """What each uses while nothing is asked of any; Markdown."""
    meters = {
        name: CpuMeter(server.groups, may_end=[BACKGROUND]) for name, server in servers.items()
    }
    time.sleep(span_s)
    rows = []
    for name, meter in meters.items():
        use = meter.read()
        rows.append((name, f"{sum(use.cpu_s.values()) / use.span_s:.3f}"))
    return table(("idle", "cores"), rows)


@contextmanager
def all_servers(model: Path, threads: int, directory: Path) -> Iterator[dict[str, Server]]:
    """All at once; one after the other they would not meet the same machine."""
    with ExitStack() as stack:
        servers: dict[str, Server] = {}
        for name in (SHIPPED, PLAIN):
            log = directory / f"{name}.log"
            plain = plain_server(model, threads, log, as_shipped=name == SHIPPED)
            servers[name] = stack.enter_context(plain)
        for name in WORKERS:
            servers[name] = stack.enter_context(serving(configuration(name, threads)))
        yield servers


def where_it_goes(servers: Mapping[str, Server], requests: int) -> Iterator[str]:
    """The stages of single requests through each Baton."""
    for name, server in servers.items():
        if isinstance(server, Serving):
            stages = timelines(server, requests, ALONE.prompt_tokens, ALONE.output_tokens)
            yield f"Stages of a request alone, {name}:\n\n{stages}"


def _handoffs(server: Server) -> float:
    return server.metric("baton_handoffs_total") if isinstance(server, Serving) else 0.0


def _first_gaps_ms(result: LoadResult) -> list[float]:
    return [gaps[0] for gaps in result.gaps_ms]


def _gaps_ms(result: LoadResult) -> list[float]:
    """Between tokens: some servers send one more event, which only says that it is over."""
    return [gap for gaps in result.gaps_ms for gap in gaps[: ALONE.output_tokens - 1]]


def _p99(values: Sequence[float]) -> float:
    return quantiles(values, n=100, method="inclusive")[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="one round of short loads")
    parser.add_argument("--threads", type=int, default=1, help="of each engine; more is slower")
    parser.add_argument("--output", type=Path, help="also write the report to this file")
    arguments = parser.parse_args()
    quick: bool = arguments.quick
    model = build(tiny_directory())
    with tempfile.TemporaryDirectory(prefix="baton-bench-") as name:
        client = LoadClient(TINY_NAME, model, Path(name))
        with all_servers(model, arguments.threads, Path(name)) as servers:
            bench = Bench(servers, client, *(QUICK_LOADS if quick else (ALONE, CROWD)))
            bench.warm_up()
            parts = [machine(), "", idle(servers, QUICK_IDLE_S if quick else IDLE_S)]
            for number in range(1 if quick else arguments.rounds):
                bench.round(number)
            parts.append(bench.report())
            parts += where_it_goes(servers, QUICK_TIMELINES if quick else TIMELINES)
    text = "\n".join(parts)
    print(text)
    if arguments.output:
        arguments.output.write_text(text)


if __name__ == "__main__":
    main()
