"""A request's life, event by event: exact commands."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from engine.base import EngineLoad
from protos.enginecore import EngineRequest, decode_request
from protos.ids import RequestKey, TicketId, WorkerId
from router.core import admission
from router.core.events import (
    AbortOn,
    End,
    Ended,
    Finish,
    FrontGone,
    PrefixFetch,
    RequestAborted,
    RequestArrived,
    Shape,
    Submit,
    TicketAsked,
    TicketGranted,
    TicketRefused,
)
from router.core.lifecycle import InvalidTransition, State, Trigger
from router.core.moves import CoreSettings
from router.core.placement import Decision, LeastPredictedWork, View
from tests.router.core.driving import (
    CACHED_AS,
    SETTINGS,
    TICKET,
    Drive,
    abort_on,
    deliver,
    demand,
    engine_request,
    forget,
    is_error,
    key,
    output,
    records,
    resend,
    submit,
)


@pytest.fixture
def drive() -> Drive:
    """One prefill and one decode worker are up."""
    drive = Drive()
    drive.members(("p", "prefill"), ("d", "decode"))
    drive.recover()
    assert drive.up("p") == []
    assert drive.up("d") == []
    return drive


def about(value: float) -> Any:
    return pytest.approx(value)


def handed_off(drive: Drive) -> None:
    """A request that decodes, with the tokens 1 and 2."""
    drive.arrive()
    drive.step("p", output(1, 0, [1], manifest=b"m"))
    drive.step("d", output(2, 1, [2]))


def only(commands: list[Any], kind: type) -> list[Any]:
    return [command for command in commands if isinstance(command, kind)]


def test_disaggregated_from_arrival_to_end(drive: Drive) -> None:
    assert drive.arrive() == [submit("p", 1, hand_off=True)]
    drive.now_s += 0.1
    assert drive.step("p", output(1, 0, [11], manifest=b"m")) == [
        deliver((0, 1, False)),
        submit("d", 2, [11], b"m"),
    ]
    drive.now_s += 0.1
    assert drive.step("d", output(2, 1, [12])) == [deliver((1, 1, False)), abort_on("p", 1)]
    assert drive.step("d", output(2, 2, [13, 14])) == [deliver((2, 2, False))]
    drive.now_s += 0.2
    assert drive.step("d", output(2, 4, [15], finish=Finish.LENGTH)) == [
        deliver((4, 1, True)),
        Ended(key(), End.COMPLETE, "", 5, about(0.1), about(0.4), about(0.075)),
    ]
    assert drive.pass_time(0.5) == []
    assert drive.pass_time(0.6) == [forget("p", 1), forget("d", 2)]


def test_a_prompt_up_to_the_threshold_runs_whole_on_decode(drive: Drive) -> None:
    assert drive.arrive(prompt_tokens=4) == [submit("d", 1, prompt_tokens=4)]
    assert drive.step("d", output(1, 0, [1])) == [deliver((0, 1, False))]
    assert drive.step("d", output(1, 1, [2], finish=Finish.STOP))[0] == deliver((1, 1, True))
    assert drive.arrive("b", prompt_tokens=5) == [
        submit("p", 1, hand_off=True, request_id="b", prompt_tokens=5)
    ]


@pytest.mark.parametrize("params", [{"max_tokens": 1}, {"prompt_logprobs": 0}])
def test_what_can_not_be_handed_off_runs_whole(drive: Drive, params: dict[str, Any]) -> None:
    assert drive.arrive(**params) == [submit("d", 1, **params)]


def test_a_prefill_that_ends_the_request_hands_nothing_off(drive: Drive) -> None:
    drive.arrive()
    commands = drive.step("p", output(1, 0, [1], finish=Finish.STOP))
    assert commands[0] == deliver((0, 1, True))
    assert [type(command) for command in commands[1:]] == [Ended]


def test_outputs_of_one_step_go_out_as_one_message_per_front(drive: Drive) -> None:
    drive.arrive("a", prompt_tokens=4)
    drive.arrive("b", prompt_tokens=4)
    (both,) = drive.step("d", output(1, 0, [1], "a"), output(1, 0, [2], "b"))
    assert [delivery.request_id for delivery in both.deliveries] == ["a", "b"]


# Roles are labels


def test_without_prefill_workers_a_request_runs_whole_and_says_why() -> None:
    for expected, reason in ((True, "prefill_down"), (False, "no_prefill_pool")):
        drive = Drive(CoreSettings(expect_prefill=expected, local_prefill_max_tokens=4))
        drive.up("d")
        assert drive.arrive() == [submit("d", 1)]
        (record,) = records(drive)
        assert [each.decision.reason for each in record.decisions] == [reason]


def test_without_decode_workers_a_prefill_worker_does_all() -> None:
    drive = Drive()
    drive.up("p")
    assert drive.arrive() == [submit("p", 1)]


def test_a_worker_of_another_engine_tag_gets_nothing() -> None:
    drive = Drive()
    drive.up("d", tag="vllm-9.9")
    assert drive.arrive() == []
    assert [worker.state for worker in drive.core.pool] == [
        "unusable: speaks vllm-9.9, this router vllm-0.32"
    ]


def test_a_draining_worker_keeps_what_it_has_and_gets_nothing_new(drive: Drive) -> None:
    drive.arrive(prompt_tokens=4)
    drive.members(("p", "prefill"), ("d", "decode", True))
    assert drive.step("d", output(1, 0, [1])) == [deliver((0, 1, False))]
    assert drive.arrive("b", prompt_tokens=4) == [submit("p", 1, request_id="b", prompt_tokens=4)]


def test_work_is_spread_by_what_is_reserved_and_reported(drive: Drive) -> None:
    drive.up("d2")
    assert only(drive.arrive("a", prompt_tokens=4), Submit)[0].worker == "d"
    assert only(drive.arrive("b", prompt_tokens=4), Submit)[0].worker == "d2"
    drive.step("d", load=EngineLoad(running=5, kv_blocks_total=10))
    assert only(drive.arrive("c", prompt_tokens=4), Submit)[0].worker == "d2"


# Waiting


def test_with_no_worker_it_waits_in_order_and_then_fails() -> None:
    drive = Drive()
    assert drive.arrive("a", prompt_tokens=4) == []
    drive.pass_time(20)
    assert drive.arrive("b", prompt_tokens=4) == []
    told, ended = drive.pass_time(10)
    assert is_error(told, 0)
    assert ended.end is End.FAILED
    assert ended.error == "No worker could take it within 30 s."
    assert drive.up("d") == [submit("d", 1, request_id="b", prompt_tokens=4)]


def test_a_handoff_waits_while_there_is_no_decode_worker(drive: Drive) -> None:
    drive.arrive()
    drive.members(("p", "prefill", True), ("d", "decode"))
    drive.dead("d")
    assert drive.step("p", output(1, 0, [1], manifest=b"m")) == [deliver((0, 1, False))]
    assert drive.up("d", incarnation=2) == [submit("d", 2, [1], b"m")]


def test_the_decode_worker_is_chosen_again_if_it_is_gone_when_the_handoff_is_due(
    drive: Drive,
) -> None:
    drive.arrive()
    drive.up("d2")
    drive.dead("d")
    assert drive.step("p", output(1, 0, [1], manifest=b"m"))[1] == submit("d2", 2, [1], b"m")


# Aborts


def test_an_abort_frees_blocks_only_after_their_reader_was_told_to_stop(drive: Drive) -> None:
    """Refilled under a read, they would be cached there as this prompt's."""
    drive.arrive()
    drive.step("p", output(1, 0, [1], manifest=b"m"))
    assert drive.feed(RequestAborted(key())) == [
        abort_on("d", 2),
        forget("d", 2),
    ]
    assert drive.step("d", output(2, 1, [2])) == []
    assert drive.core.moves.counts.fenced_outputs == 1
    assert drive.pass_time(0.5) == []
    assert drive.pass_time(0.6) == [abort_on("p", 1), forget("p", 1)]


