"""The comparison of numbers of routers: what is searched, and what the table makes of it."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from benchmarks import several_routers
from benchmarks.goodput_store import Store
from benchmarks.several_routers import CASES, Alone, Cell, cells, goodput, rows, shares
from engine.base import NOTHING_QUEUED, PlacedWork, Queued
from tests.router.core.joint_bench import ALIKE, SLO, Bench

GIVEN = Namespace(engines=8, seeds=2, requests=200)


def test_the_table_tells_the_loss_beside_one_router(tmp_path: Path) -> None:
    store = Store(tmp_path / "several.jsonl", Cell)
    for cell in cells(CASES[0], GIVEN):
        lost_rps = (cell.routers == 4) * (1 if cell.arm == "told" else 5)
        store.add(cell, {"goodput_rps": 10.0 - lost_rps, "good": 0.9, "late": lost_rps / 100})
    again = Store(tmp_path / "several.jsonl", Cell)
    told, alone = rows(again, GIVEN, goodput)
    assert told[1:] == ("told", "10", "10 (+0.0%)", "9 (-10.0%)", "10 (+0.0%)")
    assert alone[4] == "5 (-50.0%)"
    told, _ = rows(again, GIVEN, shares)
    assert told[1:] == ("told", "90.0% (0.0%)", "90.0% (0.0%)", "90.0% (1.0%)", "90.0% (0.0%)")


def test_one_router_is_searched_once() -> None:
    asked = list(cells(CASES[0], GIVEN))
    assert len(set(asked)) == len(asked) == 2 * (1 + 2 * (len(several_routers.ROUTERS) - 1))


def test_alone_hears_nothing_of_others() -> None:
    bench = Bench("d1")
    (worker,) = bench.pool
    worker.others = PlacedWork(prompts=1, prompt_tokens=50_000)
    worker.queued_beside = Queued(1, 1.0, 0.0)
    policy = Alone(lambda n: 0, ALIKE, SLO)
    policy.stepped(bench.now_s, worker)
    assert policy.forecasts == {}
    assert worker.queued_beside == NOTHING_QUEUED
