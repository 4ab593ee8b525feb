"""What the edge is answered."""

from __future__ import annotations

from dataclasses import replace

import pytest

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
from router.ticket_mint import LONGEST_DEADLINE_MS, TicketMint
from router.tickets import answer, answer_line, reason_line
from tests.router.test_ticket_mint import carrying

MINT = TicketMint("secret", ttl_s=60.0)
ISSUED_S = 1_700_000_000.25


def ask(line: str) -> TicketGranted | TicketRefused:
    def grant(question: TicketAsked) -> TicketGranted:
        assert question.path == "/v1/completions"
        return TicketGranted(question.ticket)

    return answer(line, MINT, ISSUED_S, grant)


@pytest.mark.parametrize("deadline_ms", [1, 1500, LONGEST_DEADLINE_MS])
def test_a_deadline_is_taken_from_the_header(deadline_ms: int) -> None:
    granted = ask(f"v1\tPOST\t/v1/completions\tx-baton-deadline-ms={deadline_ms}")
    assert isinstance(granted, TicketGranted)
    ticket = MINT.find(carrying(granted.ticket), ISSUED_S)
    assert ticket is not None
    assert ticket.deadline_s == pytest.approx(ISSUED_S + deadline_ms / 1000, abs=1e-5)


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
    said = (
        "x-baton-priority=low", "x-baton-ttft-ms=1500", "x-baton-itl-ms=20",
        "x-baton-output-tokens=700",
    )  # fmt: skip
    assert terms_of("content-length=4096", *said) == Terms(4096, "", Priority.LOW, 1.5, 0.02, 700)


def test_a_ticket_carries_them_to_a_router_that_was_not_asked() -> None:
    said = ("content-length=4096", "authorization=Bearer one", "x-baton-ttft-ms=1500")
    granted = ask("\t".join(("v1", "POST", "/v1/completions", *said)))
    assert isinstance(granted, TicketGranted)
    ticket = MINT.find(carrying(granted.ticket), ISSUED_S)
    assert ticket is not None
    assert ticket.terms == replace(terms_of(*said), body_bytes=None)


def test_tenants_are_told_apart_by_keys_that_are_not_kept() -> None:
    one, other = (terms_of(f"authorization=Bearer {key}").tenant for key in ("one", "other"))
    assert one != other
    assert "one" not in one
    for same in ("authorization=Bearer one", "authorization=bearer  one ", "x-api-key=one"):
        assert terms_of(same).tenant == one
    assert terms_of("authorization=Basic one").tenant not in (one, other, "")
    assert terms_of("authorization=", "x-api-key=").tenant == terms_of().tenant == ""


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ("x-baton-ttft-ms=fast", "X-Baton-TTFT-Ms is a whole number of milliseconds from 1 to "),
        ("x-baton-itl-ms=0", "X-Baton-ITL-Ms is a whole number of milliseconds from 1 to "),
        (
            "x-baton-output-tokens=1000001",
            "X-Baton-Output-Tokens is a whole number of tokens from 1 to 1000000, not 1000001.",
        ),
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
    assert reason_line(story) == b"400\t-\tToken 9 is none.\t-\n"
    assert reason_line(None) == b"-\n"


@pytest.mark.parametrize("fault", Fault)
def test_every_fault_has_a_status(fault: Fault) -> None:
    story = TicketStory("t", 0.0)
    story.requests.append(failed(fault, "why"))
    status, retry_after, message, ticket = reason_line(story).decode().rstrip("\n").split("\t")
    assert 400 <= int(status) < 600
    assert retry_after == "-" or int(retry_after) > 0
    assert (message, ticket) == ("why", "-")


def test_answers_as_the_edge_reads_them() -> None:
    assert answer_line(TicketGranted(TicketId("abc"))) == b"200\tabc\n"
    assert answer_line(TicketRefused(429, 1, "Busy.")) == b"429\t1\tBusy.\t-\n"
    refused = TicketRefused(503, None, "None\tis up.", TicketId("abc"))
    assert answer_line(refused) == b"503\t-\tNone is up.\tabc\n"
