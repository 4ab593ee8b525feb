"""How requests end, told honestly: stop strings, clients that left, deadlines, refusals, limits."""

from __future__ import annotations

from dataclasses import replace

import pytest

from protos.ids import TicketId
from router.core.endings import EDGE_SAYS_WITHIN_S
from router.core.events import (
    AbortOn,
    EdgeEnded,
    End,
    Ended,
    Fault,
    Finish,
    FrontGone,
    RequestAborted,
    RequestArrived,
    RequestRecovered,
    SnapshotTaken,
    TicketAsked,
    TicketGranted,
    TicketRefused,
)
from tests.router.core.driving import (
    SETTINGS,
    TICKET,
    Drive,
    abort_on,
    demand,
    is_error,
    key,
    output,
    records,
)


@pytest.fixture
def drive() -> Drive:
    drive = Drive()
    drive.members(("p", "prefill"), ("d", "decode"))
    drive.up("p")
    drive.up("d")
    return drive


def ends(commands: list[object]) -> list[Ended]:
    return [command for command in commands if isinstance(command, Ended)]


def edge(termination: str, status: str = "200", ticket: TicketId = TICKET) -> EdgeEnded:
    return EdgeEnded(ticket, status, termination)


@pytest.mark.parametrize(
    ("event", "end"),
    [
        (edge("--"), End.COMPLETE),
        (edge("CD"), End.CANCELLED),
        (edge("SD"), End.CANCELLED),
        (edge("--", "500"), End.CANCELLED),
    ],
)
@pytest.mark.parametrize("edge_first", [True, False])
def test_the_edge_tells_a_stop_string_from_a_client_that_left(
    drive: Drive, event: EdgeEnded, end: End, edge_first: bool
) -> None:
    drive.arrive(prompt_tokens=4)
    drive.step("d", output(1, 0, [1, 2]))
    events = [event, RequestAborted(key())] if edge_first else [RequestAborted(key()), event]
    commands = [command for each in events for command in drive.feed(each)]
    assert abort_on("d", 1) in commands
    (ended,) = ends(commands)
    assert (ended.end, ended.output_tokens) == (end, 2)
    assert records(drive)[0].end is end
    assert ends(drive.pass_time(EDGE_SAYS_WITHIN_S + 1)) == []


def test_without_the_edges_word_its_client_left(drive: Drive) -> None:
    drive.arrive(prompt_tokens=4)
    assert ends(drive.feed(RequestAborted(key()))) == []
    assert ends(drive.pass_time(EDGE_SAYS_WITHIN_S / 2)) == []
    (ended,) = ends(drive.pass_time(EDGE_SAYS_WITHIN_S))
    assert ended.end is End.CANCELLED
    assert drive.feed(edge("--")) == []  # Too late: it was told once.


def test_one_word_of_the_edge_ends_all_requests_of_its_ticket(drive: Drive) -> None:
    drive.arrive("a", prompt_tokens=4)
    drive.arrive("b", prompt_tokens=4)
    drive.feed(RequestAborted(key("a")))
    drive.feed(RequestAborted(key("b")))
    told = ends(drive.feed(edge("--")))
    assert [(each.key, each.end) for each in told] == [
        (key("a"), End.COMPLETE),
        (key("b"), End.COMPLETE),
    ]


def arrive_until(drive: Drive, deadline_s: float) -> None:
    drive.feed(RequestArrived(key(), demand("a", 4), TICKET, deadline_s))


def test_a_deadline_ends_a_request_with_an_error(drive: Drive) -> None:
    arrive_until(drive, drive.now_s + 1.0)
    drive.step("d", output(1, 0, [1, 2]))
    assert drive.pass_time(0.9) == []
    told, aborted, ended = drive.pass_time(0.2)
    assert is_error(told, 2)
    assert aborted == abort_on("d", 1)
    assert (ended.end, ended.fault) == (End.FAILED, Fault.DEADLINE)


def test_a_deadline_ends_a_request_that_waits_for_a_worker() -> None:
    drive = Drive()
    drive.members(("d", "decode"))
    arrive_until(drive, drive.now_s + 1.0)
    told, ended = drive.pass_time(1.1)
    assert is_error(told, 0)
    assert ended.fault is Fault.DEADLINE


def test_a_request_that_kept_its_deadline_is_left_alone(drive: Drive) -> None:
    arrive_until(drive, drive.now_s + 1.0)
    drive.step("d", output(1, 0, [1], finish=Finish.STOP))
    assert not [c for c in drive.pass_time(2.0) if isinstance(c, AbortOn | Ended)]


def test_a_deadline_outlives_the_router() -> None:
    drive = Drive()
    drive.members(("d", "decode"))
    deadline_s = drive.now_s + 1.0
    asked = demand("a", 4)
    drive.feed(SnapshotTaken((RequestRecovered(key(), asked, TICKET, 3, deadline_s),)))
    told, ended = drive.pass_time(1.1)
    assert is_error(told, 3)
    assert ended.fault is Fault.DEADLINE


@pytest.mark.parametrize(
    ("finish", "fault"), [(Finish.REFUSED, Fault.REFUSED), (Finish.ERROR, Fault.ENGINE)]
)
def test_what_a_worker_refuses_is_not_the_engines_fault(
    drive: Drive, finish: Finish, fault: Fault
) -> None:
    drive.arrive(prompt_tokens=4)
    commands = drive.step("d", output(1, 0, finish=finish, error="Token 9 is none."))
    (ended,) = ends(commands)
    assert (ended.fault, ended.error) == (fault, "Token 9 is none.")
    story = drive.core.book.find(TICKET)
    assert story is not None
    assert story.failure is records(drive)[0]


def test_a_front_that_ends_takes_its_requests_along(drive: Drive) -> None:
    drive.arrive(prompt_tokens=4)
    commands = drive.feed(FrontGone(0))
    (ended,) = ends(commands)
    assert (ended.end, ended.fault) == (End.FAILED, Fault.FRONT_LOST)
    assert abort_on("d", 1) in commands


def test_no_ticket_beyond_the_limit() -> None:
    drive = Drive(replace(SETTINGS, max_requests=2))
    drive.members(("d", "decode"))
    drive.up("d")
    asked = TicketAsked(TICKET, "POST", "/v1/completions")
    drive.arrive("a", prompt_tokens=4)
    assert drive.feed(asked) == [TicketGranted(TICKET)]
    drive.arrive("b", prompt_tokens=4)
    (refused,) = drive.feed(asked)
    assert isinstance(refused, TicketRefused)
    assert (refused.status, refused.retry_after_s) == (429, 1)
    drive.step("d", output(1, 0, [1], finish=Finish.STOP))
    assert drive.feed(asked) == [TicketGranted(TICKET)]


def test_a_record_counts_tokens_while_they_come(drive: Drive) -> None:
    drive.arrive(prompt_tokens=4)
    drive.step("d", output(1, 0, [1, 2, 3]))
    assert records(drive)[0].output_tokens == 3
