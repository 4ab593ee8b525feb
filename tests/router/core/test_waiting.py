"""Requests that no worker takes yet wait at the router, in order, until something changes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest
from msgspec.structs import replace

from engine.base import EngineLoad
from protos.ids import RequestKey, TicketId
from router.core.backlog import OUTPUT_WEIGHT, Before
from router.core.events import (
    NO_TERMS,
    EdgeEnded,
    Finish,
    Priority,
    PromptUse,
    RequestAborted,
    RequestArrived,
    Shape,
    Submit,
    Terms,
    TicketAsked,
    TicketGranted,
    TicketRefused,
)
from router.core.gate import Promises
from router.core.moves import CoreSettings
from router.core.placement import Decision, Expected, Reason, Uncounted, View
from router.core.records import RecordBook
from router.core.router import RouterCore
from tests.router.core.driving import Drive, demand, key, output

PROMISES = Promises(2.0, None)


class OneAtATime(Uncounted):
    """A worker computes one prompt after another; what comes meanwhile waits."""

    def __init__(self) -> None:
        self.computing: RequestKey | None = None
        self.expected = Expected(0.1, 0.01, 0.1, 0.01, 10.0)
        self.stopped_after: list[int] = []

    def place(self, now_s: float, view: View, key: RequestKey, shape: Shape) -> Decision | None:
        workers = [worker.id for worker in view.pool if worker.usable]
        if not workers or (self.computing is not None and not shape.output_tokens):
            return None
        self.computing = key
        return Decision(Reason.NO_PREFILL_POOL, shape.prompt_tokens, workers[0], None, (), ())

    def expect(self, now_s: float, view: View, shape: Shape, before: Before) -> Expected:
        return self.expected

    def first_token(self, now_s: float, key: RequestKey) -> None:
        self.computing = None

    def ended(self, now_s: float, key: RequestKey, output_tokens: int | None) -> None:
        if self.computing == key:
            self.computing = None

    def stopped(self, kind: str, output_tokens: int) -> None:
        self.stopped_after.append(output_tokens)


class Bench(Drive):
    """A core with that policy."""

    def __init__(self, promises: Promises = PROMISES) -> None:
        self.policy = OneAtATime()
        settings = CoreSettings(expect_prefill=False, local_prefill_max_tokens=0, promises=promises)
        self.core = RouterCore(settings, self.policy)
        self.now_s = 100.0

    def ask(self, name: str, terms: Terms = NO_TERMS) -> TicketGranted | TicketRefused:
        (answer,) = self.feed(TicketAsked(TicketId(name), "POST", "/v1/completions", terms))
        return answer  # type: ignore[no-any-return]

    def come(self, name: str, terms: Terms = NO_TERMS) -> list[str]:
        assert isinstance(self.ask(name, terms), TicketGranted)
        return submitted(self.feed(RequestArrived(key(name), demand(name), TicketId(name))))

    def leave(self, name: str) -> list[Any]:
        return self.feed(RequestAborted(key(name)))


def submitted(commands: Sequence[Any]) -> list[str]:
    return [each.key.removeprefix("0:") for each in commands if isinstance(each, Submit)]


def test_one_goes_for_each_that_is_computed_who_is_due_first_first() -> None:
    bench = Bench()
    bench.up("d")
    assert bench.come("a") == ["a"]
    assert bench.come("b") == bench.come("low", Terms(priority=Priority.LOW)) == []
    assert bench.come("high", Terms(priority=Priority.HIGH)) == []
    assert bench.come("soon", Terms(ttft_slo_s=0.5)) == []
    gone = [
        submitted(bench.step("d", output(1, 0, [1], request_id=name)))
        for name in ("a", "soon", "high", "b", "low")
    ]
    assert gone == [["soon"], ["high"], ["b"], ["low"], []]


def test_tenants_take_turns_by_tokens() -> None:
    bench = Bench(Promises(100.0, None))
    bench.up("d")
    assert bench.come("a1", Terms(tenant="a")) == ["a1"]
    for name in ("a2", "a3", "b1", "b2"):
        assert bench.come(name, Terms(tenant=name[0])) == []
    # After 10 tokens of prompt and 2 of output, a has got 14; b was lifted to 10.
    assert OUTPUT_WEIGHT == 2
    assert submitted(bench.step("d", output(1, 0, [1, 2], request_id="a1"))) == ["b1"]
    assert submitted(bench.step("d", output(1, 0, [1], request_id="b1"))) == ["a2"]


def test_an_end_or_an_abort_lets_the_next_go() -> None:
    bench = Bench()
    bench.up("d")
    bench.come("a")
    bench.come("b")
    bench.come("c")
    ended = bench.step("d", output(1, 0, [1], finish=Finish.LENGTH))
    assert submitted(ended) == ["b"]
    assert submitted(bench.leave("b")) == ["c"]
    assert bench.leave("c")
    assert not bench.core.moves.backlog


def test_a_report_of_room_lets_the_next_go() -> None:
    """The policy may have put it off for that alone: no prompt, and no output, has to end."""
    bench = Bench()
    bench.up("d")
    bench.step("d", load=EngineLoad(running=2, kv_blocks_used=10, kv_blocks_total=10))
    bench.come("a")
    bench.come("b")
    bench.policy.computing = None
    same = EngineLoad(running=2, kv_blocks_used=10, kv_blocks_total=10)
    assert submitted(bench.step("d", load=same)) == []
    fewer = EngineLoad(running=1, kv_blocks_used=5, kv_blocks_total=10)
    assert submitted(bench.step("d", load=fewer)) == ["b"]


def test_one_that_would_be_late_on_its_worker_lets_others_go_and_the_gate_knows_at_once() -> None:
    bench = Bench()
    bench.up("d")
    bench.policy.expected = Expected(1.5, 0.04, 0.1, 0.01, 100.0)
    bench.policy.held_share = 0.15
    bench.come("first")
    for name in ("late", "soon"):
        assert bench.come(name) == []
        bench.now_s += 0.5
    bench.now_s += 0.7
    # 1.7 s have passed of its 2: what its worker has before it takes too long.
    caution = bench.core.moves.gate.ttft_margin.caution
    before = caution.spreads
    assert submitted(bench.step("d", output(1, 0, [1], request_id="first"))) == ["soon"]
    after = caution.spreads
    assert after > before
    bench.now_s += 30.0
    assert submitted(bench.step("d", output(1, 0, [1], request_id="soon"))) == ["late"]
    known = caution.spreads
    bench.step("d", output(1, 0, [1], request_id="late"))
    assert caution.spreads == known, "it is not late twice"


def test_who_was_promised_less_waits_for_less() -> None:
    bench = Bench()
    bench.up("d")
    bench.policy.held_share = 0.15
    bench.policy.expected = Expected(0.02, 0.04, 0.01, 0.01, 100.0)
    bench.come("first")
    bench.come("other")
    bench.come("soon", Terms(ttft_slo_s=0.1))
    bench.now_s += 0.05
    # It has 0.05 s left, of which its worker takes 0.015: not the 0.3 s that others wait there.
    assert submitted(bench.step("d", output(1, 0, [1], request_id="first"))) == ["soon"]


def test_who_is_late_while_no_worker_is_there_tells_nothing_of_the_load() -> None:
    bench = Bench()
    bench.up("d")
    bench.policy.expected = Expected(1.5, 0.04, 0.1, 0.01, 100.0)
    for name in ("first", "a", "b", "c"):
        bench.come(name)
    caution = bench.core.moves.gate.ttft_margin.caution
    before = caution.spreads
    bench.dead("d")
    for _ in range(20):
        bench.pass_time(3)
    assert not bench.core.moves.requests, "they have failed"
    assert caution.spreads == before


@pytest.mark.parametrize("edge_first", [True, False])
def test_a_stop_string_teaches_as_an_end_does(edge_first: bool) -> None:
    bench = Bench(Promises(2.0, 0.05))
    bench.up("d")
    bench.policy.expected = Expected(1.5, 0.04, 0.1, 0.01, 100.0)
    bench.come("a")
    gate = bench.core.moves.gate
    before = gate.ttft_margin.caution.spreads, gate.tpot_margin.caution.spreads
    bench.now_s += 2.5
    bench.step("d", output(1, 0, [1, 2, 3]))
    assert gate.ttft_margin.caution.spreads > before[0], "it was late, as is known at once"
    orderly = EdgeEnded(TicketId("a"), "200", "--")
    for event in [orderly, RequestAborted(key())][:: 1 if edge_first else -1]:
        assert bench.policy.stopped_after == []
        bench.feed(event)
    assert bench.policy.stopped_after == [3]
    assert gate.ttft_margin.factor.observations == 1
    assert gate.tpot_margin.caution.spreads != before[1], "its distances are known by now"


def test_one_that_waits_can_be_aborted() -> None:
    bench = Bench()
    bench.up("d")
    bench.come("a")
    bench.come("b")
    bench.leave("b")
    assert submitted(bench.step("d", output(1, 0, [1]))) == []


def test_waiting_for_a_turn_is_not_waiting_for_a_worker() -> None:
    bench = Bench(Promises())
    bench.up("d")
    bench.come("a")
    bench.come("b")
    assert bench.pass_time(100) == []
    bench.dead("d")
    bench.pass_time(20)
    assert key("b") in bench.core.moves.requests
    bench.pass_time(15)
    assert not bench.core.moves.requests


def test_a_ticket_is_refused_by_what_is_predicted() -> None:
    bench = Bench()
    bench.up("d")
    bench.policy.expected = Expected(3.0, 0.01, 0.1, 0.01, 10.0)
    refused = bench.ask("a")
    assert isinstance(refused, TicketRefused)
    assert (refused.status, refused.retry_after_s) == (429, 2)
    assert bench.core.moves.counts.refused_tickets == 1
    assert isinstance(bench.ask("b", Terms(ttft_slo_s=9.0)), TicketGranted)
    assert refused.ticket is not None
    story = bench.core.book.find(refused.ticket)
    assert story is not None
    told = json.loads(json.dumps(story.as_json(0.0)))["refusal"]
    assert (told["status"], told["message"]) == (429, refused.message)
    assert told["grounds"]["ttft"]["predicted_s"] == 3.0


def test_a_flood_of_refusals_leaves_the_records_of_what_was_served() -> None:
    book, served = RecordBook(20), TicketAsked(TicketId("served"), "POST", "/v1/completions")
    book.open_ticket(0.0, served)
    for number in range(100):
        asked = TicketAsked(TicketId(f"refused-{number}"), "POST", "/v1/completions")
        book.refuse(1.0, asked, TicketRefused(429, 1, "Busy.", asked.ticket))
    assert book.find("served") is not None
    assert [book.find(f"refused-{number}") is not None for number in (97, 98, 99)] == [0, 1, 1]


def test_bodies_teach_how_long_prompts_are() -> None:
    bench = Bench()
    bench.up("d")
    bench.come("a", Terms(body_bytes=1000))
    told = output(1, 0, [1], finish=Finish.LENGTH)
    bench.step("d", replace(told, prompt_use=PromptUse(10, 6, 4, 0)))
    guess = bench.core.moves.gate.sizes.guess(" /v1/completions", 1000)
    assert (guess.tokens, guess.cached_tokens) == (10, 4)


@pytest.mark.parametrize("path", ["/tokenize", "/detokenize", "/v1/messages/count_tokens"])
def test_what_no_engine_does_is_not_refused(path: str) -> None:
    bench = Bench()
    bench.up("d")
    bench.policy.expected = Expected(3.0, 0.01, 0.1, 0.01, 10.0)
    (answer,) = bench.feed(TicketAsked(TicketId("a"), "POST", path))
    assert isinstance(answer, TicketGranted)


def test_a_ticket_may_find_that_a_turn_has_come() -> None:
    """A prompt that no worker can hold ends while it waits, and the next goes with the ticket."""
    bench = Bench()
    bench.up("d")
    bench.come("a")
    bench.come("b")
    bench.ask("long")
    too_long = demand("long", prompt_tokens=5000)
    assert bench.feed(RequestArrived(key("long"), too_long, TicketId("long"))) == []
    bench.policy.computing = None  # By time alone, which is no event.
    bench.core.moves.look_again()
    *others, answer = bench.feed(TicketAsked(TicketId("c"), "POST", "/v1/completions"))
    assert submitted(others) == ["b"]
    assert isinstance(answer, TicketGranted)


def test_credit_of_those_that_never_waited_is_not_owed_to_others() -> None:
    bench = Bench(Promises())
    bench.up("d")
    for number in range(50):  # Served alone for long.
        assert bench.come(f"a{number}", Terms(tenant="a"))
        bench.step("d", output(1, 0, [1], request_id=f"a{number}", finish=Finish.LENGTH))
    assert bench.come("busy", Terms(tenant="a")) == ["busy"]
    for number in range(5):
        bench.come(f"b{number}", Terms(tenant="b"))
        bench.come(f"c{number}", Terms(tenant="a"))
    order, running = [], "busy"
    for _ in range(6):
        (running,) = submitted(
            bench.step("d", output(1, 0, [1], request_id=running, finish=Finish.LENGTH))
        )
        order.append(running[0])
    assert sorted(order) == ["b"] * 3 + ["c"] * 3, order


def test_what_was_promised_nothing_still_counts_for_others() -> None:
    bench = Bench(Promises())
    bench.up("d")
    bench.come("a")
    bench.come("b")
    bench.come("c")
    assert bench.core.moves.backlog.before("", 1e9).work_s == pytest.approx(0.1)


def test_a_response_that_is_over_brings_nothing_more() -> None:
    bench = Bench()
    bench.up("d")
    bench.ask("a")
    bench.feed(EdgeEnded(TicketId("a"), "400", "--"))
    assert bench.core.moves.gate.arrived(bench.now_s, TicketId("a"), NO_TERMS, 10)[1] is None
