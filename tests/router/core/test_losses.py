"""Workers and links that are lost, and routers that start anew: exact commands."""

from __future__ import annotations

import dataclasses

import pytest

from router.core.events import (
    End,
    Ended,
    Fault,
    Finish,
    Priority,
    RequestAborted,
    RequestRecovered,
    SnapshotTaken,
    Terms,
)
from tests.router.core.driving import (
    SETTINGS,
    TICKET,
    Drive,
    abort_on,
    deliver,
    demand,
    forget,
    held,
    is_error,
    key,
    output,
    records,
    resend,
    submit,
)


@pytest.fixture
def drive() -> Drive:
    """Two prefill and two decode workers are up; the first of each is preferred."""
    drive = Drive()
    drive.members(("p", "prefill"), ("p2", "prefill"), ("d", "decode"), ("d2", "decode"))
    drive.recover()
    for worker in ("p", "p2", "d", "d2"):
        drive.up(worker)
    return drive


# A worker dies


def test_a_prefill_that_gave_no_token_runs_elsewhere(drive: Drive) -> None:
    drive.arrive()
    assert drive.dead("p") == [submit("p2", 2, hand_off=True)]


def test_the_second_death_under_a_request_ends_it(drive: Drive) -> None:
    drive.up("p3")
    drive.arrive()
    drive.dead("p")
    told, ended = drive.dead("p2")
    assert is_error(told, 0)
    assert ended.error.startswith("It was on 2 workers as they died")


def test_a_restarted_worker_has_lost_what_its_earlier_incarnation_had(drive: Drive) -> None:
    drive.arrive()
    assert drive.up("p", incarnation=2) == [submit("p2", 2, hand_off=True)]
    assert drive.step("p", output(1, 0, [1]), incarnation=2) == []


def test_a_zombie_is_not_heard(drive: Drive) -> None:
    drive.up("p", incarnation=2)
    assert drive.up("p", incarnation=1, held=[held(1, 0, 1)]) == []
    assert drive.step("p", output(1, 0, [1]), incarnation=1) == []
    assert drive.arrive() == [submit("p", 1, hand_off=True)]


def test_prefill_lost_before_its_blocks_were_fetched_is_computed_again(drive: Drive) -> None:
    drive.arrive()
    drive.step("p", output(1, 0, [7], manifest=b"m"))
    assert drive.dead("p") == [
        abort_on("d", 2),
        forget("d", 2),
        submit("d", 3, [7]),
    ]
    assert drive.step("d", output(3, 1, [8])) == [deliver((1, 1, False))]


def test_prefill_lost_after_the_handoff_does_not_matter(drive: Drive) -> None:
    drive.arrive()
    drive.step("p", output(1, 0, [7], manifest=b"m"))
    drive.step("d", output(2, 1, [8]))
    assert drive.dead("p") == []


def test_decode_lost_before_it_spoke_is_resumed_elsewhere_by_injection(drive: Drive) -> None:
    drive.arrive()
    drive.step("p", output(1, 0, [7], manifest=b"m"))
    # The dead may live on unseen and read: the blocks are left to their lease.
    assert drive.dead("d") == [submit("d2", 3, [7])]


def test_a_stream_whose_worker_dies_ends_with_an_error(drive: Drive) -> None:
    drive.arrive(prompt_tokens=4)
    drive.step("d", output(1, 0, [1]))
    drive.step("d", output(1, 1, [2]))
    told, ended = drive.dead("d")
    assert is_error(told, 2)
    assert ended == Ended(key(), End.FAILED, ended.error, 2, 0.0, 0.0, 0.0, Fault.WORKER_LOST)
    assert "d is gone: killed" in ended.error


def test_resuming_streams_is_one_setting() -> None:
    drive = Drive(dataclasses.replace(SETTINGS, resume_streams=True))
    drive.up("d")
    drive.up("d2")
    drive.arrive(prompt_tokens=4)
    drive.step("d", output(1, 0, [1]), output(1, 1, [2]))
    assert drive.dead("d") == [submit("d2", 2, [1, 2], prompt_tokens=4)]


# A link breaks


def test_after_a_broken_link_only_what_is_missing_is_sent_again(drive: Drive) -> None:
    drive.arrive(prompt_tokens=4)
    drive.step("d", output(1, 0, [1]))
    assert drive.broken("d") == []
    assert drive.up("d", held=[held(1, 0, 3)]) == [resend("d", 1, 1)]
    assert drive.step("d", output(1, 1, [2]), output(1, 2, [3])) == [
        deliver((1, 1, False), (2, 1, False))
    ]


def test_a_submission_that_never_arrived_is_made_again(drive: Drive) -> None:
    drive.arrive(prompt_tokens=4)
    drive.broken("d")
    assert drive.up("d") == [submit("d", 2, prompt_tokens=4)]


def test_an_abort_while_the_link_is_broken_is_made_up_for(drive: Drive) -> None:
    drive.arrive()
    drive.step("p", output(1, 0, [7], manifest=b"m"))
    drive.broken("p")
    assert drive.step("d", output(2, 1, [8])) == [deliver((1, 1, False))]
    assert drive.up("p", held=[held(1, 0, 1, ended=True)]) == []


def test_what_a_worker_holds_and_nobody_wants_is_ended(drive: Drive) -> None:
    drive.broken("d")
    assert drive.up("d", held=[held(3, 0, 5, "gone")]) == [
        abort_on("d", 3, request_id="gone"),
        forget("d", 3, request_id="gone"),
    ]


# A router starts anew


