"""Pings and answers on a virtual clock."""

from __future__ import annotations

from router.unit.anchor.pulse import Pulse


def looked(pulse: Pulse, from_s: float, to_s: float, *, answers: bool) -> float | None:
    """Look twice a second; returns when the peer was found to have stopped."""
    for halves in range(int(from_s * 2), int(to_s * 2)):
        now_s = halves / 2
        if pulse.due(now_s) and answers:
            pulse.answered()
        if pulse.stopped(now_s):
            return now_s
    return None


def test_a_peer_that_answers_lives() -> None:
    assert looked(Pulse(1.0, 5.0), 0, 100, answers=True) is None


def test_a_peer_that_does_not_is_found() -> None:
    pulse = Pulse(1.0, 5.0)
    assert looked(pulse, 0, 50, answers=True) is None
    assert looked(pulse, 50, 100, answers=False) == 55.5


def test_the_time_that_the_looker_slept_does_not_count() -> None:
    pulse = Pulse(1.0, 5.0)
    assert pulse.due(0.0)
    assert not pulse.stopped(0.5)
    assert not pulse.stopped(60.0)  # It was stopped itself; the answer may wait to be read.
    pulse.answered()
    assert looked(pulse, 61, 70, answers=True) is None


def test_a_peer_that_stays_silent_after_the_looker_slept_is_found() -> None:
    pulse = Pulse(1.0, 5.0)
    assert pulse.due(0.0)
    assert not pulse.stopped(60.0)
    found_s = looked(pulse, 60.5, 100, answers=False)
    assert found_s is not None
    assert 63 <= found_s <= 66
