"""What waits at other routers: told, believed for a while, and first if it is due first."""

from __future__ import annotations

from dataclasses import replace

import pytest

from engine.base import (
    NOTHING_PLACED,
    NOTHING_QUEUED,
    QUEUE_REPEATED_S,
    QUEUE_VALID_S,
    EngineLoad,
    PlacedWork,
    Queued,
)
from protos.ids import Incarnation, TicketId, WorkerId
from router.core.backlog import Backlog, Before, Waiting
from router.core.elsewhere import CLOSE_S, Elsewhere
from router.core.events import (
    RequestArrived,
    StepReported,
    Submit,
    TellQueued,
    Terms,
    TicketAsked,
    TicketRefused,
)
from router.core.gate import Promises
from tests.router.core.driving import SETTINGS, TICKET, Drive, demand, key
from tests.router.core.joint_bench import SLO, Bench

WORKER = WorkerId("d")
TERMS = Terms(body_bytes=100)
OTHERS = PlacedWork(routers=1)
BUSY = PlacedWork(prompts=1, prompt_tokens=50_000, prompt_pairs=50_000 * 25_000, routers=1)


class Queue:
    """A router's backlog and what it knows of others'."""

    def __init__(self) -> None:
        (self.worker,) = Bench("d").pool
        self.backlog = Backlog()
        self.elsewhere = Elsewhere(self.backlog)
        self.now_s = 100.0

    def wait(self, name: str, due_s: float, prefill_s: float = 0.5) -> None:
        self.backlog.add(key(name), Waiting("t", due_s, prefill_s=prefill_s))

    def hear(self, queued: Queued, others: PlacedWork = OTHERS) -> None:
        self.worker.others, self.worker.queued_beside = others, queued
        self.elsewhere.hear(self.now_s, self.worker)

    def is_first(self) -> bool:
        return self.elsewhere.is_first(self.now_s)

    def before(self, due_s: float, here: Before) -> Before:
        return self.elsewhere.before(self.now_s, due_s, here)

    def tell(self, to: str = "d") -> list[TellQueued]:
        return self.elsewhere.tell(self.now_s, WorkerId(to))


@pytest.mark.parametrize(("earlier_s", "first"), [(1.0, True), (CLOSE_S / 2, False), (-1.0, False)])
def test_who_is_due_first_goes_first(earlier_s: float, first: bool) -> None:
    queue = Queue()
    queue.wait("a", due_s=105.0)
    queue.hear(Queued(1, 0.5, 5.0 - earlier_s))
    assert queue.is_first() is first


def test_who_is_overdue_gives_way_to_nobody() -> None:
    queue = Queue()
    queue.wait("a", due_s=105.0)
    queue.hear(Queued(9, 4.5, -50.0))
    assert queue.is_first()
    queue.now_s = 105.0
    assert not queue.is_first()


def test_who_has_nothing_to_give_way_with_goes_on() -> None:
    queue = Queue()
    queue.hear(Queued(1, 0.5, -1.0))
    assert not queue.is_first()


def test_the_earliest_of_several_workers_counts_and_one_that_says_nothing_waits_is_over() -> None:
    queue = Queue()
    queue.wait("a", due_s=105.0)
    queue.hear(Queued(1, 0.5, 9.0))
    (other,) = Bench("d2").pool
    other.others, other.queued_beside = OTHERS, Queued(3, 2.0, 1.0)
    queue.elsewhere.hear(queue.now_s, other)
    assert queue.is_first()
    other.queued_beside = NOTHING_QUEUED
    queue.elsewhere.hear(queue.now_s, other)
    assert not queue.is_first()


def test_a_worker_that_says_no_more_is_not_believed_for_long() -> None:
    queue = Queue()
    queue.wait("a", due_s=105.0)
    queue.hear(Queued(1, 0.5, 1.0))
    queue.now_s += QUEUE_VALID_S - 0.01
    assert queue.is_first()
    assert queue.before(105.0, Before(0.5, 1)) == Before(1.0, 2)
    queue.now_s += 0.02
    assert not queue.is_first()
    assert queue.before(105.0, Before(0.5, 1)) == Before(0.5, 1)


