"""The goodput benchmark keeps what it found, and never makes it twice."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from benchmarks import goodput
from benchmarks.goodput import Found, Search, Wanted, report, search, searches, work
from benchmarks.goodput_store import Cell, Store, code_digest
from benchmarks.workloads import WORKLOADS, Workload
from engine.latency_model import StepTimes, StepWork
from engine.profiles import PROFILES
from simulator.cluster import Layout
from simulator.experiment import Outcome

TWO = Wanted(seeds=2)


def cell(policy: str = "random", share: float = 0.9, seed: int = 0) -> Cell:
    return Cell("8b", "bursty", policy, seed, share, 0, code_digest())


def found(goodput_rps: float, prefill: int = 0) -> dict[str, object]:
    return {"prefill": prefill, "goodput_rps": goodput_rps}


def test_what_was_found_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "goodput.jsonl"
    Store(path).add(cell(), found(12.5, prefill=3))
    assert Store(path).found(cell()) == found(12.5, prefill=3)
    assert Store(path).found(cell(seed=1)) is None


def test_later_searches_begin_where_the_first_ended(tmp_path: Path) -> None:
    store = Store(tmp_path / "goodput.jsonl")
    start_rps = WORKLOADS["bursty"].start_rps

    def asked() -> list[tuple[float, int, tuple[int, ...], float]]:
        return [
            (each.cell.share, each.cell.seed, tuple(each.splits), each.start_rps)
            for each in searches(store, "8b", "bursty", "random", TWO)
        ]

    low, high = goodput.SHARES
    first, second, third = goodput.PREFILL
    assert asked() == [(low, 0, (first, second, third), start_rps)]
    store.add(cell(), found(9.0, second))
    assert asked()[1:] == [
        (low, 1, (second,), 9.0),
        (high, 0, (second, first, third), 9.0),
    ]
    store.add(cell(share=high), found(6.0, third))
    assert asked()[3:] == [(high, 1, (third,), 6.0)]


def test_only_the_strongest_are_searched_with_all_seeds(tmp_path: Path) -> None:
    store = Store(tmp_path / "goodput.jsonl")
    seeds = {}
    for policy in ("random", "baton"):
        store.add(cell(policy), found(9.0))
        asked = [each.cell for each in searches(store, "8b", "bursty", policy, Wanted())]
        seeds[policy] = sum(each.share == goodput.SHARES[0] for each in asked)
    assert seeds == {"random": 2, "baton": 5}


def test_the_report_tells_means_splits_and_how_long_it_took(tmp_path: Path) -> None:
    store = Store(tmp_path / "goodput.jsonl")
    store.add(cell(), {**found(16.0, 3), "cpu_s": 1800.0})
    store.add(cell(seed=1), {**found(24.0, 3), "cpu_s": 3600.0})
    other_cut = dataclasses.replace(cell(), requests=9000)
    store.add(other_cut, {**found(24.0, 3), "cpu_s": 7200.0})
    text = report(store, TWO)
    assert "| random | 2.5 ± 6.4 (3) |" in text
    assert "1.5 core-hours" in text


def test_policies_are_compared_by_the_seeds_that_both_have(tmp_path: Path) -> None:
    store = Store(tmp_path / "goodput.jsonl")
    store.add(cell("baton"), found(24.0))
    store.add(cell("baton", seed=1), found(80.0))
    store.add(cell("random"), found(16.0))
    assert "| baton over the best peer | 1.50 |" in report(store, TWO)


def test_other_cuts_are_other_searches(tmp_path: Path) -> None:
    store = Store(tmp_path / "goodput.jsonl")
    store.add(cell(), found(12.5))
    assert store.found(dataclasses.replace(cell(), requests=9000)) is None


def test_what_other_code_found_is_not_taken(tmp_path: Path) -> None:
    store = Store(tmp_path / "goodput.jsonl")
    store.add(dataclasses.replace(cell(), code="other"), found(12.5))
    assert store.found(cell()) is None


def test_a_line_that_was_cut_off_is_none(tmp_path: Path) -> None:
    path = tmp_path / "goodput.jsonl"
    store = Store(path)
    store.add(cell(), found(12.5))
    store.add(cell(seed=1), found(13.5))
    path.write_text(path.read_text()[:-5])
    again = Store(path)
    assert (again.found(cell()), again.found(cell(seed=1))) == (found(12.5), None)
    again.add(cell(seed=1), found(14.5))
    assert Store(path).found(cell(seed=1)) == found(14.5)


def test_a_search_ends_at_a_rate_that_is_served_and_just_not_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(goodput, "ENGINES", 1)
    short = dataclasses.replace(WORKLOADS["bursty"], most_requests=800)
    monkeypatch.setitem(WORKLOADS, "bursty", short)
    ended = search(Search(cell(), (0,), start_rps=12.0), tmp_path)
    served = [each["rate_rps"] for each in ended.runs if "lasted_s" in each]
    missed = [each["rate_rps"] for each in ended.runs if "lasted_s" not in each]
    assert max(served) == pytest.approx(ended.goodput_rps, rel=1e-3)
    assert ended.goodput_rps < min(missed) < ended.goodput_rps * (1 + 1.1 * goodput.PRECISION)


@pytest.mark.parametrize("order", [(0, 3), (3, 0)])
def test_the_best_split_is_found_whichever_comes_first(
    order: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    serves_rps = {0: 30.0, 3: 11.0}

    def run(layout: Layout, *_: object, **__: object) -> Outcome:
        served = rates[-1] <= serves_rps[layout.prefill]
        return cast(
            Outcome, SimpleNamespace(measured=SimpleNamespace(requests=100, good=served * 100))
        )

    rates: list[float] = []

    def told(rate_rps: float, *_: object) -> dict[str, object]:
        return {"rate_rps": rate_rps}

    def requests(_: Workload, __: Path, rate_rps: float, ___: int) -> range:
        rates.append(rate_rps)
        return range(100)

    monkeypatch.setattr(Workload, "requests", requests)
    monkeypatch.setattr(goodput, "run", run)
    monkeypatch.setattr(goodput, "_told", told)
    ended = search(Search(cell(), order, start_rps=14.0), tmp_path)
    assert ended.prefill == 0
    assert 30.0 / (1 + goodput.PRECISION) < ended.goodput_rps <= 30.0
    tried = [each["prefill"] for each in ended.runs]
    assert tried == sorted(tried, key=order.index), "one split after the other"
    if order == (0, 3):
        assert tried.count(3) == 1, "what does not serve more is given up at once"


def test_a_run_that_was_broken_off_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Cell] = []

    class Pool:
        def __init__(self, jobs: int) -> None: ...
        def __enter__(self) -> Pool:
            return self

        def __exit__(self, *_: object) -> None: ...
        def submit(self, _: object, one: Search, *rest: object) -> Done:
            asked.append(one.cell)
            return Done()

    class Done:
        def exception(self) -> None:
            return None

        def result(self) -> Found:
            return Found(0, 3.0, [], 1.0)

    monkeypatch.setattr(goodput, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(goodput, "as_completed", list)
    store = Store(tmp_path / "goodput.jsonl")
    one, other = (Search(each, (0,), 1.0) for each in (cell(), cell(seed=1)))
    assert work(store, [one], tmp_path, 1)
    again = Store(tmp_path / "goodput.jsonl")
    assert work(again, [one, other], tmp_path, 1)
    assert not work(again, [one, other], tmp_path, 1)
    assert asked == [cell(), cell(seed=1)]


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
