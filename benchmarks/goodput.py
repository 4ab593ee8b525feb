"""Goodput of Baton's placement beside its peers': `python -m benchmarks.goodput [--report]`.

For each workload and policy on a simulated cluster: the highest rate at which 90 % (and 99 %) of
requests meet both SLOs, with the split into prefill and decode workers that serves the policy best:
with the first seed each of PREFILL is tried, and one that does not serve more than the best before
it is given up at once. Later seeds keep that split, and begin where the first ended.

Every search is appended to `--store` (default benchmarks/results/goodput.jsonl) and never made
twice by the same code, so the run can be broken off at any time and goes on where it was.
`--report` prints the tables of what is there. Virtual time: other load on the machine changes
nothing but the duration.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, Final, NamedTuple

from benchmarks import shared_files
from benchmarks.goodput_store import Cell, Store, code_digest
from benchmarks.report import interval, table
from benchmarks.workloads import LARGE, WORKLOADS
from engine.profiles import PROFILES
from router.core.costs import Slo
from simulator.cluster import Layout
from simulator.experiment import OURS, POLICIES, Outcome, run
from simulator.goodput import highest_rate
from simulator.traces import BLOCK_TOKENS

MODELS: Final = {"8b": ("llama-3.1-8b-h100", 1.0, 1.0), "70b": ("llama-3.1-70b-h100x4", LARGE, 0.3)}
"""Profile, how much longer its SLOs are, and about how many times the 8B model's rate it serves."""
ENGINES: Final = 8
PREFILL: Final = (0, 3, 5)
"""Of the engines; 0: every engine does both."""
SHARES: Final = (0.9, 0.99)
LEAST_RPS: Final = 0.05
PRECISION: Final = 0.03
STRONGEST: Final = (OURS, "llmd_guide", "mooncake", "dynamo_kv")
MOST_SEEDS: Final = 5
"""Of the strongest."""
OTHERS_SEEDS: Final = 2


class Found(NamedTuple):
    """By a search."""

    prefill: int
    """Engines of the split that served most."""
    goodput_rps: float
    runs: list[dict[str, Any]]
    """In the order in which they were made."""
    cpu_s: float


class Search(NamedTuple):
    """A cell, and what is known of it."""

    cell: Cell
    splits: Sequence[int]
    """To be tried, the likeliest first."""
    start_rps: float


def search(wanted: Search, shared: Path) -> Found:
    """The goodput of a cell, in requests per second, with the best of these splits."""
    cell, splits, best_rps = wanted
    began_s = time.process_time()
    profile, slower, _ = MODELS[cell.model]
    workload = WORKLOADS[cell.workload]
    if cell.requests:
        workload = replace(workload, most_requests=cell.requests)
    slo = Slo(workload.slo.ttft_s * slower, workload.slo.tpot_s * slower)
    made: list[dict[str, Any]] = []

    def served(prefill: int, rate_rps: float) -> bool:
        layout = Layout(PROFILES[profile], prefill, ENGINES - prefill, BLOCK_TOKENS)
        requests = list(workload.requests(shared, rate_rps, cell.seed))
        allowed = math.floor(len(requests) * (1 - cell.share) + 1e-9)
        outcome = run(layout, cell.policy, slo, requests, cell.seed, misses_allowed=allowed)
        missed = outcome.measured.requests - outcome.measured.good
        told = _told(rate_rps, len(requests), missed, outcome, missed <= allowed)
        made.append({"prefill": prefill, **told})
        return missed <= allowed

    best = None
    for prefill in splits:
        serves = _remembering(partial(served, prefill))
        if best is None:
            best, best_rps = prefill, highest_rate(serves, best_rps, LEAST_RPS, PRECISION)
        elif serves(more_rps := max(best_rps, LEAST_RPS) * (1 + PRECISION)):
            best, best_rps = prefill, highest_rate(serves, more_rps, LEAST_RPS, PRECISION)
    assert best is not None, "no split to try"
    return Found(best, best_rps, made, time.process_time() - began_s)


def _remembering(served: Callable[[float], bool]) -> Callable[[float], bool]:
    known: dict[float, bool] = {}

    def serves(rate_rps: float) -> bool:
        rate_rps = float(f"{rate_rps:.4g}")
        if rate_rps not in known:
            known[rate_rps] = served(rate_rps)
        return known[rate_rps]

    return serves


def _told(
    rate_rps: float, requests: int, missed: int, outcome: Outcome, served: bool
) -> dict[str, Any]:
    told: dict[str, Any] = {"rate_rps": rate_rps, "requests": requests, "missed": missed}
    if served:  # A run that missed too many was left before its end.
        measured = outcome.measured
        told |= {
            "lasted_s": round(outcome.duration_s, 1),
            "hit_rate": round(outcome.hit_rate, 4),
            "busy": round(statistics.mean(outcome.busy.values()), 3),
            "ttft_mean_s": round(measured.ttft.mean_s, 4),
            "ttft_p99_s": round(measured.ttft.quantile_s(0.99), 4),
            "tpot_mean_s": round(measured.tpot.mean_s, 5),
            "tpot_p99_s": round(measured.tpot.quantile_s(0.99), 5),
        }
    return told


class Wanted(NamedTuple):
    """What is searched, of every policy and workload."""

    seeds: int = MOST_SEEDS
    """At most; `OTHERS_SEEDS` are enough for all but the strongest."""
    requests: int = 0
    """Of a cut; 0: as many as the workload says."""


