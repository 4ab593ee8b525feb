"""llm-d's comparison of schedulers comes out in the simulator: who collapses, and where."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.prefix_routing import RATES_RPS, SCHEDULERS, measured, simulate

pytestmark = pytest.mark.slow

COLLAPSED_S = 10.0
HOLDS_S = 3.0


@pytest.mark.parametrize("name", ["random", "load-aware"])
def test_those_that_do_not_see_the_cache_collapse_between_15_and_20(name: str) -> None:
    for rate_rps, seen in simulate(SCHEDULERS[name]).items():
        if rate_rps <= 15:
            assert seen.ttft_p90_s < HOLDS_S
        else:
            assert seen.ttft_p90_s > COLLAPSED_S


@pytest.mark.parametrize(("name", "holds_to_rps"), [("precise", 60), ("baton", 46)])
def test_those_that_see_it_hold(name: str, holds_to_rps: int) -> None:
    for rate_rps, seen in simulate(SCHEDULERS[name]).items():
        assert rate_rps > holds_to_rps or seen.ttft_p90_s < HOLDS_S


def test_the_measured_table_is_the_one_that_is_meant(shared: Path) -> None:
    known = measured(shared)
    for name in filter(None, [each.measured_as for each in SCHEDULERS.values()]):
        assert set(RATES_RPS) == known[name].keys()
    for name in ("random-scheduling", "load-scheduling"):
        assert known[name][15].ttft_p90_s < COLLAPSED_S < known[name][20].ttft_p90_s
    assert all(stage.ttft_p90_s < HOLDS_S for stage in known["precise-scheduling"].values())