@pytest.mark.parametrize("state", ["waiting", "prefilling", "decoding"])
def test_aborts_in_every_state(drive: Drive, state: str) -> None:
    if state == "waiting":
        drive.dead("p")
        drive.dead("d")
    drive.arrive()
    if state == "decoding":
        drive.step("p", output(1, 0, [1], manifest=b"m"))
        drive.step("d", output(2, 1, [2]))
    aborted = only(drive.feed(RequestAborted(key())), AbortOn)
    expected = {
        "waiting": [], "prefilling": [abort_on("p", 1)], "decoding": [abort_on("d", 2)]
    }  # fmt: skip
    assert aborted == expected[state]
    assert drive.core.moves.requests == {}


def test_a_front_that_ends_takes_its_requests_with_it(drive: Drive) -> None:
    drive.arrive()
    drive.feed(RequestArrived(key("b", front=1), demand("b"), TICKET))
    assert only(drive.feed(FrontGone(1)), AbortOn) == [abort_on("p", 1, request_id="b", front=1)]
    assert list(drive.core.moves.requests) == [key()]


# Errors


def test_an_engines_error_reaches_the_client_and_the_record(drive: Drive) -> None:
    drive.arrive(prompt_tokens=4)
    told, ended = drive.step("d", output(1, 0, finish=Finish.ERROR, error="It broke."))
    assert is_error(told, 0)
    assert (ended.end, ended.error) == (End.FAILED, "It broke.")