def test_one_that_is_gone_is_not_believed_at_all() -> None:
    queue = Queue()
    queue.wait("a", due_s=105.0)
    queue.hear(Queued(1, 0.5, 1.0))
    queue.elsewhere.forget(WORKER)
    assert not queue.is_first()


def test_of_what_waits_elsewhere_as_large_a_part_goes_before_as_here() -> None:
    queue = Queue()
    here = Before(2.0, 4)
    assert queue.before(102.0, here) == here
    queue.hear(Queued(10, 6.0, 1.0))
    # Nothing waits here that goes before it.
    assert queue.before(102.0, Before()) == Before(6.0, 10)
    for number in range(9):
        queue.wait(str(number), due_s=105.0)
    assert queue.before(102.0, here) == Before(2.0 + 3.0, 4 + 5)
    # It is due before all that wait there.
    assert queue.before(100.9, Before()) == Before()


def test_a_router_alone_tells_nobody() -> None:
    queue = Queue()
    queue.hear(NOTHING_QUEUED, NOTHING_PLACED)
    queue.wait("a", due_s=105.0)
    assert queue.tell() == []


def test_who_hears_of_a_router_without_work_tells_it_too() -> None:
    queue = Queue()
    queue.hear(Queued(1, 0.5, 1.0), NOTHING_PLACED)
    queue.wait("a", due_s=105.0)
    assert queue.tell() == [TellQueued(WORKER, Queued(1, 0.5, 5.0))]


def test_a_queue_is_told_when_it_changes_and_now_and_then_until_it_is_empty() -> None:
    queue = Queue()
    queue.hear(NOTHING_QUEUED)
    assert queue.tell() == []
    queue.wait("a", due_s=105.0)
    assert queue.tell() == [TellQueued(WORKER, Queued(1, 0.5, 5.0))]
    assert queue.tell() == []
    queue.wait("b", due_s=104.0)
    assert queue.tell() == [TellQueued(WORKER, Queued(2, 1.0, 4.0))]
    queue.now_s += QUEUE_REPEATED_S / 2
    assert queue.tell() == []
    queue.now_s += QUEUE_REPEATED_S
    (again,) = queue.tell()
    assert again.queued.first_due_in_s == pytest.approx(4.0 - 1.5 * QUEUE_REPEATED_S)
    queue.backlog.remove(key("a"))
    queue.backlog.remove(key("b"))
    assert queue.tell() == [TellQueued(WORKER, NOTHING_QUEUED)]
    assert queue.tell() == []


def test_a_worker_that_is_not_the_one_to_be_told_any_more_hears_so() -> None:
    queue = Queue()
    queue.hear(NOTHING_QUEUED)
    queue.wait("a", due_s=105.0)
    queue.tell()
    told = Queued(1, 0.5, 5.0)
    new = WorkerId("d0")
    assert queue.tell("d0") == [TellQueued(WORKER, NOTHING_QUEUED), TellQueued(new, told)]
    queue.backlog.remove(key("a"))
    # The last one went as yet another took its place.
    assert queue.tell() == [TellQueued(new, NOTHING_QUEUED)]
    assert queue.tell() == []


# Through the core


def report(drive: Drive, others: PlacedWork, queued: Queued = NOTHING_QUEUED) -> list[object]:
    return drive.feed(StepReported(WORKER, Incarnation(1), (), EngineLoad(), others, queued))


@pytest.fixture
def drive() -> Drive:
    settings = replace(SETTINGS, promises=Promises(SLO.ttft_s, SLO.tpot_s))
    drive = Drive(settings, Bench("d1", hold=0.15).policy)
    drive.members(("d", "decode"))
    drive.recover()
    drive.up("d")
    return drive


def submitted(commands: list[object]) -> list[str]:
    return [command.key for command in commands if isinstance(command, Submit)]


