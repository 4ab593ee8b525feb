"""Tickets: what they certify, and what the edge is answered."""

from __future__ import annotations

import pytest

from protos.enginecore import EngineRequest
from protos.ids import RequestKey, TicketId
from router.core.events import (
    End,
    Fault,
    Priority,
    Terms,
    TicketAsked,
    TicketGranted,
    TicketRefused,
)
from router.core.records import Record, TicketStory
from router.tickets import LONGEST_DEADLINE_MS, TicketMint, answer, answer_line, left_s, reason_line

MINT = TicketMint("secret", ttl_s=60.0)
ISSUED_S = 1_700_000_000.25


def carrying(ticket: str) -> EngineRequest:
    request_id = f"cmpl-{ticket}-0a1b2c3d"
    return EngineRequest(request_id, [1], None, {}, None, 0.0, None, None, None)


def test_a_ticket_is_found_within_the_ids_that_fronts_make_of_it() -> None:
    ticket = MINT.issue(ISSUED_S)
    assert MINT.find(carrying(ticket), ISSUED_S + 1) == ticket
    assert MINT.find(carrying(ticket[:-1] + ("1" if ticket[-1] == "0" else "0")), ISSUED_S) is None
    assert MINT.find(carrying("f" * len(ticket)), ISSUED_S + 1) is None


def test_a_ticket_expires_but_not_for_what_is_under_way() -> None:
    ticket = MINT.issue(ISSUED_S)
    assert MINT.find(carrying(ticket), ISSUED_S + 61) is None
    assert MINT.find(carrying(ticket), ISSUED_S + 61, late=True) == ticket
    assert MINT.find(carrying(ticket), ISSUED_S - 6) is None


def test_another_cluster_can_not_make_tickets() -> None:
    forged = TicketMint("another", ttl_s=60.0).issue(ISSUED_S)
    assert MINT.find(carrying(forged), ISSUED_S) is None


def test_a_deadline_can_not_be_moved_by_who_holds_the_ticket() -> None:
    ticket = MINT.issue(ISSUED_S, deadline_ms=1500)
    assert left_s(ticket, ISSUED_S + 1) == pytest.approx(0.5)
    assert left_s(ticket, ISSUED_S + 2) == pytest.approx(-0.5)
    later = ticket[:12] + f"{9_000_000:08x}" + ticket[20:]
    assert MINT.find(carrying(later), ISSUED_S) is None


def test_without_a_deadline_there_is_always_time() -> None:
    assert left_s(MINT.issue(ISSUED_S), ISSUED_S + 1e6) is None
    assert left_s(None, ISSUED_S) is None


def ask(line: str) -> TicketGranted | TicketRefused:
    def grant(question: TicketAsked) -> TicketGranted:
        assert question.path == "/v1/completions"
        return TicketGranted(question.ticket)

    return answer(line, MINT, ISSUED_S, grant)


@pytest.mark.parametrize("deadline_ms", [1, 1500, LONGEST_DEADLINE_MS])
def test_a_deadline_is_taken_from_the_header(deadline_ms: int) -> None:
    granted = ask(f"v1\tPOST\t/v1/completions\tx-baton-deadline-ms={deadline_ms}")
    assert isinstance(granted, TicketGranted)
    assert left_s(granted.ticket, ISSUED_S) == pytest.approx(deadline_ms / 1000, abs=1e-5)


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "soon", "", "9" * 30, "\u0661", "86400001"])
def test_a_deadline_that_is_none_is_refused(text: str) -> None:
    refused = ask(f"v1\tPOST\t/v1/completions\tx-baton-deadline-ms={text}")
    assert isinstance(refused, TicketRefused)
    assert refused.status == 400
    assert "from 1 to 86400000" in refused.message


def terms_of(*fields: str) -> Terms:
    asked: list[TicketAsked] = []

    def grant(question: TicketAsked) -> TicketGranted:
        asked.append(question)
        return TicketGranted(question.ticket)

    answer("\t".join(("v1", "POST", "/v1/completions", *fields)), MINT, ISSUED_S, grant)
    return asked[0].terms


def test_what_headers_say_is_known_at_the_ticket() -> None:
    assert terms_of() == Terms()
    assert terms_of(
        "content-length=4096", "x-baton-priority=low", "x-baton-ttft-ms=1500", "x-baton-itl-ms=20"
    ) == Terms(4096, "", Priority.LOW, 1.5, 0.02)


def test_tenants_are_told_apart_by_keys_that_are_not_kept() -> None:
    one, other = (terms_of(f"authorization=Bearer {key}").tenant for key in ("one", "other"))
    assert one == terms_of("authorization=Bearer one").tenant
    assert one != other
    assert "one" not in one


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ("x-baton-ttft-ms=fast", "X-Baton-TTFT-Ms is a whole number of milliseconds from 1 to "),
        ("x-baton-itl-ms=0", "X-Baton-ITL-Ms is a whole number of milliseconds from 1 to "),
        ("x-baton-priority=urgent", "X-Baton-Priority is high, normal, low, not urgent."),
    ],
)
def test_headers_that_can_not_be_understood_are_refused(field: str, message: str) -> None:
    refused = ask(f"v1\tPOST\t/v1/completions\t{field}")
    assert isinstance(refused, TicketRefused)
    assert refused.status == 400
    assert refused.message.startswith(message)


def test_a_question_that_can_not_be_read_is_answered() -> None:
    refused = ask("v9\twhatever")
    assert isinstance(refused, TicketRefused)
    assert refused.status == 500


def failed(fault: Fault, error: str, ended_s: float = 1.0) -> Record:
    record = Record(RequestKey("0:a"), 0.0, 1, 1)
    record.end, record.fault, record.error, record.ended_s = End.FAILED, fault, error, ended_s
    return record


def test_the_reason_is_that_of_the_first_failure() -> None:
    story = TicketStory("t", 0.0)
    assert reason_line(story) == b"-\n"
    story.requests.append(failed(Fault.ENGINE, "later", ended_s=2.0))
    story.requests.append(failed(Fault.REFUSED, "Token 9\nis none.", ended_s=1.0))
    assert reason_line(story) == b"400\t-\tToken 9 is none.\n"
    assert reason_line(None) == b"-\n"


@pytest.mark.parametrize("fault", Fault)
def test_every_fault_has_a_status(fault: Fault) -> None:
    story = TicketStory("t", 0.0)
    story.requests.append(failed(fault, "why"))
    status, retry_after, message = reason_line(story).decode().rstrip("\n").split("\t")
    assert 400 <= int(status) < 600
    assert retry_after == "-" or int(retry_after) > 0
    assert message == "why"


def test_answers_as_the_edge_reads_them() -> None:
    assert answer_line(TicketGranted(TicketId("abc"))) == b"200\tabc\n"
    assert answer_line(TicketRefused(429, 1, "Busy.")) == b"429\t1\tBusy.\n"
