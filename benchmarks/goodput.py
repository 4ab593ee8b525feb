"""Goodput of Baton's placement beside its peers': `python -m benchmarks.goodput [--report]`.

For each workload and policy on a simulated cluster: the highest rate at which 90 % (and 99 %) of
requests meet both SLOs. Each policy, Baton's too, first gets the split into prefill and decode
workers that serves it best, of those in PREFILL, by the first seed and at 90 %.

Every evaluation is appended to `--store` (default benchmarks/results/goodput.jsonl) and never made
twice, so the run can be broken off at any time and goes on where it was. `--report` prints the
tables of what is there. Virtual time: other load on the machine changes nothing but the duration.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from benchmarks.report import table
from benchmarks.workloads import LARGE, WORKLOADS
from router.core.joint import Slo
from simulator.cluster import Layout
from simulator.experiment import OURS, POLICIES, run
from simulator.goodput import highest_rate
from simulator.profiles import PROFILES
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


@dataclass(frozen=True, slots=True)
class Cell:
    """One search."""

    model: str
    workload: str
    policy: str
    prefill: int
    seed: int
    share: float
    precision: float


def search(cell: Cell, shared: Path, start_rps: float) -> tuple[float, list[dict[str, Any]]]:
    """The goodput of a cell, in requests per second, and the evaluations that it took."""
    profile, slower, _ = MODELS[cell.model]
    workload = WORKLOADS[cell.workload]
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
            made.append(
                {
                    **asdict(cell), "rate_rps": rate_rps, "requests": len(requests),
                    "missed": missed, "served": missed <= allowed,
                    "hit_rate": round(outcome.hit_rate, 4),
                    "ttft_mean_s": round(outcome.measured.ttft.mean_s, 4),
                    "ttft_p99_s": round(outcome.measured.ttft.quantile_s(0.99), 4),
                    "tpot_mean_s": round(outcome.measured.tpot.mean_s, 5),
                    "tpot_p99_s": round(outcome.measured.tpot.quantile_s(0.99), 5),
                }
            )  # fmt: skip
        return known[rate_rps]

    return highest_rate(serves, start_rps, LEAST_RPS, cell.precision), made


class Store:
    """All evaluations so far."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._made: dict[Cell, list[dict[str, Any]]] = {}
        self._found: dict[Cell, float] = {}
        if path.exists():
            for line in path.read_text().splitlines():
                self._take(json.loads(line))

    def goodput(self, cell: Cell) -> float | None:
        """Requests per second, if the search is over."""
        return self._found.get(cell)

    def evaluations(self, cell: Cell) -> list[dict[str, Any]]:
        """Of a search, as they were made."""
        return self._made.get(cell, [])

    def add(self, cell: Cell, goodput_rps: float, made: list[dict[str, Any]]) -> None:
        """A search is over."""
        lines = [*made, {**asdict(cell), "goodput_rps": round(goodput_rps, 4)}]
        with self._path.open("a") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
        for line in lines:
            self._take(line)

    def _take(self, line: dict[str, Any]) -> None:
        cell = Cell(**{name: line[name] for name in Cell.__slots__})
        if "goodput_rps" in line:
            self._found[cell] = line["goodput_rps"]
        else:
            self._made.setdefault(cell, []).append(line)


def coarse_cells(model: str, workload: str, policies: Iterable[str]) -> Iterator[Cell]:
    """Which split is a policy's best?"""
    for policy in policies:
        for prefill in PREFILL:
            yield Cell(model, workload, policy, prefill, 0, SHARES[0], COARSE)


def best_split(store: Store, model: str, workload: str, policy: str) -> tuple[int, float] | None:
    """Prefill engines and goodput of a policy's best split; None while that is not known."""
    found = [
        (goodput, cell.prefill)
        for cell in coarse_cells(model, workload, [policy])
        if (goodput := store.goodput(cell)) is not None
    ]
    return (max(found)[1], max(found)[0]) if len(found) == len(PREFILL) else None


