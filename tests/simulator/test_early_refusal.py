"""Under twice the load that can be served: who is let in is served as promised."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice

import pytest

from engine.profiles import PROFILES
from router.core.costs import Slo
from simulator import workloads
from simulator.cluster import Layout
from simulator.experiment import Outcome, run

PROFILE = PROFILES["llama-3.1-8b-h100"]
SLO = Slo(1.0, 0.05)
OVERLOAD_RPS = 120.0
"""Two engines serve about 60/s of it."""


def overloaded(layout: Layout, policy: str) -> Outcome:
    wish = workloads.Wish(OVERLOAD_RPS, 600.0, 3)
    return run(layout, policy, SLO, islice(workloads.SYNTHETIC["poisson"](wish), 6000), seed=1)


@pytest.mark.parametrize("layout", [Layout(PROFILE, 0, 2), Layout(PROFILE, 1, 1)])
def test_few_of_those_that_are_let_in_are_late(layout: Layout) -> None:
    measured = overloaded(layout, "baton").measured
    assert measured.refused > 0.25 * measured.requests
    assert measured.late < 0.02
    peer = overloaded(layout, "mooncake_rejecting").measured
    assert peer.refused
    assert measured.good > 1.1 * peer.good


def test_what_decode_workers_have_no_room_for_waits_before_its_first_token() -> None:
    """A split that does not fit: prompts are computed sooner than caches have room for them. Then
    short outputs can't bear to wait for their second token."""
    wish = workloads.Wish(40.0, 600.0, 3)
    prompts = islice(workloads.SYNTHETIC["poisson"](wish), 3000)
    small = replace(PROFILE, kv_tokens_reported=100_000)
    measured = run(Layout(small, 3, 1), "baton", Slo(4.0, 0.05), prompts, seed=1).measured
    # Handed over all the same, 4.4 % of those let in were late, and 74 % of all in time.
    assert measured.late < 0.02
    assert measured.good > 0.77 * measured.requests