def restarted(*given: tuple[str, int], workers: str = "pd") -> Drive:
    drive = Drive()
    roles = {"p": "prefill", "d": "decode"}
    drive.members(*[(worker, roles[worker]) for worker in workers])
    assert drive.recover(*given) == []
    return drive


def test_a_stream_goes_on_where_the_anchor_says_and_its_tokens_are_learned() -> None:
    drive = restarted(("a", 3))
    assert drive.up("d", held=[held(2, 1, 5)]) == []
    assert drive.up("p", held=[held(1, 0, 1, ended=True)]) == [resend("p", 1, 0)]
    assert drive.step("p", output(1, 0, [7], manifest=b"m")) == [
        abort_on("p", 1),
        resend("d", 2, 1),
    ]
    again = [output(2, position, [7 + position]) for position in range(1, 5)]
    assert drive.step("d", *again) == [deliver((3, 1, False), (4, 1, False))]
    request = drive.core.moves.requests[key()]
    assert request.tokens == [7, 8, 9, 10, 11]
    (told, _) = drive.step("d", output(2, 5, [12], finish=Finish.LENGTH))
    assert told == deliver((5, 1, True))


def test_a_stream_whose_first_tokens_nobody_holds_goes_on_all_the_same() -> None:
    drive = restarted(("a", 3))
    drive.dead("p", None)
    assert drive.up("d", held=[held(2, 1, 5)]) == [resend("d", 2, 1)]
    assert drive.step("d", output(2, 1, [8]), output(2, 2, [9]), output(2, 3, [10])) == [
        deliver((3, 1, False))
    ]


def test_a_finished_prefill_is_handed_off() -> None:
    drive = restarted(("a", 0))
    drive.up("d")
    assert drive.up("p", held=[held(1, 0, 1, ended=True)]) == [resend("p", 1, 0)]
    assert drive.step("p", output(1, 0, [7], manifest=b"m")) == [
        deliver((0, 1, False)),
        submit("d", 1002, [7], b"m"),
    ]


def test_a_handoff_in_progress_goes_on() -> None:
    drive = restarted(("a", 1))
    drive.up("d", held=[held(2, 1, 1)])
    assert drive.up("p", held=[held(1, 0, 1, ended=True)]) == [resend("p", 1, 0)]
    assert drive.step("p", output(1, 0, [7], manifest=b"m")) == [resend("d", 2, 1)]
    assert drive.step("d", output(2, 1, [8])) == [deliver((1, 1, False)), abort_on("p", 1)]


def test_what_no_worker_holds_starts_again_if_its_client_has_nothing() -> None:
    drive = restarted(("a", 0), ("b", 2))
    drive.up("d")
    told, started, ended = drive.up("p")
    assert is_error(told, 2, "b")
    assert started == submit("p", 1001, hand_off=True)
    assert ended.key == key("b")


def test_a_restart_waits_five_seconds_for_workers_that_do_not_answer() -> None:
    drive = restarted(("a", 0))
    drive.up("d")
    assert drive.pass_time(4.9) == []
    assert drive.pass_time(0.2) == [submit("d", 1001)]
    late = drive.up("p", held=[held(1, 0, 1, ended=True)])
    assert late == [forget("p", 1)]


def test_the_newest_attempt_wins() -> None:
    drive = restarted(("a", 4), workers="d")
    drive.members(("d", "decode"), ("d2", "decode"))
    drive.up("d", held=[held(1, 0, 9)])
    assert drive.up("d2", held=[held(3, 0, 4)]) == [
        abort_on("d", 1),
        forget("d", 1),
        resend("d2", 3, 0),
    ]


def test_an_attempt_that_was_aborted_is_not_gone_on_from() -> None:
    drive = restarted(("a", 1), workers="d")
    aborted = dataclasses.replace(held(2, 1, 2, ended=True), aborted=True)
    told, forgotten, _ = drive.up("d", held=[aborted])
    assert is_error(told, 1)
    assert forgotten == forget("d", 2)


def test_an_abort_during_recovery_reaches_every_holder() -> None:
    drive = restarted(("a", 3))
    drive.up("d", held=[held(2, 1, 5)])
    assert drive.feed(RequestAborted(key()))[:2] == [abort_on("d", 2), forget("d", 2)]
    assert drive.up("p", held=[held(1, 0, 1, ended=True)]) == [forget("p", 1)]


def test_a_holder_that_dies_during_recovery_is_left_out() -> None:
    drive = restarted(("a", 3))
    drive.up("d", held=[held(2, 1, 5)])
    drive.up("p", held=[held(1, 0, 1, ended=True)])
    assert drive.dead("p") == [resend("d", 2, 1)]
    assert drive.dead("d")[0].deliveries[0].finished


def test_a_recovered_request_keeps_its_terms() -> None:
    drive = Drive()
    terms = Terms(
        tenant="one", priority=Priority.HIGH, ttft_slo_s=3.0, tpot_slo_s=0.02, output_tokens=7
    )
    drive.feed(SnapshotTaken((RequestRecovered(key(), demand("a"), TICKET, 0, None, terms),)))
    (request,) = drive.core.moves.requests.values()
    assert (request.waits.tenant, request.waits.due_s) == ("one", drive.now_s + 1.5)
    assert (request.shape.ttft_slo_s, request.shape.tpot_slo_s) == (3.0, 0.02)
    assert request.shape.hinted_output_tokens == 7
    assert request.story.terms == terms


def test_a_recovered_request_keeps_its_record() -> None:
    drive = restarted(("a", 1), workers="d")
    drive.up("d", held=[held(1, 0, 2)])
    (record,) = records(drive)
    assert record.recovered
    assert "taken over" in record.tell()