def test_an_engine_that_aborts_by_itself_never_looks_like_an_orderly_end(drive: Drive) -> None:
    drive.arrive(prompt_tokens=4)
    told, ended = drive.step("d", output(1, 0, finish=Finish.ABORTED))
    assert is_error(told, 0)
    assert ended.end is End.FAILED


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"pooling_params": {}}, "Only generation"),
        ({"mm_features": [1]}, "Images"),
        ({"prompt_embeds": b"x"}, "embeddings"),
        ({"lora_request": {}}, "Adapters"),
        ({"prompt_token_ids": []}, "empty"),
        ({"prompt_token_ids": [0] * 1000}, "1000 tokens"),
    ],
)
def test_what_is_refused(drive: Drive, change: dict[str, object], words: str) -> None:
    request = engine_request("a")
    for name, value in change.items():
        setattr(request, name, value)
    told, ended = drive.feed(RequestArrived(key(), admission.read(request, CACHED_AS), TICKET))
    assert is_error(told, 0)
    assert words in ended.error


def test_a_request_without_a_ticket_is_refused(drive: Drive) -> None:
    told, ended = drive.feed(RequestArrived(key(), demand("a"), None))
    assert is_error(told, 0)
    assert "ticket" in ended.error


def test_engine_internal_fields_never_reach_an_engine(drive: Drive) -> None:
    extra = {"kv_transfer_params": {"remote_host": "x"}, "baton_output_token_ids": [1], "own": 2}
    request = engine_request("a", extra_args=extra)
    request.priority, request.data_parallel_rank, request.kv_hints = -5, 3, {"x": 1}
    request.abort_immediately = request.resumable = True
    (sent,) = drive.feed(RequestArrived(key(), admission.read(request, CACHED_AS), TICKET))
    got: EngineRequest = decode_request(sent.engine_request)
    assert got.sampling_params == {"max_tokens": 8, "extra_args": {"own": 2}}
    assert (got.priority, got.data_parallel_rank, got.kv_hints) == (0, None, None)
    assert not got.abort_immediately
    assert not got.resumable


def test_an_invalid_transition_tells_the_story(drive: Drive) -> None:
    drive.arrive()
    request = drive.core.moves.requests[key()]
    assert request.state is State.PREFILLING
    with pytest.raises(InvalidTransition, match=r"arrived\n.*attempt 1 on p"):
        request.advance(drive.now_s, Trigger.RESUMED)


# Fencing and order


def test_outputs_of_older_attempts_and_incarnations_are_dropped(drive: Drive) -> None:
    handed_off(drive)
    assert drive.step("p", output(1, 1, [9])) == []
    assert drive.step("d", output(1, 2, [9])) == []
    assert drive.step("d", output(2, 2, [9]), incarnation=7) == []
    assert drive.core.moves.counts.fenced_outputs == 3


