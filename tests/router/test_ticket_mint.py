"""Ticket ids: what they certify, and to whom."""

from __future__ import annotations

import itertools

import pytest

from protos.enginecore import EngineRequest
from router.core.events import NO_TERMS, Priority, Terms
from router.core.records import TICKET_PATTERN
from router.ticket_mint import LONGEST_DEADLINE_MS, MOST_OUTPUT_TOKENS, TicketMint

MINT = TicketMint("secret", ttl_s=60.0)
ISSUED_S = 1_700_000_000.25


def carrying(ticket: str) -> EngineRequest:
    request_id = f"cmpl-{ticket}-0a1b2c3d"
    return EngineRequest(request_id, [1], None, {}, None, 0.0, None, None, None)


def test_a_ticket_is_found_within_the_ids_that_fronts_make_of_it() -> None:
    ticket = MINT.issue(ISSUED_S)
    found = MINT.find(carrying(ticket), ISSUED_S + 1)
    assert found == (ticket, ISSUED_S, None, NO_TERMS)
    assert MINT.find(carrying(ticket[:-1] + ("1" if ticket[-1] == "0" else "0")), ISSUED_S) is None
    assert MINT.find(carrying("f" * len(ticket)), ISSUED_S + 1) is None


def test_a_ticket_expires_but_not_for_what_is_under_way() -> None:
    ticket = MINT.issue(ISSUED_S)
    assert MINT.find(carrying(ticket), ISSUED_S + 61) is None
    assert MINT.find(carrying(ticket), ISSUED_S + 61, late=True) is not None
    assert MINT.find(carrying(ticket), ISSUED_S - 6) is None


def test_another_cluster_can_not_make_tickets() -> None:
    forged = TicketMint("another", ttl_s=60.0).issue(ISSUED_S)
    assert MINT.find(carrying(forged), ISSUED_S) is None


ONE, OTHER = (MINT.tenant(key) for key in ("one", "other"))


@pytest.mark.parametrize(
    ("deadline_ms", "terms"),
    itertools.product(
        [None, 1, LONGEST_DEADLINE_MS],
        [
            Terms(),
            Terms(tenant=ONE),
            Terms(priority=Priority.LOW, ttft_slo_s=0.001),
            Terms(tenant=OTHER, priority=Priority.HIGH, tpot_slo_s=0.035),
            Terms(output_tokens=1),
            Terms(
                tenant=ONE,
                priority=Priority.LOW,
                ttft_slo_s=86_400.0,
                tpot_slo_s=86_400.0,
                output_tokens=MOST_OUTPUT_TOKENS,
            ),
        ],
    ),
)
def test_what_was_agreed_is_read_from_it(deadline_ms: int | None, terms: Terms) -> None:
    ticket = MINT.issue(ISSUED_S, terms, deadline_ms)
    assert TICKET_PATTERN.fullmatch(ticket)
    found = MINT.find(carrying(ticket), ISSUED_S)
    assert found is not None
    assert found.terms == terms
    deadline_s = None if deadline_ms is None else pytest.approx(ISSUED_S + deadline_ms / 1000)
    assert found.deadline_s == deadline_s


def test_who_holds_a_ticket_can_not_change_what_it_says() -> None:
    terms = Terms(tenant=ONE, ttft_slo_s=1.5)
    ticket = MINT.issue(ISSUED_S, terms, 1500)
    for place in range(len(ticket)):
        other = "1" if ticket[place] == "0" else "0"
        changed = ticket[:place] + other + ticket[place + 1 :]
        assert MINT.find(carrying(changed), ISSUED_S) is None
    assert MINT.find(carrying(ticket.replace(ONE, OTHER)), ISSUED_S) is None


def test_only_who_has_the_clusters_token_knows_whose_a_ticket_is() -> None:
    assert ONE != OTHER
    assert TicketMint("another", 60.0).tenant("one") != ONE
    assert MINT.tenant("") == ""