def fine_cells(
    store: Store, model: str, workload: str, policies: Iterable[str], seeds: int
) -> Iterator[tuple[Cell, float]]:
    """Searches with the best split, and where each begins."""
    for policy in policies:
        best = best_split(store, model, workload, policy)
        if best is not None and best[1] > 0:
            for share in SHARES:
                for seed in range(seeds):
                    yield Cell(model, workload, policy, best[0], seed, share, FINE), best[1]


def work(store: Store, cells: list[tuple[Cell, float]], shared: Path, jobs: int) -> None:
    """Make the searches that are not made, and keep each as it ends."""
    todo = [(cell, start) for cell, start in cells if store.goodput(cell) is None]
    with ProcessPoolExecutor(jobs) as pool:
        futures = {pool.submit(search, cell, shared, start_rps): cell for cell, start_rps in todo}
        for future in as_completed(futures):
            cell = futures[future]
            goodput_rps, made = future.result()
            store.add(cell, goodput_rps, made)
            print(f"{cell}: {goodput_rps:.2f}/s in {len(made)} runs", file=sys.stderr, flush=True)


def report(store: Store, seeds: int) -> str:
    """Tables, one for each model and share: rows are workloads, and how Baton compares."""
    parts = []
    for model, (profile, *_) in MODELS.items():
        gpus = ENGINES * PROFILES[profile].gpus
        for share in SHARES:
            rows = list(_rows(store, model, share, seeds, gpus))
            if rows:
                head = ("policy", *[row[0] for row in rows])
                body = [
                    (name, *[row[1].get(name, "") for row in rows])
                    for name in (*POLICIES, "baton over the best peer")
                ]
                title = f"{profile}, {gpus} GPUs, {share:.0%} of requests within both SLOs"
                parts.append(f"{title}: requests/s per GPU (prefill engines of {ENGINES})\n\n")
                parts.append(table(head, body) + "\n")
    return "".join(parts)


def _rows(
    store: Store, model: str, share: float, seeds: int, gpus: int
) -> Iterator[tuple[str, dict[str, str]]]:
    for workload in WORKLOADS:
        texts, means = {}, {}
        for policy in POLICIES:
            cells = [
                cell
                for cell, _ in fine_cells(store, model, workload, [policy], seeds)
                if cell.share == share
            ]
            values = [
                goodput / gpus for cell in cells if (goodput := store.goodput(cell)) is not None
            ]
            if values:
                means[policy] = statistics.mean(values)
                texts[policy] = f"{_interval(values)} ({cells[0].prefill})"
        if OURS in means and len(means) > 1:
            best = max(mean for policy, mean in means.items() if policy != OURS)
            texts["baton over the best peer"] = f"{means[OURS] / best:.2f}" if best else "only one"
        if texts:
            yield workload, texts


_T_95: Final = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78}
"""Student's t for a 95 % interval, by the number of seeds."""


def _interval(values: list[float]) -> str:
    mean = statistics.mean(values)
    if len(values) < 2:
        return f"{mean:.3g}"
    half = _T_95[len(values)] * statistics.stdev(values) / math.sqrt(len(values))
    return f"{mean:.3g} ± {half:.2g}"


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--shared", type=Path, default=Path("../shared"))
    parser.add_argument("--store", type=Path, default=Path("benchmarks/results/goodput.jsonl"))
    parser.add_argument("--models", default="8b,70b")
    parser.add_argument("--workloads", default=",".join(WORKLOADS))
    parser.add_argument("--policies", default=",".join(POLICIES))
    parser.add_argument("--seeds", type=int, default=2, choices=range(1, 6))
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--report", action="store_true", help="only print what is there")
    given = parser.parse_args()
    store = Store(given.store)
    if not given.report:
        policies = given.policies.split(",")
        for model in given.models.split(","):
            for workload in given.workloads.split(","):
                start = WORKLOADS[workload].start_rps * MODELS[model][2]
                coarse = [(cell, start) for cell in coarse_cells(model, workload, policies)]
                work(store, coarse, given.shared, given.jobs)
                fine = list(fine_cells(store, model, workload, policies, given.seeds))
                work(store, fine, given.shared, given.jobs)
    print(report(store, given.seeds))


if __name__ == "__main__":
    main()