def searches(
    store: Store, model: str, workload: str, policy: str, wanted: Wanted
) -> Iterator[Search]:
    """All that what is in the store allows: seeds follow the first of their share, and shares the
    one before."""
    splits: Sequence[int] = PREFILL
    start_rps = WORKLOADS[workload].start_rps * MODELS[model][2]
    seeds = wanted.seeds if policy in STRONGEST else min(wanted.seeds, OTHERS_SEEDS)
    for share in SHARES:
        first = Cell(model, workload, policy, 0, share, wanted.requests, code_digest())
        yield Search(first, splits, start_rps)
        if (found := store.found(first)) is None:
            return
        best = found["prefill"]
        start_rps = found["goodput_rps"] or start_rps
        for seed in range(1, seeds):
            yield Search(replace(first, seed=seed), (best,), start_rps)
        splits = sorted(PREFILL, key=lambda prefill: prefill != best)


def work(store: Store, wanted: Iterable[Search], shared: Path, jobs: int) -> bool:
    """Make the searches that are not made, and keep each as it ends; were there any?"""
    todo = [each for each in wanted if store.found(each.cell) is None]
    with ProcessPoolExecutor(jobs) as pool:
        futures = {pool.submit(search, each, shared): each.cell for each in todo}
        failed = None
        for future in as_completed(futures):
            cell = futures[future]
            if (error := future.exception()) is not None:
                failed = error  # Raised once what the others found is kept.
                continue
            found = future.result()
            store.add(cell, found._asdict())
            print(f"{cell}: {found.goodput_rps:.2f}/s with {found.prefill}", file=sys.stderr)
        if failed is not None:
            raise failed
    return bool(todo)


def report(store: Store, wanted: Wanted) -> str:
    """Tables, one for each model and share: columns are workloads; the last row tells how Baton
    compares with each peer's, over the seeds that both were searched with."""
    parts = [f"Searched for {_cpu_s(store, wanted) / 3600:.1f} core-hours.\n\n"]
    for model, (profile, *_) in MODELS.items():
        gpus = ENGINES * PROFILES[profile].gpus
        for share in SHARES:
            rows = list(_rows(store, model, share, gpus, wanted))
            if rows:
                head = ("policy", *[row[0] for row in rows])
                body = [
                    (name, *[row[1].get(name, "") for row in rows])
                    for name in (*POLICIES, "baton over the best peer")
                    if any(name in row[1] for row in rows)
                ]
                title = f"{profile}, {gpus} GPUs, {share:.0%} of requests within both SLOs"
                parts.append(f"{title}: requests/s per GPU (prefill engines of {ENGINES})\n\n")
                parts.append(table(head, body) + "\n")
    return "".join(parts)


def _cpu_s(store: Store, wanted: Wanted) -> float:
    """That the searches of a report took."""
    return math.fsum(
        found.get("cpu_s", 0.0)
        for each in product(MODELS, WORKLOADS, POLICIES)
        for cell, *_ in searches(store, *each, wanted)
        if (found := store.found(cell)) is not None
    )


def _rows(
    store: Store, model: str, share: float, gpus: int, wanted: Wanted
) -> Iterator[tuple[str, dict[str, str]]]:
    for workload in WORKLOADS:
        texts: dict[str, str] = {}
        by_seed: dict[str, dict[int, float]] = {}
        for policy in POLICIES:
            found: dict[int, float] = {}
            for cell, *_ in searches(store, model, workload, policy, wanted):
                if cell.share == share and (made := store.found(cell)) is not None:
                    found[cell.seed] = made["goodput_rps"] / gpus
                    prefill = made["prefill"]
            if found:
                by_seed[policy] = found
                texts[policy] = f"{interval(list(found.values()))} ({prefill})"
        ours = by_seed.pop(OURS, {})
        ratios = [_ratio(ours, peer) for peer in by_seed.values() if ours.keys() & peer.keys()]
        if ratios:
            texts["baton over the best peer"] = f"{min(ratios):.2f}"
        if texts:
            yield workload, texts


def _ratio(ours: dict[int, float], peer: dict[int, float]) -> float:
    """Of means over the seeds that both were searched with."""
    seeds = ours.keys() & peer.keys()
    theirs = sum(peer[seed] for seed in seeds)
    return sum(ours[seed] for seed in seeds) / theirs if theirs else math.inf


def work_all(store: Store, given: argparse.Namespace, wanted: Wanted) -> None:
    """All that was asked for and is not there yet: each round allows the next."""
    for model in given.models:
        while work(
            store,
            [
                each
                for workload in given.workloads
                for policy in given.policies
                for each in searches(store, model, workload, policy, wanted)
            ],
            given.shared,
            given.jobs,
        ):
            pass


def _some_of(known: Collection[str]) -> Callable[[str], list[str]]:
    def names(text: str) -> list[str]:
        wanted = text.split(",")
        for name in wanted:
            if name not in known:
                raise argparse.ArgumentTypeError(f"no {name!r}; there are {', '.join(known)}")
        return wanted

    return names


def main() -> None:
    """Entry point."""
    parser = shared_files.parser(__doc__)
    parser.add_argument("--store", type=Path, default=Path("benchmarks/results/goodput.jsonl"))
    for what, known in (("models", MODELS), ("workloads", WORKLOADS), ("policies", POLICIES)):
        parser.add_argument(f"--{what}", type=_some_of(known), default=",".join(known))
    parser.add_argument("--seeds", type=int, default=MOST_SEEDS, choices=range(1, 6))
    parser.add_argument("--requests", type=int, default=0, help="of each cut, else its own number")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--report", action="store_true", help="only print what is there")
    given = parser.parse_args()
    store = Store(given.store)
    wanted = Wanted(given.seeds, given.requests)
    if not given.report:
        with shared_files.needed():
            work_all(store, given, wanted)
    print(report(store, wanted))


if __name__ == "__main__":
    main()
