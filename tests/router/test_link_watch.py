"""When a worker counts as dead: a link as `worker_links` drives it, on a virtual clock."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.link_watch import GREETING_S, LinkWatch, Reach

RECONNECT_S = 10.0
TICK_S = 0.1
REPORT_S = 0.25
RETRY_S = 0.1
SYN_AGAIN_S = 1.0
"""TCP sends a lost first packet again after this time."""


@dataclass
class World:
    """A worker and what lies between, as functions of time."""

    passes: Callable[[float], bool] = lambda _: True
    """The network."""
    talks: Callable[[float], bool] = lambda _: True
    """The worker's process runs."""
    listens: Callable[[float], bool] = lambda _: True


def first_after(when: Callable[[float], bool], now_s: float, limit_s: float) -> float | None:
    """The next time at which it holds, in steps of a millisecond."""
    while now_s < limit_s:
        if when(now_s):
            return now_s
        now_s += 0.001
    return None


def death(world: World, until_s: float) -> tuple[float, str] | None:
    """When and why the router declares the worker dead; None: never within `until_s`.

    The link stands at 0.
    """
    watch, now_s, stands, reported_s = LinkWatch(0.0, RECONNECT_S), 0.0, True, 0.0
    while now_s < until_s:
        if stands:
            now_s += TICK_S
            if world.passes(now_s) and world.talks(now_s) and now_s - reported_s >= REPORT_S:
                watch.heard(now_s)
                reported_s = now_s
            # What was sent during a cut comes late, if the link lives: here it never does.
            stands = not watch.is_silent(now_s) and world.listens(now_s)
            continue
        now_s, reach = attach(world, now_s, watch.time_left_s(now_s))
        if reach is Reach.WELCOMED:
            watch.heard(now_s)
            stands = True
        verdict = watch.judge(now_s, reach)
        if verdict is not None:
            return now_s, verdict
        now_s += RETRY_S
    return None


def attach(world: World, now_s: float, limit_s: float) -> tuple[float, Reach]:
    """One try: the connection, then the greeting."""
    end_s = now_s + limit_s
    while not world.passes(now_s):
        now_s += SYN_AGAIN_S
        if now_s >= end_s:
            return end_s, Reach.CUT
    if not world.listens(now_s):
        return now_s, Reach.REFUSED
    end_s = now_s + limit_s
    welcomed_s = first_after(lambda t: world.talks(t) and world.passes(t), now_s, end_s)
    return (end_s, Reach.SILENT) if welcomed_s is None else (welcomed_s, Reach.WELCOMED)


moments = st.floats(1.0, 4.0)


@given(moments)
def test_a_worker_that_hangs_is_dead_within_8_s(at_s: float) -> None:
    found = death(World(talks=lambda t: t < at_s), 60)
    assert found is not None
    dead_s, why = found
    assert dead_s - at_s + REPORT_S + TICK_S >= 6.5
    assert dead_s - at_s <= 8.0
    assert "it hangs" in why


@given(moments, st.floats(0.0, 5.0))
def test_a_cut_of_5_s_ends_nothing(at_s: float, length_s: float) -> None:
    assert death(World(passes=lambda t: not at_s <= t <= at_s + length_s), 40) is None


@given(moments, st.floats(0.0, 5.0))
def test_a_worker_that_stalls_for_5_s_lives(at_s: float, length_s: float) -> None:
    assert death(World(talks=lambda t: not at_s <= t <= at_s + length_s), 40) is None


@given(st.lists(st.tuples(st.floats(6.0, 9.0), st.floats(0.0, 5.0)), max_size=5))
def test_cuts_one_after_the_other_do_not_add_up(gaps: list[tuple[float, float]]) -> None:
    cuts, now_s = [], 1.0
    for pause_s, length_s in gaps:
        cuts.append((now_s, now_s + length_s))
        now_s += length_s + pause_s
    world = World(passes=lambda t: not any(begin <= t <= end for begin, end in cuts))
    assert death(world, now_s + 20) is None


@given(moments)
def test_a_machine_that_is_gone_is_dead_after_10_s(at_s: float) -> None:
    found = death(World(passes=lambda t: t < at_s), 60)
    assert found is not None
    assert found[0] - at_s == pytest.approx(RECONNECT_S, abs=RETRY_S + REPORT_S + TICK_S)
    assert "can't be reached" in found[1]


@given(moments)
def test_a_process_that_is_gone_is_dead_at_once(at_s: float) -> None:
    found = death(World(listens=lambda t: t < at_s), 60)
    assert found is not None
    assert found[0] - at_s <= 2 * TICK_S
    assert "refuses" in found[1]


def test_a_worker_that_never_greets_is_waited_for_as_long_as_one_that_fell_silent() -> None:
    watch = LinkWatch(100.0, RECONNECT_S)
    assert watch.judge(100.0 + GREETING_S, Reach.SILENT) is None
    assert watch.judge(106.5, Reach.SILENT) is not None
    assert LinkWatch(100.0, RECONNECT_S).judge(106.5, Reach.ANSWERED) is None
    assert LinkWatch(100.0, RECONNECT_S).judge(110.0, Reach.ANSWERED) is not None
