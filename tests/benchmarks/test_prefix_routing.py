"""llm-d's comparison of schedulers comes out in the simulator: who collapses, and where."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.prefix_routing import MEASURED_AS, RATES_RPS, measured, simulate

COLLAPSED_S = 10.0
HOLDS_S = 1.0


@pytest.mark.parametrize("policy", ["random", "least_loaded"])
def test_those_that_do_not_see_the_cache_collapse(policy: str) -> None:
    seen = simulate(policy)
    assert all(seen[rate].ttft_p90_s < 3.0 for rate in (3, 10, 15))
    assert all(seen[rate].ttft_p90_s > COLLAPSED_S for rate in (30, 40, 60))


@pytest.mark.parametrize("policy", ["llmd_builtin", "baton"])
def test_those_that_see_it_hold(policy: str) -> None:
    assert all(stage.ttft_p90_s < HOLDS_S for stage in simulate(policy).values())


def test_the_measured_table_is_the_one_that_is_meant(shared: Path) -> None:
    known = measured(shared)
    for name in filter(None, MEASURED_AS.values()):
        assert set(RATES_RPS) <= known[name].keys()
    for name in ("random-scheduling", "load-scheduling"):
        assert known[name][15].ttft_p90_s < COLLAPSED_S < known[name][20].ttft_p90_s
    assert all(stage.ttft_p90_s < HOLDS_S for stage in known["precise-scheduling"].values())
