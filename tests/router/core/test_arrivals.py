"""How often requests come, and how long their prompts take."""

from __future__ import annotations

import pytest

from router.core.arrivals import LEAST_SEEN_S, WINDOW_S, Arrivals


def test_nothing_came() -> None:
    assert Arrivals().per_s(5.0) == 0.0
    assert Arrivals().prefill_s == 0.0


@pytest.mark.parametrize("after_s", [2.0, 10.0, 100.0])
def test_a_steady_rate_is_known_before_a_window_is_over(after_s: float) -> None:
    arrivals = Arrivals()
    for number in range(round(after_s * 20)):
        arrivals.observe(1000.0 + number / 20, 0.25)
    assert arrivals.per_s(1000.0 + after_s) == pytest.approx(20.0, rel=0.03)
    assert arrivals.prefill_s == pytest.approx(0.25)


def test_the_first_one_is_no_stream() -> None:
    arrivals = Arrivals()
    arrivals.observe(7.0, 0.1)
    assert arrivals.per_s(7.0) == pytest.approx(1 / LEAST_SEEN_S, rel=0.1)


def test_what_stopped_is_forgotten() -> None:
    arrivals = Arrivals()
    for number in range(1000):
        arrivals.observe(number / 20, 0.1)
    assert arrivals.per_s(50.0 + 5 * WINDOW_S) < 0.2