def test_repeated_outputs_are_dropped_and_missing_ones_asked_for_once(drive: Drive) -> None:
    handed_off(drive)
    assert drive.step("d", output(2, 1, [2])) == []
    assert drive.step("d", output(2, 3, [4])) == [resend("d", 2, 2)]
    assert drive.step("d", output(2, 4, [5])) == []
    assert drive.step("d", output(2, 2, [3]), output(2, 3, [4])) == [
        deliver((2, 1, False), (3, 1, False))
    ]


def test_an_end_that_is_sent_again_with_known_tokens_still_ends_it(drive: Drive) -> None:
    handed_off(drive)
    commands = drive.step("d", output(2, 1, [2], finish=Finish.STOP))
    assert commands[0] == deliver((1, 1, True))
    assert commands[1].end is End.COMPLETE


# Tickets


def test_tickets_are_refused_while_nobody_can_serve() -> None:
    drive = Drive()
    asked = TicketAsked(TICKET, "POST", "/v1/completions")
    refused = TicketRefused(503, 5, "No worker can serve the request now.", TICKET)
    assert drive.feed(asked) == [refused]
    drive.members(("d", "decode"))
    assert drive.feed(asked) == [TicketGranted(TICKET)]  # Just started: it may be up any moment.
    drive.pass_time(6)
    assert drive.feed(asked) == [refused]
    drive.up("d")
    assert drive.feed(asked) == [TicketGranted(TICKET)]
    drive.broken("d")
    assert drive.feed(asked) == [TicketGranted(TICKET)]  # Its link may be back soon.
    drive.dead("d")
    assert drive.feed(asked) == [refused]


# Records


def test_the_record_tells_decisions_attempts_and_end(drive: Drive) -> None:
    drive.feed(TicketAsked(TICKET, "POST", "/v1/completions"))
    handed_off(drive)
    drive.step("d", output(2, 2, [3], finish=Finish.LENGTH))
    story = drive.core.book.find(f"cmpl-{TICKET}-0")
    assert story is not None
    told = story.as_json(wall_offset_s=1000.0)
    assert told["path"] == "/v1/completions"
    (request,) = told["requests"]
    assert request["arrived_at"] == 1100.0
    assert request["end"] == "complete"
    assert [(a["worker"], a["injected_tokens"]) for a in request["attempts"]] == [
        ("p", 0),
        ("d", 1),
    ]
    (decision,) = request["decisions"]
    assert (decision["reason"], decision["prefill"], decision["worker"]) == (
        "long_prompt",
        "p",
        "d",
    )
    assert [each["worker"] for each in decision["candidates"]] == ["p", "d"]


def test_records_are_bounded_and_those_under_way_stay(drive: Drive) -> None:
    drive.arrive("first", prompt_tokens=4)
    for number in range(SETTINGS.kept_records + 50):
        ticket = TicketId(f"{number:032x}")
        drive.feed(TicketAsked(ticket, "POST", "/"))
    assert drive.core.book.find(TICKET) is not None
    assert drive.core.book.find(f"{0:032x}") is None


class _Fetching(LeastPredictedWork):
    """Has each prompt's worker fetch the first of its blocks."""

    def place(self, now_s: float, view: View, key: RequestKey, shape: Shape) -> Decision | None:
        decision = super().place(now_s, view, key, shape)
        assert decision is not None
        return replace(decision, fetch=PrefixFetch(WorkerId("p2"), 1))


def fetching(settings: CoreSettings) -> Drive:
    drive = Drive(settings, _Fetching(lambda n: 0))
    drive.members(("p", "prefill"), ("d", "decode"))
    drive.recover()
    drive.up("p")
    drive.up("d")
    return drive


def test_a_prefix_is_fetched_where_workers_can() -> None:
    drive = fetching(replace(SETTINGS, fetches_prefixes=True))
    expected = replace(submit("p", 1, hand_off=True), fetch=PrefixFetch(WorkerId("p2"), 1))
    assert drive.arrive() == [expected]


def test_a_policy_must_not_have_workers_fetch_that_cannot() -> None:
    with pytest.raises(AssertionError, match="fetch a prefix, which these workers can't"):
        fetching(SETTINGS).arrive()
