"""Verdicts on what hangs, on a virtual clock."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.watch import (
    ENDLESS_S,
    HANG_S,
    LONGEST_LOOK_S,
    STOPPED_S,
    AwakeClock,
    EngineWatch,
)

LOOK_S = 0.5


class Watched:
    """An engine that idles with 55 threads, watched every half second."""

    def __init__(self) -> None:
        self.now_s = 1000.0
        self.watch = EngineWatch(self.now_s)
        self.waits = False
        self.stopped = False
        self.main_share = 0.0
        """Of a core, that its main thread uses."""
        self._main_cpu_s = 20.0
        self._began_s = self.now_s
        self.asked = 0

    def _threads(self) -> dict[str, float]:
        self.asked += 1
        idle = {f"idle-{n}": 0.002 * (self.now_s - self._began_s) for n in range(54)}
        return {"main": self._main_cpu_s, **idle}

    def look(self, after_s: float = LOOK_S) -> str | None:
        self.now_s += after_s
        self._main_cpu_s += 0.0 if self.stopped else self.main_share * after_s
        return self.watch.look(
            self.now_s, waits=self.waits, stopped=self.stopped, threads=self._threads
        )

    def until_verdict(
        self, limit_s: float, each: Callable[[Watched], None] = lambda _: None
    ) -> tuple[float, str]:
        """Seconds from now, and what it says; fails if there is none by then."""
        began_s = self.now_s
        while self.now_s - began_s < limit_s:
            each(self)
            if (verdict := self.look()) is not None:
                return self.now_s - began_s, verdict
        raise AssertionError(f"no verdict within {limit_s} s")

    def goes_on(self, for_s: float, each: Callable[[Watched], None] = lambda _: None) -> None:
        with pytest.raises(AssertionError, match="no verdict"):
            self.until_verdict(for_s, each)


@pytest.fixture
def engine() -> Watched:
    watched = Watched()
    watched.watch.warmed_up()
    return watched


def test_one_that_warms_up_may_wait_for_its_disk_but_not_without_an_end() -> None:
    engine = Watched()
    engine.waits = True
    took_s, verdict = engine.until_verdict(ENDLESS_S + 1)
    assert took_s == pytest.approx(ENDLESS_S, abs=2 * LOOK_S)
    assert verdict == "work waits and it has ended no step for 300 s"
    engine = Watched()
    engine.waits = True
    engine.goes_on(60)
    engine.watch.warmed_up()
    engine.watch.stepped()
    assert engine.until_verdict(HANG_S + 1)


def test_work_without_step_or_cpu_is_a_hang_after_8_s(engine: Watched) -> None:
    engine.waits = True
    took_s, verdict = engine.until_verdict(20)
    assert HANG_S <= took_s <= HANG_S + LOOK_S
    assert "no step for 8 s and used no CPU" in verdict


def test_time_counts_from_the_last_step(engine: Watched) -> None:
    engine.waits, engine.main_share = True, 0.9
    engine.goes_on(30, each=lambda e: e.watch.stepped())
    assert not engine.asked, "an engine that steps costs no look into /proc"
    engine.main_share = 0.0
    took_s, _ = engine.until_verdict(20)
    assert took_s <= HANG_S + LOOK_S


def test_an_idle_engine_is_left_alone(engine: Watched) -> None:
    engine.goes_on(1000)
    assert not engine.asked


@pytest.mark.parametrize("share", [0.05, 1.0])
def test_an_engine_that_computes_does_not_hang(engine: Watched, share: float) -> None:
    """A first request may compile for long; one that waits for a grammar uses 0.13 of a core."""
    engine.waits, engine.main_share = True, share
    engine.goes_on(60)
    engine.main_share = 0.0
    took_s, _ = engine.until_verdict(20)
    assert took_s <= HANG_S + LOOK_S


def test_what_children_compute_counts(engine: Watched) -> None:
    engine.waits = True
    child = {"cpu_s": 0.0}

    def compile_on(now_s: float) -> str | None:
        child["cpu_s"] += 0.5 * LOOK_S
        threads = {"main": 20.0, "compiler": child["cpu_s"]}
        return engine.watch.look(now_s, waits=True, stopped=False, threads=lambda: threads)

    verdicts = [compile_on(1000 + n * LOOK_S) for n in range(60)]
    assert verdicts == [None] * 60


def test_computing_without_an_end_is_one(engine: Watched) -> None:
    engine.waits, engine.main_share = True, 1.0
    took_s, verdict = engine.until_verdict(ENDLESS_S + 10)
    assert took_s == ENDLESS_S
    assert "no step for 300 s" in verdict


def test_a_stopped_process_hangs_with_and_without_work(engine: Watched) -> None:
    engine.stopped = True
    took_s, verdict = engine.until_verdict(20)
    assert took_s == STOPPED_S
    assert "SIGSTOP" in verdict


def test_a_process_that_was_stopped_for_a_moment_does_not(engine: Watched) -> None:
    for _ in range(10):
        engine.stopped = True
        engine.goes_on(STOPPED_S - 1)
        engine.stopped = False
        engine.goes_on(LOOK_S)


def test_clients_that_give_up_before_do_not_hide_a_hang(engine: Watched) -> None:
    """Requests come, wait for 3 s and are aborted: nothing was ever made of any."""

    def come_and_go(watched: Watched) -> None:
        watched.waits = watched.now_s % 6 < 3

    took_s, _ = engine.until_verdict(30, each=come_and_go)
    assert took_s <= 2 * HANG_S + 3


def test_a_watcher_that_was_stopped_itself_gives_a_new_window(engine: Watched) -> None:
    engine.waits = True
    engine.goes_on(4)
    assert engine.look(after_s=60.0) is None
    took_s, _ = engine.until_verdict(20)
    assert HANG_S - 4 - LONGEST_LOOK_S <= took_s <= HANG_S - 3


@given(st.lists(st.tuples(st.sampled_from(["step", "add", "end", "none"]), st.floats(0.1, 50))))
def test_an_engine_that_always_steps_within_8_s_is_never_judged(
    turns: list[tuple[str, float]],
) -> None:
    engine = Watched()
    since_step_s = 0.0
    for turn, passed_s in turns:
        if since_step_s + passed_s >= HANG_S or turn == "step":
            engine.watch.stepped()
            since_step_s = 0.0
        engine.waits = {"add": True, "end": False}.get(turn, engine.waits)
        since_step_s += min(passed_s, LONGEST_LOOK_S)
        assert engine.look(after_s=passed_s) is None


@given(st.lists(st.floats(0.001, 100), min_size=1))
def test_sleep_of_the_watcher_hardly_counts(pauses_s: list[float]) -> None:
    clock = AwakeClock(5.0)
    now_s = 5.0
    for pause_s in pauses_s:
        now_s += pause_s
        clock.look(now_s)
    assert clock.time_s == pytest.approx(sum(min(pause_s, LONGEST_LOOK_S) for pause_s in pauses_s))
