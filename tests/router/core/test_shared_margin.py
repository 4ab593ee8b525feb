"""What routers learn of their predictions holds at all, by how much each has seen lately."""

from __future__ import annotations

import math

import pytest

from router.core.caution import FIRST
from router.core.shared_margin import FADES_S, Known, LearnedMargin, SharedMargin

HALF = math.log(0.5)


def make_margin(observations: int = 0, times: float = 1.0) -> SharedMargin:
    """One that has seen so many predictions that were off by so much."""
    margin = SharedMargin(newest_weight=0.01)
    for _ in range(observations):
        margin.observe(0.0, times, 1.0, used=times)
    return margin


def test_alone_it_is_its_own() -> None:
    margin = make_margin(200, times=2.0)
    known = Known(margin.factor.value, margin.factor.spread, margin.caution.spreads)
    assert margin.known(1000.0) == known


def test_one_that_has_seen_nothing_takes_what_others_have_learned() -> None:
    margin = make_margin()
    margin.hear(0.0, "other", LearnedMargin(100.0, HALF, 0.09, 1.5))
    assert margin.known(0.0) == pytest.approx(Known(0.5, 0.3, 1.5))


def test_each_counts_by_what_it_has_seen_lately() -> None:
    margin = make_margin(300)
    margin.hear(0.0, "other", LearnedMargin(100.0, 4 * HALF, 0.0, FIRST))
    assert margin.known(0.0).factor == pytest.approx(0.5, rel=0.01)
    # It says the same again while what is known here fades.
    margin.hear(5 * FADES_S, "other", LearnedMargin(100.0, HALF, 0.0, FIRST))
    assert margin.known(5 * FADES_S).factor == pytest.approx(0.5, rel=0.02)


def test_what_was_heard_fades_as_what_was_seen_does() -> None:
    margin = make_margin(100)
    margin.hear(0.0, "other", LearnedMargin(100.0, 2 * HALF, 0.0, FIRST))
    before = margin.known(0.0)
    assert margin.known(3 * FADES_S) == pytest.approx(before), "as little of both"
    margin.observe(3 * FADES_S, 1.0, 1.0, used=1.0)
    assert before.factor < margin.known(3 * FADES_S).factor < 0.6


def test_after_a_long_quiet_it_is_its_own_again() -> None:
    margin = make_margin(100)
    margin.hear(0.0, "other", LearnedMargin(100.0, HALF, 0.0, 2.0))
    assert margin.known(100 * FADES_S) == make_margin(100).known(0.0)


def test_the_newest_word_of_a_router_replaces_what_it_said() -> None:
    margin = make_margin()
    margin.hear(0.0, "other", LearnedMargin(1000.0, 0.0, 0.0, 0.0))
    margin.hear(1.0, "other", LearnedMargin(10.0, HALF, 0.0, 0.0))
    assert margin.known(1.0).factor == pytest.approx(0.5)


def test_two_that_tell_each_other_hold_the_same() -> None:
    one, other = make_margin(50, times=0.5), make_margin(200, times=0.8)
    one.hear(0.0, "other", other.learned(0.0))
    other.hear(0.0, "one", one.learned(0.0))
    assert one.known(10.0) == pytest.approx(other.known(10.0))
