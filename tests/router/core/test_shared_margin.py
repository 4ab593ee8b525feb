"""What routers learn of their predictions holds at all, by how much each has seen lately."""

from __future__ import annotations

import math

import pytest

from router.core.caution import FIRST, MOST
from router.core.shared_margin import FADES_S, Known, LearnedMargin, SharedMargin

HALF = math.log(0.5)


def make_margin(observations: int = 0, times: float = 1.0) -> SharedMargin:
    """One that has seen so many predictions that were off by so much."""
    margin = SharedMargin(newest_weight=0.01)
    for _ in range(observations):
        margin.observe(0.0, times, 1.0, used=times)
    return margin


def word(seen: float = 100.0, log_mean: float = 0.0, caution: float = FIRST) -> LearnedMargin:
    """Of a router whose predictions are off by just that."""
    return LearnedMargin(seen, log_mean, 0.0, judged=seen, caution_spreads=caution)


def test_alone_it_is_its_own() -> None:
    margin = make_margin(200, times=2.0)
    known = Known(margin.factor.value, margin.factor.spread, margin.caution.spreads)
    assert margin.known(1000.0) == known


def test_one_that_has_seen_nothing_takes_what_others_have_learned() -> None:
    margin = make_margin()
    margin.hear(0.0, "other", LearnedMargin(100.0, HALF, 0.09, 100.0, 1.5), 0.0)
    assert margin.known(0.0) == pytest.approx(Known(0.5, 0.3, 1.5))


def test_each_counts_by_what_it_has_seen_lately() -> None:
    margin = make_margin(300)
    margin.hear(0.0, "other", word(100.0, 4 * HALF), 0.0)
    assert margin.known(0.0).factor == pytest.approx(0.5, rel=0.01)
    # It says the same again while what is known here fades.
    margin.hear(5 * FADES_S, "other", word(100.0, HALF), 0.0)
    assert margin.known(5 * FADES_S).factor == pytest.approx(0.5, rel=0.02)


@pytest.mark.parametrize("quiet_s", [3 * FADES_S, 100 * FADES_S])
def test_nothing_changes_while_nothing_happens(quiet_s: float) -> None:
    margin = make_margin(100)
    margin.hear(0.0, "other", word(100.0, 2 * HALF), 0.0)
    before = margin.known(0.0)
    assert margin.known(quiet_s) == pytest.approx(before), "as little of both"
    margin.observe(quiet_s, 1.0, 1.0, used=1.0)
    assert margin.known(quiet_s).factor > before.factor


def test_the_newest_word_of_a_router_replaces_what_it_said() -> None:
    margin = make_margin()
    margin.hear(0.0, "other", word(100.0, 0.0), 0.0)
    margin.hear(1.0, "other", word(100.0, HALF), 0.0)
    margin.hear(2.0, "other", word(100.0, 0.0), age_s=1.5)
    assert margin.known(2.0).factor == pytest.approx(0.5), "what it said earlier comes too late"


def test_what_a_router_said_before_it_began_anew_fades_with_time() -> None:
    margin = make_margin()
    margin.hear(0.0, "other", word(1000.0, HALF), 0.0)
    margin.hear(1.0, "other", word(1.0, 0.0), 0.0)
    assert margin.known(1.0).factor == pytest.approx(0.5, rel=0.01)
    for seconds in range(2, 600):
        margin.hear(float(seconds), "other", word(100.0, 0.0), 0.0)
    assert margin.known(600.0).factor == pytest.approx(1.0, rel=0.01)


def test_lateness_counts_where_no_prediction_was_seen() -> None:
    """Of who gives up waiting nobody knows what it would have got."""
    margin = make_margin(100)
    margin.hear(0.0, "other", word(10.0, 0.0, caution=0.0), 0.0)
    news = margin.news
    for _ in range(200):
        margin.judge(0.0, late=True)
    assert margin.caution.spreads == MOST
    assert margin.known(0.0).caution_spreads > 0.9 * MOST
    assert margin.news == news + 200
    assert margin.learned(0.0).judged == 200


def test_where_routers_disagree_nobody_is_sure() -> None:
    margin = make_margin()
    margin.hear(0.0, "a", word(100.0, HALF), 0.0)
    margin.hear(0.0, "b", word(100.0, -HALF), 0.0)
    known = margin.known(0.0)
    assert known.factor == pytest.approx(1.0)
    assert known.spread == pytest.approx(-HALF)


def test_routers_that_are_long_gone_are_forgotten() -> None:
    margin = make_margin()
    for number in range(1000):
        margin.hear(number * FADES_S, f"router-{number}", word(), 0.0)
    assert len(margin._others) < 10


def test_two_that_tell_each_other_hold_the_same() -> None:
    one, other = make_margin(50, times=0.5), make_margin(200, times=0.8)
    one.hear(0.0, "other", other.learned(0.0), 0.0)
    other.hear(0.0, "one", one.learned(0.0), 0.0)
    assert one.known(10.0) == pytest.approx(other.known(10.0))
