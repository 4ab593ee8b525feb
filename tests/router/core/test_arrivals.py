"""How often prompts come, as it is remembered."""

from __future__ import annotations

import pytest

from router.core.arrivals import Arrivals

WINDOW_S = 10.0


def evenly(rate_rps: float, from_s: float, until_s: float, arrivals: Arrivals) -> Arrivals:
    for number in range(round((until_s - from_s) * rate_rps)):
        arrivals.add(from_s + number / rate_rps, occupies_s=0.1)
    return arrivals


def test_a_rate_is_known_after_a_window() -> None:
    arrivals = Arrivals(WINDOW_S)
    assert arrivals.rate_rps(5.0) is None
    evenly(20.0, 100.0, 100.0 + WINDOW_S, arrivals)
    assert arrivals.rate_rps(99.0 + WINDOW_S) is None
    assert arrivals.rate_rps(100.0 + WINDOW_S) is not None


@pytest.mark.parametrize("since_s", [0.0, 1e6])
@pytest.mark.parametrize("lasts_s", [10.0, 30.0, 300.0])
def test_an_even_rate_is_found_however_long_it_has_lasted(since_s: float, lasts_s: float) -> None:
    arrivals = evenly(20.0, since_s, since_s + lasts_s, Arrivals(WINDOW_S))
    assert arrivals.rate_rps(since_s + lasts_s) == pytest.approx(20.0, rel=0.03)
    assert arrivals.mean_s == pytest.approx(0.1)


def test_what_was_is_forgotten() -> None:
    arrivals = evenly(20.0, 0.0, 60.0, Arrivals(WINDOW_S))
    assert arrivals.rate_rps(60.0 + 3 * WINDOW_S) == pytest.approx(1.0, rel=0.1)
    for number in range(100):
        arrivals.add(200.0 + number, occupies_s=0.5)
    assert arrivals.mean_s == pytest.approx(0.5, rel=0.01)
