"""Who is let in: by what is predicted, what was promised, and how wrong predictions were."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from kvstore.index import KvIndex
from protos.ids import TicketId
from router.core.backlog import Backlog, Before, Waiting
from router.core.caution import LATE_SHARE, LEAST
from router.core.elsewhere import Elsewhere
from router.core.events import (
    NO_TERMS,
    End,
    Ended,
    Fault,
    Outlook,
    Priority,
    Shape,
    Terms,
    TicketAsked,
    TicketRefused,
)
from router.core.gate import (
    ARRIVES_WITHIN_S,
    LARGEST_MARGIN,
    LEARNED_TOLD_S,
    LONGEST_RETRY_S,
    NOTHING_PROMISED,
    Foreseen,
    Gate,
    Promises,
)
from router.core.placement import Expected, Uncounted, View
from router.core.workers import WorkerPool
from tests.router.core.driving import key

PROMISES = Promises(2.0, 0.05)


class Oracle(Uncounted):
    """Predicts what it is told, behind what waits."""

    def __init__(self) -> None:
        self.ttft_s, self.tpot_s, self.prefill_s, self.step_s = 0.1, 0.01, 0.1, 0.01
        self.asked: list[tuple[Shape, Before]] = []

    def place(self, *_: Any) -> None:
        return None

    def expect(self, now_s: float, view: View, shape: Shape, before: Before) -> Expected | None:
        self.asked.append((shape, before))
        ttft_s = self.ttft_s + before.work_s
        return Expected(ttft_s, self.tpot_s, self.prefill_s, self.step_s, 100.0)


class Bench:
    """A gate and what stands behind it."""

    def __init__(self, promises: Promises = PROMISES) -> None:
        self.oracle, self.backlog = Oracle(), Backlog()
        view = View(WorkerPool(), KvIndex(10), 128, True, 0)
        self.gate = Gate(promises, self.oracle, view, self.backlog, Elsewhere(self.backlog))
        self.now_s = 0.0
        self.tickets = 0

    def ask(self, terms: Terms = NO_TERMS) -> TicketRefused | None:
        self.tickets += 1
        asked = TicketAsked(TicketId(str(self.tickets)), "POST", "/v1/completions", terms)
        return self.gate.ask(self.now_s, asked)

    def foreseen(self, expected: Expected) -> Foreseen:
        """As of one that is let in now."""
        return Foreseen(
            expected, self.gate.ttft_margin.factor.value, self.gate.tpot_margin.factor.value
        )

    def learn(self, expected: Expected, ttft_s: float, tpot_s: float) -> None:
        self.tell(self.foreseen(expected), ttft_s, tpot_s)

    def tell(self, foreseen: Foreseen, ttft_s: float, tpot_s: float) -> None:
        """It was measured."""
        self.gate.learn_first_token(self.now_s, foreseen, NO_TERMS, ttft_s)
        ended = Ended(
            key(), End.COMPLETE, "", 100, time_to_first_token_s=ttft_s,
            time_per_output_token_s=tpot_s,
        )  # fmt: skip
        self.gate.learn(self.now_s, foreseen, NO_TERMS, ended)


def sure(bench: Bench) -> None:
    """Predictions were right for long."""
    for _ in range(1500):
        bench.learn(Expected(1.5, 0.04, 0.1, 0.01, 100.0), 1.5, 0.04)


def test_what_can_be_kept_is_let_in() -> None:
    assert Bench().ask() is None


def test_where_nothing_is_promised_nothing_is_asked() -> None:
    bench = Bench(NOTHING_PROMISED)
    bench.oracle.ttft_s = 100.0
    assert bench.ask() is None
    assert bench.oracle.asked == []
    assert bench.ask(Terms(ttft_slo_s=1.0)) is not None, "unless the request asks for it"


def test_a_first_token_that_would_be_late_is_refused_with_the_numbers() -> None:
    bench = Bench()
    sure(bench)
    bench.oracle.ttft_s = 4.5
    refused = bench.ask()
    assert refused is not None
    assert refused.grounds is not None
    assert replace(refused, grounds=None) == TicketRefused(
        429, 3, "Its first token would come after about 4.5 s, and 2 s were promised; try again in "
        "3 s.", TicketId("1"),
    )  # fmt: skip
    assert refused.grounds.ttft == pytest.approx(Outlook(2.0, 0.1, 4.5, 4.5), rel=0.01)
    assert refused.grounds.tpot.promised_s == 0.05


def test_tokens_that_would_be_too_far_apart_are_refused() -> None:
    bench = Bench()
    sure(bench)
    bench.oracle.tpot_s = 0.079
    refused = bench.ask()
    assert refused is not None
    assert (refused.status, refused.retry_after_s) == (429, 3), "0.029 s, a hundred times"
    assert "tokens would be apart by about 0.079 s, and 0.05 s were promised" in refused.message


def test_who_has_all_for_itself_is_let_in_however_long_it_takes() -> None:
    """It would not be served sooner at another time."""
    bench = Bench()
    bench.oracle.ttft_s = bench.oracle.prefill_s = 30.0
    bench.oracle.tpot_s = bench.oracle.step_s = 0.2
    assert bench.ask() is None
    assert bench.ask() is not None, "behind the first"


def test_a_margin_is_for_what_others_do() -> None:
    bench = Bench()
    bench.oracle.prefill_s, bench.oracle.ttft_s = 1.6, 1.85
    assert bench.ask() is None
    bench = Bench()
    bench.oracle.prefill_s, bench.oracle.ttft_s = 0.1, 1.85
    assert bench.ask() is not None


def test_nobody_is_told_to_come_again_next_year() -> None:
    bench = Bench()
    bench.oracle.ttft_s = 1e7
    refused = bench.ask()
    assert refused is not None
    assert refused.retry_after_s == LONGEST_RETRY_S


def test_a_requests_own_promises_go_first() -> None:
    bench = Bench()
    bench.oracle.ttft_s = 4.0
    assert bench.ask(Terms(ttft_slo_s=10.0)) is None
    bench.oracle.ttft_s = 0.5
    assert bench.ask(Terms(ttft_slo_s=0.2)) is not None
    bench.oracle.step_s = 0.001
    assert bench.ask(Terms(tpot_slo_s=0.005)) is not None


def test_who_matters_less_is_refused_sooner() -> None:
    refused = []
    for ttft_s in (1.9, 1.6, 1.2):
        one_by_one = [Bench() for _ in Priority]
        for each in one_by_one:
            each.oracle.ttft_s = ttft_s
        refused.append(
            [
                each.ask(Terms(priority=priority)) is not None
                for each, priority in zip(one_by_one, Priority, strict=True)
            ]
        )
    # High, normal, low, by predictions that are still unsure by a fifth.
    assert refused == [[False, True, True], [False, False, True], [False, False, False]]


def test_what_was_let_in_counts_until_it_arrives() -> None:
    bench = Bench()
    bench.oracle.prefill_s = 0.45
    for number in range(4):
        assert bench.ask() is None, number
    work_s, requests = bench.oracle.asked[-1][1]
    assert (work_s, requests) == (pytest.approx(1.35), 3)
    assert bench.ask() is not None, "1.8 s wait before it"
    waits, foreseen = bench.gate.arrived(0.0, TicketId("1"), NO_TERMS, 1024)
    assert foreseen is not None
    assert foreseen.expected.alone_ttft_s == 0.45
    # Twice as long as its body made believe.
    assert waits == Waiting("", 2.0, 2.0, 0.9, 2.0)
    assert bench.ask() is None
    bench.now_s = ARRIVES_WITHIN_S
    bench.ask()
    assert bench.oracle.asked[-1][1] == Before(0.0, 0), "what never arrived"


def test_what_waits_counts() -> None:
    bench = Bench()
    bench.backlog.add(key("a"), Waiting("", 1.0, prefill_s=1.75))
    assert bench.ask() is not None
    assert bench.oracle.asked[-1][1] == Before(1.75, 1)
    assert bench.ask(Terms(priority=Priority.HIGH, ttft_slo_s=1.9)) is None, "goes before it"


def test_due_and_late_follow_class_and_promise() -> None:
    gate = Bench().gate
    for priority, due_s in ((Priority.HIGH, 1.0), (Priority.NORMAL, 2.0), (Priority.LOW, 8.0)):
        waits, foreseen = gate.arrived(0.0, None, Terms(priority=priority), 10)
        assert (waits.due_s, waits.late_s, foreseen) == (due_s, 2.0, None)
    waits, _ = gate.arrived(0.0, None, Terms(ttft_slo_s=0.5), 10)
    assert (waits.due_s, waits.late_s) == (0.5, 0.5)


def test_predictions_that_were_too_short_are_corrected() -> None:
    bench = Bench()
    bench.oracle.ttft_s = 1.4
    assert bench.ask() is None
    for _ in range(100):
        bench.learn(Expected(1.5, 0.01, 0.1, 0.01, 100.0), 2.1, 0.01)
    assert bench.gate.ttft_margin.factor.value == pytest.approx(2.0 / 1.4, rel=0.01)
    assert bench.ask() is not None


def let_in(bench: Bench) -> Foreseen:
    """Asked for, and there."""
    assert bench.ask() is None
    _, foreseen = bench.gate.arrived(0.0, TicketId(str(bench.tickets)), NO_TERMS, 1024)
    assert foreseen is not None
    return foreseen


def test_what_it_was_off_by_counts_as_it_was_when_the_request_was_let_in() -> None:
    """A load comes and goes as slowly as requests are served: it is followed, but each time those
    that were let in with the one before get another."""
    at_once, waited = Bench(), Bench()
    for number in range(20):
        for bench in (at_once, waited):
            bench.oracle.ttft_s, bench.oracle.tpot_s = 1.2, 0.035
        ttft_s, tpot_s = (1.3, 0.03) if number % 2 else (1.0, 0.04)
        before = let_in(waited)
        for _ in range(100):
            at_once.tell(let_in(at_once), ttft_s, tpot_s)
            waited.tell(before, ttft_s, tpot_s)
    for late, soon in (
        (waited.gate.ttft_margin.factor, at_once.gate.ttft_margin.factor),
        (waited.gate.tpot_margin.factor, at_once.gate.tpot_margin.factor),
    ):
        assert late.value == soon.value
        assert late.spread > 1.1 * soon.spread


def test_twenty_that_others_are_served_with_do_not_change_what_is_foreseen_by_much() -> None:
    bench = Bench()
    sure(bench)
    for _ in range(20):
        bench.learn(Expected(1.5, 0.04, 0.1, 0.01, 100.0), 0.8, 0.025)
    assert bench.gate.ttft_margin.factor.value > 0.85
    assert bench.gate.tpot_margin.factor.value > 0.85


def test_its_caution_follows_what_becomes_of_those_that_are_let_in() -> None:
    bench = Bench()
    first = bench.gate.ttft_margin.caution.spreads
    for _ in range(20):
        bench.learn(Expected(1.5, 0.04, 0.1, 0.01, 100.0), 2.1, 0.04)
    assert bench.gate.ttft_margin.caution.spreads > first + 0.3
    assert bench.gate.tpot_margin.caution.spreads < first, "each latency by itself"
    few = round(LATE_SHARE * 10_000)
    before = bench.gate.ttft_margin.caution.spreads
    for number in range(10_000):
        late = number % (10_000 // few) == 0
        bench.learn(Expected(1.5, 0.04, 0.1, 0.01, 100.0), 2.1 if late else 1.0, 0.04)
    assert bench.gate.ttft_margin.caution.spreads == pytest.approx(before, abs=0.03), (
        "as few as asked for"
    )
    for _ in range(30_000):
        bench.learn(Expected(1.5, 0.04, 0.1, 0.01, 100.0), 1.0, 0.04)
    assert bench.gate.ttft_margin.caution.spreads == LEAST


@pytest.mark.parametrize("alone_s", [2.1, 50.0])
def test_its_caution_is_not_for_those_that_no_margin_keeps_out(alone_s: float) -> None:
    bench = Bench()
    before = bench.gate.ttft_margin.caution.spreads
    for _ in range(1000):
        bench.learn(Expected(alone_s, 0.04, alone_s, 0.01, 100.0), alone_s, 0.04)
        bench.learn(Expected(1.05, 0.04, 1.0, 0.01, 100.0), 2.1, 0.04)
    assert bench.gate.ttft_margin.caution.spreads == before


@pytest.mark.parametrize(
    ("end", "fault", "waited_s", "late"),
    [
        (End.CANCELLED, None, 2.1, True),
        (End.CANCELLED, None, 1.9, False),
        (End.FAILED, Fault.DEADLINE, 2.1, True),
        (End.FAILED, Fault.WORKER_LOST, 2.1, False),
    ],
)
def test_who_gave_up_later_than_promised_was_late(
    end: End, fault: Fault | None, waited_s: float, late: bool
) -> None:
    bench = Bench()
    before = bench.gate.ttft_margin.caution.spreads
    ended = Ended(key(), end, "", 0, duration_s=waited_s, fault=fault)
    bench.gate.learn(
        bench.now_s, bench.foreseen(Expected(1.5, 0.04, 0.1, 0.01, 100.0)), NO_TERMS, ended
    )
    after = bench.gate.ttft_margin.caution.spreads
    assert after > before if late else after == before
    assert bench.gate.ttft_margin.factor.observations == 0, "nobody knows when it would have come"


def test_who_was_put_behind_was_late_once() -> None:
    bench = Bench()
    before = bench.gate.ttft_margin.caution.spreads
    left = bench.gate.learn_late(
        bench.now_s, bench.foreseen(Expected(1.5, 0.04, 0.1, 0.01, 100.0)), NO_TERMS
    )
    after = bench.gate.ttft_margin.caution.spreads
    assert after > before
    bench.tell(left, ttft_s=30.0, tpot_s=0.04)
    bench.gate.learn(
        bench.now_s, left, NO_TERMS, Ended(key(), End.CANCELLED, "", 0, duration_s=30.0)
    )
    assert bench.gate.ttft_margin.caution.spreads == after
    assert bench.gate.ttft_margin.factor.observations == 0, "its wait tells nothing of the load"
    assert bench.gate.tpot_margin.factor.observations == 1


def test_who_was_put_behind_was_late_once_even_if_all_of_it_was_cached() -> None:
    bench = Bench()
    left = bench.gate.learn_late(
        bench.now_s, bench.foreseen(Expected(1.5, 0.04, 0.0, 0.01, 100.0)), NO_TERMS
    )
    after = bench.gate.ttft_margin.caution.spreads
    bench.tell(left, ttft_s=30.0, tpot_s=0.04)
    assert bench.gate.ttft_margin.caution.spreads == after


def test_nobody_learns_from_who_was_put_behind_and_late_all_alone() -> None:
    bench = Bench()
    before = bench.gate.ttft_margin.caution.spreads
    bench.gate.learn_late(
        bench.now_s, bench.foreseen(Expected(2.5, 0.04, 2.5, 0.01, 100.0)), NO_TERMS
    )
    assert bench.gate.ttft_margin.caution.spreads == before


def test_who_left_teaches_nothing_of_later_tokens() -> None:
    bench = Bench()
    before = bench.gate.tpot_margin.caution.spreads
    ended = Ended(
        key(), End.CANCELLED, "", 2, time_to_first_token_s=2.1, time_per_output_token_s=0.5
    )
    bench.gate.learn(
        bench.now_s, bench.foreseen(Expected(1.5, 0.04, 0.1, 0.01, 100.0)), NO_TERMS, ended
    )
    assert bench.gate.tpot_margin.factor.observations == 0
    assert bench.gate.tpot_margin.caution.spreads == before


def test_what_is_far_from_what_was_promised_tells_nothing() -> None:
    bench = Bench()
    for _ in range(100):
        bench.learn(Expected(0.05, 0.011, 0.01, 0.01, 100.0), 0.1, 0.01)
    assert (
        bench.gate.ttft_margin.factor.observations
        == bench.gate.tpot_margin.factor.observations
        == 0
    )


def test_however_wrong_it_was_it_can_be_unlearned() -> None:
    bench = Bench()
    for _ in range(100):
        bench.learn(Expected(1.5, 0.01, 0.1, 0.01, 100.0), 1500.0, 0.01)
    bench.oracle.ttft_s = 2.0 / LARGEST_MARGIN - 0.01
    assert bench.ask() is None
    assert bench.oracle.ttft_s > 0.5 * 2.0, "and tells something"


def test_a_prompt_is_guessed_from_its_bytes() -> None:
    bench = Bench()
    bench.gate.sizes.observe("me /v1/completions", 1000, 500, 100)
    bench.ask(Terms(body_bytes=4000, tenant="me", output_tokens=70))
    shape, _ = bench.oracle.asked[-1]
    assert shape.hinted_output_tokens == 70
    assert (shape.prompt_tokens, shape.cached_tokens) == (2000, 400)
    assert (shape.ttft_slo_s, shape.tpot_slo_s) == (2.0, 0.05)
    assert replace(shape, prompt_tokens=1).addresses == ()


def test_others_are_told_what_is_new_once_a_second() -> None:
    bench = Bench()
    assert bench.gate.news(bench.now_s) is None
    sure(bench)
    told = bench.gate.news(bench.now_s)
    assert told is not None
    assert told.ttft.seen == told.tpot.judged == 1500
    assert bench.gate.news(bench.now_s + LEARNED_TOLD_S) is None, "nothing is new"
    let_in(bench)
    bench.gate.learn_late(
        bench.now_s, bench.foreseen(Expected(1.5, 0.04, 0.1, 0.01, 100.0)), NO_TERMS
    )
    assert bench.gate.news(bench.now_s + LEARNED_TOLD_S / 2) is None
    told = bench.gate.news(bench.now_s + LEARNED_TOLD_S)
    assert told is not None
    assert told.ttft.judged > told.ttft.seen, "that it was late, and not by how much"
