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
import math
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Final

from benchmarks import shared_files
from benchmarks.goodput_store import Store, code_digest
from benchmarks.report import table
from benchmarks.workloads import WORKLOADS
from engine.base import NOTHING_PLACED, NOTHING_QUEUED
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
        worker.others, worker.queued_beside = NOTHING_PLACED, NOTHING_QUEUED
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
            ARMS[cell.arm](each.rng.randrange, each.engines, workload.slo) for each in setups
        ]
        measured = serve(layout, placements, workload.slo, requests, allowed).measured
        return measured.requests - measured.good <= allowed

    return highest_rate(serves, start_rps, LEAST_RPS, PRECISION)


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
    """Of the table: mean goodput where all seeds are known, and how it is beside one router's."""
    for case in CASES:
        known: dict[tuple[int, str], list[float]] = {}
        for cell in cells(case, given):
            if (found := store.found(cell)) is not None:
                known.setdefault((cell.routers, cell.arm), []).append(found["goodput_rps"])
        means = {
            group: statistics.mean(goodputs)
            for group, goodputs in known.items()
            if len(goodputs) == given.seeds
        }
        one = means.get((1, "told"))
        if one is None:
            continue
        prefill = case.prefill * given.engines // ENGINES
        for arm in ARMS:
            several = [_beside(one, means.get((routers, arm))) for routers in ROUTERS[1:]]
            split = f"{prefill} + {given.engines - prefill}"
            yield f"{case.workload}, {split}", arm, f"{one:.3g}", *several


def _beside(one: float, mean: float | None) -> str:
    return "" if mean is None else f"{mean:.3g} ({mean / one - 1:+.1%})"


def main() -> None:
    """Entry point."""
    parser = shared_files.parser(__doc__)
    parser.add_argument(
        "--store", type=Path, default=Path("benchmarks/results/several-routers.jsonl")
    )
    parser.add_argument("--engines", type=int, default=ENGINES, choices=(8, 16, 32))
    parser.add_argument("--requests", type=int, default=4000, help="of each cut")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--report", action="store_true", help="only print what is there")
    names = list(dict.fromkeys(case.workload for case in CASES))
    parser.add_argument("--workloads", nargs="+", default=names, choices=names)
    given = parser.parse_args()
    store = Store(given.store, Cell)
    todo = [
        (cell, case.start_rps * given.engines / ENGINES)
        for case in CASES
        if case.workload in given.workloads
        for cell in cells(case, given)
        if store.found(cell) is None
    ]
    for cell, start_rps in [] if given.report else todo:
        with shared_files.needed():
            goodput_rps = search(cell, given.shared, start_rps)
        store.add(cell, {"goodput_rps": goodput_rps})
        print(f"{cell}: {goodput_rps:.2f}/s", file=sys.stderr, flush=True)
    heads = ("workload, prefill + decode", "routers", *map(str, ROUTERS))
    print(table(heads, rows(store, given)))


if __name__ == "__main__":
    main()
