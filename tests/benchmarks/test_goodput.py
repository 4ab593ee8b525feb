"""The goodput benchmark keeps what it found, and never makes it twice."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import goodput
from benchmarks.goodput import Cell, Store, coarse_cells, fine_cells, report, search, work
from benchmarks.workloads import WORKLOADS


def cell(prefill: int = 0, policy: str = "random", share: float = 0.9, seed: int = 0) -> Cell:
    return Cell("8b", "bursty", policy, prefill, seed, share, goodput.COARSE)


def test_what_was_found_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "goodput.jsonl"
    Store(path).add(cell(), 12.5, [])
    assert Store(path).goodput(cell()) == 12.5
    assert Store(path).goodput(cell(prefill=3)) is None


def test_fine_searches_follow_the_best_split(tmp_path: Path) -> None:
    store = Store(tmp_path / "goodput.jsonl")
    for each, found in zip(coarse_cells("8b", "bursty", ["random"]), (5.0, 9.0, 1.0), strict=True):
        assert list(fine_cells(store, "8b", "bursty", ["random"], 2)) == []
        store.add(each, found, [])
    fine = list(fine_cells(store, "8b", "bursty", ["random"], 2))
    assert {(each.prefill, start) for each, start in fine} == {(goodput.PREFILL[1], 9.0)}
    assert len(fine) == len(goodput.SHARES) * 2
    for each, _ in fine:
        store.add(each, 16.0, [])
    assert "| random | 2 ± 0 (3) |" in report(store, 2)


def test_a_search_ends_at_a_rate_that_is_served_and_just_not_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(goodput, "ENGINES", 1)
    found, made = search(cell(), tmp_path, start_rps=12.0)
    served = [each["rate_rps"] for each in made if each["served"]]
    missed = [each["rate_rps"] for each in made if not each["served"]]
    assert max(served) == pytest.approx(found, rel=1e-3)
    assert found < min(missed) < found * (1 + 1.1 * goodput.COARSE)


def test_a_run_that_was_broken_off_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Cell] = []

    class Pool:
        def __init__(self, jobs: int) -> None: ...
        def __enter__(self) -> Pool:
            return self

        def __exit__(self, *_: object) -> None: ...
        def submit(self, _: object, one: Cell, *rest: object) -> Done:
            asked.append(one)
            return Done()

    class Done:
        def result(self) -> tuple[float, list[dict[str, object]]]:
            return 3.0, []

    monkeypatch.setattr(goodput, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(goodput, "as_completed", list)
    store = Store(tmp_path / "goodput.jsonl")
    work(store, [(cell(), 1.0)], tmp_path, 1)
    again = Store(tmp_path / "goodput.jsonl")
    work(again, [(cell(), 1.0), (cell(prefill=3), 1.0)], tmp_path, 1)
    assert asked == [cell(), cell(prefill=3)]


@pytest.mark.parametrize("name", WORKLOADS)
def test_workloads_are_of_their_rate_and_in_order(name: str, shared: Path) -> None:
    workload = WORKLOADS[name]
    made = list(workload.requests(shared, workload.start_rps, seed=1))
    arrivals = [each.arrival_s for each in made]
    assert arrivals == sorted(arrivals)
    assert len(made) <= workload.most_requests
    assert made != list(workload.requests(shared, workload.start_rps, seed=2))
    assert len(made) / arrivals[-1] == pytest.approx(workload.start_rps, rel=0.45)
