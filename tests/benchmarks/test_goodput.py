"""The goodput benchmark keeps what it found, and never makes it twice."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from benchmarks import goodput
from benchmarks.goodput import Wanted, coarse_cells, fine_cells, report, search, work
from benchmarks.goodput_store import Cell, Store, code_digest
from benchmarks.workloads import WORKLOADS
from engine.latency_model import StepTimes, StepWork
from engine.profiles import PROFILES

TWO = Wanted(seeds=2)


def cell(prefill: int = 0, policy: str = "random", share: float = 0.9, seed: int = 0) -> Cell:
    return Cell("8b", "bursty", policy, prefill, seed, share, goodput.COARSE, 0, code_digest())


def test_what_was_found_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "goodput.jsonl"
    Store(path).add(cell(), 12.5, [])
    assert Store(path).goodput(cell()) == 12.5
    assert Store(path).goodput(cell(prefill=3)) is None


def test_fine_searches_follow_the_best_split(tmp_path: Path) -> None:
    store = Store(tmp_path / "goodput.jsonl")
    for share, goodputs in zip(goodput.SHARES, ((8.5, 9.0, 1.0), (2.0, 5.0, 6.0)), strict=True):
        coarse = coarse_cells("8b", "bursty", ["random"], share, TWO)
        for each, found in zip(coarse, goodputs, strict=True):
            assert share not in {
                cell.share for cell, _ in fine_cells(store, "8b", "bursty", ["random"], TWO)
            }
            store.add(each, found, [])
    fine = list(fine_cells(store, "8b", "bursty", ["random"], TWO))
    _, second, third = goodput.PREFILL
    of_each = [(each.share, each.prefill, each.seed, start) for each, start in fine]
    assert of_each == [(goodput.SHARES[0], second, 0, 9.0), (goodput.SHARES[1], third, 0, 6.0)]
    for each, _ in fine:
        store.add(each, 24.0, [])
    fine = list(fine_cells(store, "8b", "bursty", ["random"], TWO))
    assert [(each.seed, start) for each, start in fine] == [
        (0, 9.0),
        (1, 24.0),
        (0, 6.0),
        (1, 24.0),
    ]
    for each, _ in fine:
        store.add(each, 24.0 if each.seed else 16.0, [])
    assert f"| random | 2.5 ± 6.4 ({second}) |" in report(store, TWO)


def test_policies_are_compared_by_the_seeds_that_both_have(tmp_path: Path) -> None:
    store = Store(tmp_path / "goodput.jsonl")
    one = Wanted(seeds=1)
    for policy, wanted, goodputs in (("baton", TWO, (24.0, 80.0)), ("random", one, (16.0,))):
        for share in goodput.SHARES:
            for each in coarse_cells("8b", "bursty", [policy], share, TWO):
                store.add(each, 8.0, [])
        for _ in range(2):
            for each, _ in fine_cells(store, "8b", "bursty", [policy], wanted):
                store.add(each, goodputs[each.seed], [])
    text = report(store, TWO)
    assert "| baton over the best peer | 1.50 |" in text


def test_other_cuts_are_other_searches(tmp_path: Path) -> None:
    store = Store(tmp_path / "goodput.jsonl")
    store.add(cell(), 12.5, [])
    assert store.goodput(dataclasses.replace(cell(), requests=9000)) is None


def test_what_other_code_found_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path / "goodput.jsonl")
    store.add(cell(), 12.5, [])
    other = dataclasses.replace(cell(), code="other")
    assert store.goodput(other) is None


def test_a_line_that_was_cut_off_is_none(tmp_path: Path) -> None:
    path = tmp_path / "goodput.jsonl"
    store = Store(path)
    store.add(cell(), 12.5, [{"rate_rps": 12.5}])
    store.add(cell(prefill=3), 13.5, [])
    path.write_text(path.read_text()[:-5])
    again = Store(path)
    assert (again.goodput(cell()), again.goodput(cell(prefill=3))) == (12.5, None)
    again.add(cell(prefill=3), 14.5, [])
    assert Store(path).goodput(cell(prefill=3)) == 14.5


def test_a_search_ends_at_a_rate_that_is_served_and_just_not_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(goodput, "ENGINES", 1)
    short = dataclasses.replace(WORKLOADS["bursty"], most_requests=800)
    monkeypatch.setitem(WORKLOADS, "bursty", short)
    found, made = search(cell(), tmp_path, start_rps=12.0)
    served = [each["rate_rps"] for each in made if "lasted_s" in each]
    missed = [each["rate_rps"] for each in made if "lasted_s" not in each]
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
        def exception(self) -> None:
            return None

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
    if name != "agents":  # Their pauses don't get shorter.
        faster = list(workload.requests(shared, 2 * workload.start_rps, seed=1))
        assert [each.input_tokens for each in faster] == [each.input_tokens for each in made]
    # Chains of calls take a while until as many end as begin.
    least = 0.6 if name == "agents" else 0.9
    assert least < len(made) / arrivals[-1] / workload.start_rps < 1.1


# What an agent's call adds is short; what it repeats is kept somewhere.
@pytest.mark.parametrize("name", [name for name in WORKLOADS if name != "agents"])
def test_every_request_can_be_served_in_time_alone(name: str, shared: Path) -> None:
    workload, profile = WORKLOADS[name], PROFILES["llama-3.1-8b-h100"]
    times = StepTimes(profile.timing(1))
    for request in workload.requests(shared, workload.start_rps, seed=0):
        work = StepWork()
        work.add_prefill(request.input_tokens, 0)
        steps = -(-request.input_tokens // profile.max_step_tokens)
        alone_s = times.step_s(work) + (steps - 1) * profile.step_base_s
        assert alone_s < workload.slo.ttft_s
