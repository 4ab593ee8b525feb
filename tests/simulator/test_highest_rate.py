"""The search for the highest rate."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protos.errors import ConfigError
from simulator.goodput import highest_rate


@given(st.floats(0.2, 5000), st.floats(0.2, 5000))
def test_it_finds_the_edge_from_anywhere(edge: float, start: float) -> None:
    asked: list[float] = []

    def serves(rate: float) -> bool:
        asked.append(rate)
        return rate <= edge

    found = highest_rate(serves, start, least_rps=0.1)
    assert found <= edge <= found * 1.03 * 1.0001
    assert len(asked) == len(set(asked))


def test_what_serves_everything_has_no_highest_rate() -> None:
    with pytest.raises(ConfigError, match="there are too few requests"):
        highest_rate(lambda _: True, 10.0, least_rps=0.1)


def test_what_serves_nothing_is_zero() -> None:
    assert highest_rate(lambda _: False, 10.0, least_rps=0.1) == 0.0
