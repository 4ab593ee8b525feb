"""The factor between measured and predicted times."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.learned_times import FIRST_SPREAD, LARGEST_FACTOR, LARGEST_VARIANCE, Factor


def test_nothing_seen_is_the_profile_and_its_error() -> None:
    factor = Factor()
    assert (factor.value, factor.spread) == (1.0, pytest.approx(FIRST_SPREAD))


def test_a_few_observations_replace_a_wrong_profile() -> None:
    factor = Factor()
    for _ in range(5):
        factor.observe(5.0, 0.01)
    assert factor.value == pytest.approx(500, rel=0.3)


@given(st.floats(0.01, 100), st.integers(0, 1000))
def test_it_finds_the_factor_and_its_spread(true: float, seed: int) -> None:
    rng = random.Random(seed)
    factor = Factor()
    for _ in range(600):
        factor.observe(true * rng.lognormvariate(0, 0.3), 1.0)
    assert factor.value == pytest.approx(true, rel=0.35)
    assert factor.spread == pytest.approx(0.3, rel=0.6)


def test_moments_are_those_of_what_was_seen() -> None:
    rng = random.Random(1)
    factor = Factor(observations=100, log_mean=math.log(3), log_variance=0.09)
    seen = [3 * rng.lognormvariate(0, 0.3) for _ in range(200_000)]
    assert factor.mean == pytest.approx(sum(seen) / len(seen), rel=0.01)
    square = sum(each * each for each in seen) / len(seen)
    assert factor.square_over_median * 9 == pytest.approx(square, rel=0.02)


def test_a_boundless_spread_weighs_no_more_than_a_wide_one() -> None:
    wide = Factor(log_variance=LARGEST_VARIANCE)
    assert Factor(log_variance=9.0).square_over_median == wide.square_over_median


def test_what_says_little_gives_way_to_what_says_much() -> None:
    factor = Factor()
    factor.observe(20.0, 1.0, 0.02)
    assert factor.value == pytest.approx(1.0, rel=0.3)
    for _ in range(5):
        factor.observe(2.0, 1.0, 1.0)
    assert factor.value == pytest.approx(2.0, rel=0.1)
    for _ in range(10):
        factor.observe(20.0, 1.0, 0.02)
    assert factor.value == pytest.approx(2.0, rel=0.2)


def test_it_follows_a_change() -> None:
    factor = Factor()
    for _ in range(100):
        factor.observe(1.0, 1.0)
    for _ in range(100):
        factor.observe(2.0, 1.0)
    assert factor.value == pytest.approx(2.0, rel=0.02)


@pytest.mark.parametrize(("measured_s", "predicted_s"), [(0.0, 1.0), (-1.0, 1.0), (1.0, 0.0)])
def test_what_says_nothing_changes_nothing(measured_s: float, predicted_s: float) -> None:
    factor = Factor()
    factor.observe(measured_s, predicted_s)
    assert factor == Factor()


def test_one_absurd_observation_is_bounded() -> None:
    factor = Factor()
    factor.observe(1e9, 1e-9)
    assert factor.value <= LARGEST_FACTOR
    factor.observe(1e9, 1e-9)
    assert factor.value <= LARGEST_FACTOR


def test_its_spread_is_of_predictions_as_they_were_made() -> None:
    """The later an outcome is known, the more may have changed by then."""
    late, at_once = Factor(), Factor()
    for number in range(400):
        measured_s = 2.0 if number // 20 % 2 else 1.0
        at_once.observe(measured_s, 1.0)
        late.observe(measured_s, 1.0, used=1.0 if measured_s == 2.0 else 2.0)
    assert late.value == at_once.value
    assert late.spread == pytest.approx(math.log(2), rel=0.001)
    assert at_once.spread < 0.6 * late.spread


def test_a_factor_may_forget_more_slowly() -> None:
    slow, fast = Factor(newest_weight=0.01), Factor()
    for factor in (slow, fast):
        for _ in range(200):
            factor.observe(1.0, 1.0)
        for _ in range(20):
            factor.observe(2.0, 1.0)
    assert slow.value < 1.2 < 1.5 < fast.value


def test_the_first_tells_nothing_of_a_spread() -> None:
    for used in (None, 1.0):
        factor = Factor()
        factor.observe(5.0, 1.0, used=used)
        assert factor.spread == pytest.approx(FIRST_SPREAD)
        factor.observe(5.0, 1.0, used=used)
        assert (factor.spread > 1.0) == (used is not None), "as far off as it was"
