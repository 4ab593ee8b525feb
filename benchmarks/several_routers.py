"""Goodput with several routers before the same workers: `python -m benchmarks.several_routers`.

Llama-3.1-8B on 8 simulated H100s (`--engines` for more, at as much more load). For each workload,
split and number of routers: the highest rate at which 90 % of requests meet both SLOs. Each request
goes to a router that chance picks. `told`: workers tell each router what the others have there.
`alone`: the same policy, and routers do not hear it, but for how many requests an engine runs; it
shows what the telling is worth.

Every search is appended to `--store` and not made twice by the same code, so the run can be broken
off at any time and goes on where it was; `--report` prints the table of what is there. Virtual
time: other load on the machine changes nothing but the duration.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Final

from benchmarks.goodput import code_digest
from benchmarks.report import table
from benchmarks.workloads import WORKLOADS
from engine.base import NOTHING_PLACED
from engine.profiles import PROFILES
from router.core.joint import JointPlacement
from router.core.workers import Worker
from simulator.cluster import Layout
from simulator.experiment import serve, setup_of
from simulator.goodput import highest_rate

PROFILE: Final = PROFILES["llama-3.1-8b-h100"]
ENGINES: Final = 8
ROUTERS: Final = (1, 2, 4, 8)
SHARE: Final = 0.9
PRECISION: Final = 0.03
LEAST_RPS: Final = 0.5


class Alone(JointPlacement):
    """Hears nothing of what other routers have on a worker."""

    def stepped(self, now_s: float, worker: Worker) -> None:
        """Without it."""
        worker.others = NOTHING_PLACED
        super().stepped(now_s, worker)


ARMS: Final = {"told": JointPlacement, "alone": Alone}


@dataclass(frozen=True, slots=True)
class Case:
    """Where routers are compared."""

    workload: str
    prefill: int
    """Of the engines, those that only compute prompts."""
    start_rps: float
    """Of 8 engines: where a search begins."""


CASES: Final = (
    Case("mooncake_conversation", 0, 13.0),
    Case("mooncake_conversation", 3, 15.0),
    Case("prefix-groups", 0, 55.0),
)


@dataclass(frozen=True, slots=True)
class Cell:
    """One search."""

    workload: str
    prefill: int
    engines: int
    routers: int
    arm: str
    seed: int
    requests: int
    """Of the cut."""
    code: str


def search(cell: Cell, shared: Path, start_rps: float) -> float:
    """The goodput, in requests per second."""
    workload = WORKLOADS[cell.workload]
    layout = Layout(PROFILE, cell.prefill, cell.engines - cell.prefill)

    def serves(rate_rps: float) -> bool:
        requests = list(islice(workload.requests(shared, rate_rps, cell.seed), cell.requests))
        allowed = math.floor(len(requests) * (1 - SHARE) + 1e-9)
        setups = [setup_of(layout, cell.seed, router) for router in range(cell.routers)]
        placements = [
            ARMS[cell.arm](each.rng.randrange, each.times, each.max_step_tokens, workload.slo)
            for each in setups
        ]
        measured = serve(layout, placements, workload.slo, requests, allowed).measured
        return measured.requests - measured.good <= allowed

    return highest_rate(serves, start_rps, LEAST_RPS, PRECISION)


class Store:
    """All searches so far, one to a line."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._found: dict[Cell, float] = {}
        for line in path.read_text().splitlines() if path.exists() else ():
            self._take(json.loads(line))

    def goodput(self, cell: Cell) -> float | None:
        """Requests per second, if the search is over."""
        return self._found.get(cell)

    def add(self, cell: Cell, goodput_rps: float) -> None:
        """A search is over."""
        line = {**asdict(cell), "goodput_rps": round(goodput_rps, 4)}
        with self._path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        self._take(line)

    def _take(self, line: dict[str, object]) -> None:
        goodput_rps = line.pop("goodput_rps")
        assert isinstance(goodput_rps, float)
        self._found[Cell(**line)] = goodput_rps  # type: ignore[arg-type]


def cells(case: Case, given: argparse.Namespace) -> Iterator[Cell]:
    """All numbers of routers, told and alone; one router has nobody to be told of."""
    prefill = case.prefill * given.engines // ENGINES
    for seed in range(given.seeds):
        for routers in ROUTERS:
            for arm in ARMS if routers > 1 else ("told",):
                yield Cell(
                    case.workload, prefill, given.engines, routers, arm, seed, given.requests,
                    code_digest(),
                )  # fmt: skip


def rows(store: Store, given: argparse.Namespace) -> Iterator[tuple[str, ...]]:
    """Of the table: goodput, and what of one router's is left."""
    for case in CASES:
        means: dict[tuple[int, str], float] = {}
        for cell in cells(case, given):
            found = [
                store.goodput(each)
                for each in cells(case, given)
                if (each.routers, each.arm) == (cell.routers, cell.arm)
            ]
            known = [each for each in found if each is not None]
            if len(known) == given.seeds:
                means[cell.routers, cell.arm] = statistics.mean(known)
        one = means.get((1, "told"))
        for arm in ARMS:
            texts = []
            for routers in ROUTERS:
                mean = one if routers == 1 else means.get((routers, arm))
                if mean is None or one is None:
                    texts.append("")
                else:
                    texts.append(
                        f"{mean:.3g} ({mean / one - 1:+.1%})" if routers > 1 else f"{mean:.3g}"
                    )
            if any(texts):
                prefill = case.prefill * given.engines // ENGINES
                yield f"{case.workload}, {prefill} + {given.engines - prefill}", arm, *texts


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--shared", type=Path, default=Path("../shared"))
    parser.add_argument(
        "--store", type=Path, default=Path("benchmarks/results/several-routers.jsonl")
    )
    parser.add_argument("--engines", type=int, default=ENGINES, choices=(8, 16, 32))
    parser.add_argument("--requests", type=int, default=4000, help="of each cut")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--most", type=int, help="searches; default: all that are missing")
    parser.add_argument("--report", action="store_true", help="only print what is there")
    names = list(dict.fromkeys(case.workload for case in CASES))
    parser.add_argument("--workloads", nargs="+", default=names, choices=names)
    given = parser.parse_args()
    store = Store(given.store)
    todo = [
        (cell, case.start_rps * given.engines / ENGINES)
        for case in CASES
        if case.workload in given.workloads
        for cell in cells(case, given)
        if store.goodput(cell) is None
    ]
    for cell, start_rps in [] if given.report else todo[: given.most]:
        goodput_rps = search(cell, given.shared, start_rps)
        store.add(cell, goodput_rps)
        print(f"{cell}: {goodput_rps:.2f}/s", file=sys.stderr, flush=True)
    heads = ("workload, prefill + decode", "routers hear of each other", *map(str, ROUTERS))
    print(table(heads, rows(store, given)))


if __name__ == "__main__":
    main()
