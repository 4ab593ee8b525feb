"""Workers whose weights differ share nothing: no request, no hit, no KV state."""

from __future__ import annotations

import dataclasses

import pytest

from protos.ids import Incarnation, WorkerId
from router.core.events import Ended, Fault, Finish, MemberFacts, MembershipChanged, Role
from tests.router.core.driving import SETTINGS, Drive, held, is_error, output, submit


def tell(drive: Drive, *members: str, draining: str = "") -> None:
    """A name is the role's letter, the age (0: the oldest), and the weights: p0old."""
    facts = [
        MemberFacts(
            WorkerId(name), Role.PREFILL if name[0] == "p" else Role.DECODE, name in draining,
            Incarnation(int(name[1])), name[2:],
        )
        for name in members
    ]  # fmt: skip
    drive.feed(MembershipChanged(tuple(facts)))


@pytest.fixture
def drive() -> Drive:
    drive = Drive()
    tell(drive, "d3new", "p1old", "d2old", "p4new")
    drive.recover()
    for worker in ("d3new", "p1old", "d2old", "p4new"):
        drive.up(worker)
    return drive


def states(drive: Drive) -> dict[str, str]:
    return {str(worker.id): worker.state for worker in drive.core.pool}


def test_the_oldest_workers_weights_are_served(drive: Drive) -> None:
    assert drive.core.pool.weights == "old"
    unusable = "unusable: has the weights new, others are served"
    assert states(drive) == {
        "p1old": "serving", "d2old": "serving", "d3new": unusable, "p4new": unusable,
    }  # fmt: skip
    assert drive.core.pool.members_of_other_weights == ["d3new", "p4new"]
    assert drive.arrive() == [submit("p1old", 1, hand_off=True)]
    drive.step("p1old", output(1, 0, [1], finish=Finish.LENGTH, manifest=b"m"))
    (request,) = drive.core.moves.requests.values()
    assert request.current is not None
    assert request.current.worker.id == "d2old"


def test_who_has_others_is_no_reason_to_wait_for_health(drive: Drive) -> None:
    assert drive.core.not_healthy_because() == []
    drive.dead("p1old")
    assert drive.core.not_healthy_because() == [
        "no prefill worker is up",
        "d3new, p4new: other weights than those served",
    ]


def test_others_are_served_once_nobody_has_these_or_all_who_have_drain(drive: Drive) -> None:
    tell(drive, "d3new", "p1old", "d2old", "p4new", draining="p1old")
    assert drive.core.pool.weights == "old"
    tell(drive, "d3new", "p1old", "d2old", "p4new", draining="p1old d2old")
    assert drive.core.pool.weights == "new"
    assert drive.arrive() == [submit("p4new", 1, hand_off=True)]


def test_what_others_gave_a_token_is_not_gone_on_with(drive: Drive) -> None:
    drive.arrive()
    tell(drive, "d3new", "p4new")
    drive.dead("d2old")
    told, *_, ended = drive.step("p1old", output(1, 0, [1], finish=Finish.LENGTH, manifest=b"m"))
    assert [(each.first_position, each.finished) for each in told.deliveries] == [
        (0, False), (1, True),
    ]  # fmt: skip
    assert isinstance(ended, Ended)
    assert (ended.fault, ended.error) == (
        Fault.WORKER_LOST, "The weights that it began with are not served any more."
    )  # fmt: skip


def test_what_has_no_token_begins_again_on_others(drive: Drive) -> None:
    drive.arrive()
    tell(drive, "d3new", "p4new")
    assert drive.dead("p1old") == [submit("p4new", 2, hand_off=True)]


def test_a_router_that_starts_goes_on_only_with_the_same_weights() -> None:
    drive = Drive(dataclasses.replace(SETTINGS, resume_streams=True))
    tell(drive, "d2old", "d3new", draining="d2old")
    drive.recover(("a", 2))
    drive.up("d2old", held=[held(1, 0, 3)])
    drive.up("d3new")
    assert drive.core.pool.weights == "new"
    drive.step("d2old", output(1, 0, [1]), output(1, 1, [2]))
    told, *_, ended = drive.dead("d2old")
    assert is_error(told, 2)
    assert ended.error == "The weights that it began with are not served any more."
