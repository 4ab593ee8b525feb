"""The tuner: one budget for all, drawn by a seed, and the best by what was served."""

from __future__ import annotations

import pytest

from benchmarks.tune import SPACES, TRAINING, Task, Tuned, attainment, trials


@pytest.mark.parametrize("policy", SPACES)
def test_trials_are_the_defaults_and_then_drawn_within_their_ranges(policy: str) -> None:
    first, *drawn = trials(policy, 12)
    assert first == {}
    assert len(drawn) == 11
    assert trials(policy, 12) == [first, *drawn]
    for knobs in drawn:
        assert knobs
        assert knobs.keys() <= SPACES[policy].keys()
        for name, value in knobs.items():
            space = SPACES[policy][name]
            assert 0.99 * space.low <= value <= 1.01 * space.high


@pytest.mark.parametrize("policy", SPACES)
def test_every_policy_takes_its_knobs(policy: str) -> None:
    for place in (0, len(TRAINING) - 1):
        knobs = {name: space.high for name, space in SPACES[policy].items()}
        task = Task(policy, knobs, place, 10.0, 100)
        assert attainment(task) > 0.9


def test_the_best_serves_most_on_average_and_defaults_win_a_draw() -> None:
    tuned = Tuned([{}, {"a": 1.0}, {"a": 2.0}], [[0.5, 0.5], [0.9, 0.2], [0.5, 0.7]], [], [])
    assert tuned.best == 2
    assert tuned._replace(attainments=[[0.5, 0.7], [0.7, 0.5], [0.1, 0.2]]).best == 0
