"""The simulator beside the live system: the same requests to both, seen by their clients.

Simulated engines are five times as slow as GPUs are, so that what a busy machine adds is small
beside it; what real ones take is measured in the instance that is compared. How close they are on a
machine at rest stands in benchmarks/results/live-fidelity.md.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks.fidelity import Bounds, Pair, compare, compared_table
from benchmarks.fidelity_runs import (
    Hops,
    default_placement,
    run_live,
    run_simulated,
    simulated_engines,
)
from benchmarks.live_fidelity import SIMULATED, TINY_QUICK, Comparison, Load, add_real

SLOWER = 5
HOPS = Hops(front_in_s=0.003, front_out_s=0.001, link_s=0.0012)
"""As the benchmark measures them."""
LOAD = Load(rate_rps=5, duration_s=25, shared_tokens=1024, own_tokens=300, output_tokens=16)
BOUNDS = Bounds(share=0.25, points=3)
REAL_BOUNDS = Bounds(share=0.4, points=3)
"""Real steps take a few milliseconds, which is what a busy machine may add."""

pytestmark = [
    pytest.mark.slow, pytest.mark.timeout(600), pytest.mark.usefixtures("tiny_model")
]  # fmt: skip


def check(pair: Pair, bounds: Bounds) -> None:
    compared = compare([pair], bounds)
    print(compared_table(compared))
    p90s = [each for each in compared if "p90" in each.name]
    assert len(p90s) == 2
    # A dozen requests are above it: that is the machine's noise as much as the system.
    assert all(each.within for each in compared if each not in p90s), compared_table(compared)


def test_live_clients_see_what_the_simulator_says() -> None:
    layout = replace(SIMULATED, profile=SIMULATED.profile.slower(SLOWER))
    requests = LOAD.requests(seed=1)
    live = run_live(simulated_engines(layout), requests)
    simulated, _ = run_simulated(layout, default_placement(layout, 1), HOPS, requests)
    check(Pair(live.seen, simulated), BOUNDS)


def test_clients_of_real_engines_see_what_the_simulator_says() -> None:
    compared = Comparison()
    add_real(compared, prefill=0, requests=TINY_QUICK.requests(seed=1), hops=HOPS, seed=1)
    (pair,) = compared.pairs
    check(pair, REAL_BOUNDS)
