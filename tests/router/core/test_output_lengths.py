"""What outputs are expected to get to."""

from __future__ import annotations

import pytest

from router.core.output_lengths import FIRST_GUESS_TOKENS, KINDS_KEPT, OutputLengths


def test_a_guess_a_limit_and_at_least_one() -> None:
    lengths = OutputLengths()
    assert lengths.expect("", None) == FIRST_GUESS_TOKENS
    assert lengths.expect("", 10) == 10
    assert lengths.expect("", 10, made_tokens=9) == 1


def test_a_clients_hint_goes_before_what_was_learned_and_after_its_limit() -> None:
    lengths = OutputLengths()
    assert lengths.expect("", None, hint=900) == 900
    assert lengths.expect("", 10, hint=900) == 10
    assert lengths.expect("", None, made_tokens=890, hint=900) == 10
    assert lengths.expect("", None, made_tokens=900, hint=900) == 900, "it was wrong"


def test_kinds_are_learned_apart_and_new_ones_start_as_all() -> None:
    lengths = OutputLengths()
    for _ in range(400):
        lengths.observe("chat", 500)
        lengths.observe("tools", 20)
    assert lengths.expect("chat", None) == pytest.approx(500, rel=0.05)
    assert lengths.expect("tools", None) == pytest.approx(20, rel=0.3)
    assert 20 < lengths.expect("new", None) < 500


def test_one_that_outlives_the_mean_goes_on() -> None:
    lengths = OutputLengths()
    expected = lengths.expect("", None)
    assert lengths.expect("", None, made_tokens=int(expected) + 1) == expected


def test_kinds_are_bounded() -> None:
    lengths = OutputLengths()
    for number in range(KINDS_KEPT + 50):
        lengths.observe(str(number), 1000)
    assert len(lengths._by_kind) == KINDS_KEPT


def test_a_delay_falls_on_few_tokens_of_short_outputs() -> None:
    alike, unlike = OutputLengths(), OutputLengths()
    for _ in range(4000):
        alike.observe("", 101)
        unlike.observe("", 2)
        unlike.observe("", 200)
    assert alike.delayed_square == pytest.approx(1 / 100**2, rel=0.01)
    # On average they have as many gaps; half of them have but one.
    assert unlike.delayed_square == pytest.approx((1 + 1 / 199) / 2 / 100, rel=0.2)
    before = alike.delayed_square
    alike.observe("", 1)  # Of one token there is nothing to delay.
    assert alike.delayed_square == before
