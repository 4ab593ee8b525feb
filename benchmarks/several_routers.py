"""Goodput with several routers before the same workers: `python -m benchmarks.several_routers`.

Llama-3.1-8B on 8 simulated H100s (`--engines` for more, at as much more load). For each workload,
split and number of routers: the highest rate at which 90 % of requests meet both SLOs, and what is
served as promised at the rate that is one router's. Each request goes to a router that chance
picks. `told`: workers tell each router what the others have there, and what waits at them. `alone`:
the same policy, and all that routers hear of each other is how many requests an engine runs, and
what others learned of their predictions; it shows what the telling is worth.

Every search is appended to `--store` and not made twice by the same code, so the run can be broken
off at any time and goes on where it was; `--report` prints the table of what is there. Virtual
time: other load on the machine changes nothing but the duration.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Final, NamedTuple

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
from simulator.measure import Measurement

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
    Case("mooncake_conversation", 5, 14.0),
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


class Found(NamedTuple):
    """By a search."""

    goodput_rps: float
    good: float
    """At the rate that is one router's goodput: the share of all that is served as promised."""
    late: float
    """There, of those that were let in."""


def search(cell: Cell, shared: Path, start_rps: float) -> float:
    """The goodput, in requests per second."""

    def serves(rate_rps: float) -> bool:
        return served(cell, shared, rate_rps, 1 - SHARE).attainment >= SHARE

    return highest_rate(serves, start_rps, LEAST_RPS, PRECISION)


def served(cell: Cell, shared: Path, rate_rps: float, may_miss: float = 1.0) -> Measurement:
    """What becomes of a cut at this rate; left once it missed more than this share of it."""
    workload = WORKLOADS[cell.workload]
    layout = Layout(PROFILE, cell.prefill, cell.engines - cell.prefill)
    requests = list(islice(workload.requests(shared, rate_rps, cell.seed), cell.requests))
    allowed = math.floor(len(requests) * may_miss + 1e-9)
    setups = [setup_of(layout, cell.seed, router) for router in range(cell.routers)]
    placements = [ARMS[cell.arm](each.rng.randrange, each.engines, workload.slo) for each in setups]
    return serve(layout, placements, workload.slo, requests, allowed).measured


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


def rows(
    store: Store, given: argparse.Namespace, told: Callable[[Found, Found], str]
) -> Iterator[tuple[str, ...]]:
    """Of a table: where all seeds are known, their means, told beside one router's."""
    for case in CASES:
        known: dict[tuple[int, str], list[Found]] = {}
        for cell in cells(case, given):
            if (found := store.found(cell)) is not None:
                known.setdefault((cell.routers, cell.arm), []).append(Found(**found))
        means = {
            group: Found(*map(statistics.mean, zip(*found, strict=True)))
            for group, found in known.items()
            if len(found) == given.seeds
        }
        one = means.get((1, "told"))
        if one is None:
            continue
        prefill = case.prefill * given.engines // ENGINES
        for arm in ARMS:
            several = (means.get((routers, arm)) for routers in ROUTERS[1:])
            split = f"{prefill} + {given.engines - prefill}"
            yield (
                f"{case.workload}, {split}", arm, told(one, one),
                *("" if mean is None else told(mean, one) for mean in several),
            )  # fmt: skip


def goodput(mean: Found, one: Found) -> str:
    """Requests per second, and how that is beside one router's."""
    beside = "" if mean is one else f" ({mean.goodput_rps / one.goodput_rps - 1:+.1%})"
    return f"{mean.goodput_rps:.3g}{beside}"


def shares(mean: Found, one: Found) -> str:
    """Served as promised, and late of what was let in."""
    return f"{mean.good:.1%} ({mean.late:.1%})"


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
        one = store.found(replace(cell, routers=1, arm="told"))
        with shared_files.needed():
            goodput_rps = search(cell, given.shared, start_rps)
            # One router is searched first.
            at_rps = goodput_rps if one is None else one["goodput_rps"]
            measured = served(cell, given.shared, at_rps)
        found = Found(goodput_rps, measured.attainment, measured.late)
        store.add(cell, found._asdict())
        print(f"{cell}: {found}", file=sys.stderr, flush=True)
    heads = ("workload, prefill + decode", "routers", *map(str, ROUTERS))
    for told in (goodput, shares):
        print(table(heads, rows(store, given, told)), end="\n\n")


if __name__ == "__main__":
    main()