def test_one_that_comes_waits_for_who_is_due_first_elsewhere(drive: Drive) -> None:
    report(drive, OTHERS, Queued(1, 0.1, 1.0))
    (told,) = drive.arrive("a")
    assert isinstance(told, TellQueued)
    assert told.worker == WORKER
    assert told.queued.requests == 1
    assert told.queued.first_due_in_s == pytest.approx(SLO.ttft_s)
    # The other went on, and what waits there now is due later.
    commands = report(drive, OTHERS, Queued(1, 0.1, 3.0))
    assert submitted(commands) == [key("a")]
    assert commands[-1] == TellQueued(WORKER, NOTHING_QUEUED)


def test_one_that_is_due_first_of_all_is_placed_at_once(drive: Drive) -> None:
    report(drive, OTHERS, Queued(5, 0.1, SLO.ttft_s + 1))
    assert submitted(drive.arrive("a")) == [key("a")]


def test_nobody_waits_for_a_router_that_is_not_heard_any_more(drive: Drive) -> None:
    report(drive, OTHERS, Queued(1, 0.1, 0.1))
    assert submitted(drive.arrive("a")) == []
    assert submitted(drive.pass_time(QUEUE_VALID_S / 2)) == []
    assert submitted(drive.pass_time(QUEUE_VALID_S)) == [key("a")]


def test_a_router_that_does_not_reach_all_workers_keeps_nobody_waiting(drive: Drive) -> None:
    report(drive, BUSY, Queued(1, 0.1, 0.1))
    assert TellQueued in {type(command) for command in drive.arrive("a")}
    assert drive.members(("d", "decode"), ("d2", "decode")) == [TellQueued(WORKER, NOTHING_QUEUED)]
    drive.up("d2")
    drive.broken("d2")
    assert TellQueued not in {type(command) for command in drive.pass_time(QUEUE_REPEATED_S)}
    (told,) = drive.members(("d", "decode"))
    assert told.queued.requests == 1


def test_who_gives_way_is_not_put_behind_for_what_held_it_back_before(drive: Drive) -> None:
    """As long as another router goes first nothing is known of what is before its prompt."""
    report(drive, BUSY)
    asked = TicketAsked(TICKET, "POST", "/v1/completions", TERMS)
    drive.feed(asked)
    drive.feed(RequestArrived(key("a"), demand("a"), TICKET, terms=TERMS))
    assert key("a") in drive.core.moves.backlog
    due_s = drive.core.moves.backlog.first_due_s
    drive.now_s = due_s - 0.1
    for _ in range(2):
        report(drive, OTHERS, Queued(1, 0.1, -1.0))
        drive.pass_time(0.0)
    assert drive.core.moves.backlog.first_due_s == due_s


def test_what_a_worker_said_is_gone_with_it(drive: Drive) -> None:
    drive.members(("d", "decode"), ("d2", "decode"))
    drive.up("d2")
    report(drive, OTHERS, Queued(1, 0.1, 0.1))
    assert submitted(drive.arrive("a")) == []
    drive.broken("d")
    assert submitted(drive.pass_time(0.01)) == [key("a")]


def test_of_several_tenants_at_a_router_the_backlog_says_who_takes_its_turn(drive: Drive) -> None:
    """The earliest decides when its turn comes, and who got least takes it."""
    report(drive, BUSY, Queued(1, 0.1, 0.5))
    for name, tenant in (("a", "rich"), ("b", "poor")):
        ticket = TicketId(f"{name:0>44}")
        terms = replace(TERMS, tenant=tenant)
        drive.feed(TicketAsked(ticket, "POST", "/v1/completions", terms))
        drive.feed(RequestArrived(key(name), demand(name), ticket, terms=terms))
        drive.now_s += 0.2
    drive.core.moves.backlog.charge("rich", 10_000)
    assert submitted(report(drive, OTHERS, Queued(1, 0.1, SLO.ttft_s - 0.3))) == [
        key("b"),
        key("a"),
    ]


def test_a_ticket_is_refused_for_what_waits_elsewhere(drive: Drive) -> None:
    asked = TicketAsked(TICKET, "POST", "/v1/completions", TERMS)
    report(drive, OTHERS, Queued(50, 2 * SLO.ttft_s, 0.5))
    assert isinstance(drive.feed(asked)[-1], TicketRefused)
    report(drive, OTHERS, NOTHING_QUEUED)
    assert not isinstance(drive.feed(asked)[-1], TicketRefused)
