"""Goodput of Baton's placement beside its peers': `python -m benchmarks.goodput [--report]`.

For each workload and policy on a simulated cluster: the highest rate at which 90 % (and 99 %) of
requests meet both SLOs. Each policy, Baton's too, first gets the split into prefill and decode
workers that serves it best, of those in PREFILL or `--prefill`, by the first seed and coarsely;
with that it is searched finely. A seed after the first begins where the first ended.

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
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, NamedTuple

from benchmarks import shared_files
from benchmarks.goodput_store import Cell, Store, code_digest
from benchmarks.report import table
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
COARSE: Final = 0.1
FINE: Final = 0.03


def search(cell: Cell, shared: Path, start_rps: float) -> tuple[float, list[dict[str, Any]]]:
    """The goodput of a cell, in requests per second, and the evaluations that it took."""
    profile, slower, _ = MODELS[cell.model]
    workload = WORKLOADS[cell.workload]
    if cell.requests:
        workload = replace(workload, most_requests=cell.requests)
    slo = Slo(workload.slo.ttft_s * slower, workload.slo.tpot_s * slower)
    layout = Layout(PROFILES[profile], cell.prefill, ENGINES - cell.prefill, BLOCK_TOKENS)
    made: list[dict[str, Any]] = []
    known: dict[float, bool] = {}

    def serves(rate_rps: float) -> bool:
        rate_rps = float(f"{rate_rps:.4g}")
        if rate_rps not in known:
            requests = list(workload.requests(shared, rate_rps, cell.seed))
            allowed = math.floor(len(requests) * (1 - cell.share) + 1e-9)
            outcome = run(layout, cell.policy, slo, requests, cell.seed, misses_allowed=allowed)
            missed = outcome.measured.requests - outcome.measured.good
            known[rate_rps] = missed <= allowed
            made.append(_told(rate_rps, len(requests), missed, outcome, known[rate_rps]))
        return known[rate_rps]

    return highest_rate(serves, start_rps, LEAST_RPS, cell.precision), made


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

    seeds: int
    splits: Sequence[int] = PREFILL
    requests: int = 0
    """Of a cut; 0: as many as the workload says."""


def coarse_cells(
    model: str, workload: str, policies: Iterable[str], share: float, wanted: Wanted
) -> Iterator[Cell]:
    """Which split is a policy's best?"""
    for policy in policies:
        for prefill in wanted.splits:
            cut = (COARSE, wanted.requests, code_digest())
            yield Cell(model, workload, policy, prefill, 0, share, *cut)


def best_split(
    store: Store, model: str, workload: str, policy: str, share: float, wanted: Wanted
) -> tuple[int, float] | None:
    """Prefill engines of the split that serves a policy best, and what it serves coarsely; None
    while not all are known, and if none serves anything."""
    found = {
        cell.prefill: goodput
        for cell in coarse_cells(model, workload, [policy], share, wanted)
        if (goodput := store.goodput(cell)) is not None
    }
    if len(found) < len(wanted.splits) or not any(found.values()):
        return None
    best = max(found, key=found.__getitem__)
    return best, found[best]


def fine_cells(
    store: Store, model: str, workload: str, policies: Iterable[str], wanted: Wanted
) -> Iterator[tuple[Cell, float]]:
    """Searches with the best split, and where each begins; of the first seed alone while that is
    not known."""
    for policy in policies:
        for share in SHARES:
            best = best_split(store, model, workload, policy, share, wanted)
            if best is None:
                continue
            prefill, coarse_rps = best
            cut = (share, FINE, wanted.requests, code_digest())
            first = Cell(model, workload, policy, prefill, 0, *cut)
            yield first, coarse_rps
            if (first_rps := store.goodput(first)) is not None:
                for seed in range(1, wanted.seeds):
                    yield replace(first, seed=seed), first_rps or coarse_rps


def work(store: Store, cells: list[tuple[Cell, float]], shared: Path, jobs: int) -> None:
    """Make the searches that are not made, and keep each as it ends."""
    todo = [(cell, start) for cell, start in cells if store.goodput(cell) is None]
    with ProcessPoolExecutor(jobs) as pool:
        futures = {pool.submit(search, cell, shared, start_rps): cell for cell, start_rps in todo}
        failed = None
        for future in as_completed(futures):
            cell = futures[future]
            if (error := future.exception()) is not None:
                failed = error  # Raised once what the others found is kept.
                continue
            goodput_rps, made = future.result()
            store.add(cell, goodput_rps, made)
            print(f"{cell}: {goodput_rps:.2f}/s in {len(made)} runs", file=sys.stderr, flush=True)
        if failed is not None:
            raise failed


def report(store: Store, wanted: Wanted) -> str:
    """Tables, one for each model and share: rows are workloads, and how Baton compares."""
    parts = []
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


def _rows(
    store: Store, model: str, share: float, gpus: int, wanted: Wanted
) -> Iterator[tuple[str, dict[str, str]]]:
    for workload in WORKLOADS:
        texts: dict[str, str] = {}
        by_seed: dict[str, dict[int, float]] = {}
        for policy in POLICIES:
            found: dict[int, float] = {}
            for cell, _ in fine_cells(store, model, workload, [policy], wanted):
                if cell.share == share and (goodput := store.goodput(cell)) is not None:
                    found[cell.seed] = goodput / gpus
                    prefill = cell.prefill
            if found:
                by_seed[policy] = found
                texts[policy] = f"{_interval(list(found.values()))} ({prefill})"
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


_T_95: Final = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78}
"""Student's t for a 95 % interval, by the number of seeds."""


def _interval(values: list[float]) -> str:
    mean = statistics.mean(values)
    if len(values) < 2:
        return f"{mean:.3g}"
    half = _T_95[len(values)] * statistics.stdev(values) / math.sqrt(len(values))
    return f"{mean:.3g} ± {half:.2g}"


def work_all(store: Store, given: argparse.Namespace, wanted: Wanted) -> None:
    """All that was asked for and is not there yet: each round tells what the next refines."""
    for model in given.models:
        coarse = [
            (cell, WORKLOADS[workload].start_rps * MODELS[model][2])
            for workload in given.workloads
            for share in SHARES
            for cell in coarse_cells(model, workload, given.policies, share, wanted)
        ]
        work(store, coarse, given.shared, given.jobs)
        for _ in ("the first seed", "the others"):
            fine = [
                each
                for workload in given.workloads
                for each in fine_cells(store, model, workload, given.policies, wanted)
            ]
            work(store, fine, given.shared, given.jobs)


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
    parser.add_argument("--prefill", type=int, nargs="+", default=PREFILL, choices=PREFILL)
    parser.add_argument("--seeds", type=int, default=2, choices=range(1, 6))
    parser.add_argument("--requests", type=int, default=0, help="of each cut, else its own number")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--report", action="store_true", help="only print what is there")
    given = parser.parse_args()
    store = Store(given.store)
    wanted = Wanted(given.seeds, given.prefill, given.requests)
    if not given.report:
        with shared_files.needed():
            work_all(store, given, wanted)
    print(report(store, wanted))


if __name__ == "__main__":
    main()
