"""The comparison of numbers of routers: what is searched, and what the table makes of it."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from benchmarks import several_routers
from benchmarks.goodput_store import Store
from benchmarks.several_routers import CASES, Alone, Cell, cells, rows
from engine.base import PlacedWork
from tests.router.core.joint_bench import ALIKE, SLO, Bench

GIVEN = Namespace(engines=8, seeds=2, requests=200)


def test_the_table_tells_the_loss_beside_one_router(tmp_path: Path) -> None:
    store = Store(tmp_path / "several.jsonl", Cell)
    for cell in cells(CASES[0], GIVEN):
        lost_rps = (cell.routers == 4) * (1 if cell.arm == "told" else 5)
        store.add(cell, {"goodput_rps": 10.0 - lost_rps})
    told, alone = rows(Store(tmp_path / "several.jsonl", Cell), GIVEN)
    assert told[1:] == ("told", "10", "10 (+0.0%)", "9 (-10.0%)", "10 (+0.0%)")
    assert alone[4] == "5 (-50.0%)"


def test_one_router_is_searched_once() -> None:
    asked = list(cells(CASES[0], GIVEN))
    assert len(set(asked)) == len(asked) == 2 * (1 + 2 * (len(several_routers.ROUTERS) - 1))


def test_alone_hears_nothing_of_others() -> None:
    bench = Bench("d1")
    (worker,) = bench.pool
    worker.others = PlacedWork(prompts=1, prompt_tokens=50_000)
    policy = Alone(lambda n: 0, ALIKE, SLO)
    policy.stepped(bench.now_s, worker)
    assert policy.forecasts == {}
