"""llm-d's comparison of schedulers comes out in the simulator: who collapses, and where."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.prefix_routing import RATES_RPS, SCHEDULERS, measured, simulate

pytestmark = pytest.mark.slow

COLLAPSED_S = 10.0
HOLDS_S = 1.0
WORSE_S = 3.0
"""More than that is no holding on."""


@pytest.mark.parametrize("name", ["random", "load-aware"])
def test_those_that_do_not_see_the_cache_collapse_between_15_and_20(name: str, whole: bool) -> None:
    if name == "random" and not whole:
        pytest.skip("it collapses where load-aware does: with --whole")
    for rate_rps, seen in simulate(SCHEDULERS[name]).items():
        if rate_rps <= 15:
            assert seen.ttft_p90_s < WORSE_S
        else:
            assert seen.ttft_p90_s > COLLAPSED_S


def test_precise_routing_holds_to_60() -> None:
    for rate_rps, seen in simulate(SCHEDULERS["precise"]).items():
        assert seen.ttft_p90_s < (HOLDS_S if rate_rps < 52 else WORSE_S)


def test_baton_holds_to_46() -> None:
    for rate_rps, seen in simulate(SCHEDULERS["baton"]).items():
        assert seen.ttft_p90_s < (HOLDS_S if rate_rps <= 46 else COLLAPSED_S)


def test_the_measured_table_is_the_one_that_is_meant(shared: Path) -> None:
    known = measured(shared)
    for name in filter(None, [each.measured_as for each in SCHEDULERS.values()]):
        assert set(RATES_RPS) == known[name].keys()
    for name in ("random-scheduling", "load-scheduling"):
        assert known[name][15].ttft_p90_s < COLLAPSED_S < known[name][20].ttft_p90_s
    assert all(stage.ttft_p90_s < HOLDS_S for stage in known["precise-scheduling"].values())
