"""Ticket ids that certify themselves: when they were issued, and what was agreed with them.

Whoever has the cluster's token can tell that a ticket is genuine and reads the request's deadline
and terms in it. So a router goes on with what its predecessor let in, and keeps no list.

A ticket is hexadecimal digits: issue time in ms, which fields follow and priority, those fields,
nonce, signature. It is not secret: its client knows it, and who it tells. So the tenant in it is a
keyed hash: whoever sees two tickets can tell whether they are of one tenant, but not of whom.
"""

from __future__ import annotations

import hashlib
import hmac
import os
from typing import Final, NamedTuple

from protos.enginecore import EngineRequest
from protos.ids import TicketId
from router.core.events import NO_TERMS, Priority, Terms
from router.core.records import TICKET_PATTERN

LONGEST_DEADLINE_MS: Final = 24 * 3600 * 1000
MOST_OUTPUT_TOKENS: Final = 1_000_000
_PRIORITIES: Final = tuple(Priority)
_PRIORITY_BITS: Final = 2
_TIME_DIGITS: Final = 12
_MILLISECONDS_DIGITS: Final = 8
_TENANT_BYTES: Final = 8
_TOKENS_DIGITS: Final = 5
_NONCE_BYTES: Final = 6
_SIGNATURE_DIGITS: Final = 12
_FIELDS: Final = (_MILLISECONDS_DIGITS,) * 3 + (2 * _TENANT_BYTES, _TOKENS_DIGITS)
"""Digits of deadline, TTFT and ITL in ms, tenant, and expected output; each is there or not."""
_ISSUED_AHEAD_S: Final = 5.0
"""How far the clock of another router's node may be ahead."""


class Ticket(NamedTuple):
    """A genuine one, and what it says."""

    id: TicketId
    issued_s: float
    """Wall-clock time."""
    deadline_s: float | None
    """Wall-clock time."""
    terms: Terms
    """Without the body's size, which mattered when it was asked for."""


class TicketMint:
    """Issues and reads tickets."""

    def __init__(self, link_token: str, ttl_s: float) -> None:
        self._key = hmac.digest(link_token.encode(), b"baton ticket 3", "sha256")
        self._ttl_s = ttl_s

    def tenant(self, shown: str) -> str:
        """Who asks, by the key that it shows; the key itself is kept nowhere."""
        if not shown:
            return ""
        return hashlib.blake2b(
            shown.encode(), key=self._key, digest_size=_TENANT_BYTES, person=b"baton tenant"
        ).hexdigest()

    def issue(
        self, wall_s: float, terms: Terms = NO_TERMS, deadline_ms: int | None = None
    ) -> TicketId:
        """A new one, valid for the time to live."""
        values = (
            _hex(deadline_ms),
            _hex(_milliseconds(terms.ttft_slo_s)),
            _hex(_milliseconds(terms.tpot_slo_s)),
            terms.tenant,
            "" if terms.output_tokens is None else f"{terms.output_tokens:0{_TOKENS_DIGITS}x}",
        )
        present = sum(1 << place for place, value in enumerate(values) if value)
        said = present << _PRIORITY_BITS | _PRIORITIES.index(terms.priority)
        head = f"{int(wall_s * 1000):0{_TIME_DIGITS}x}{said:02x}"
        signed = head + "".join(values) + os.urandom(_NONCE_BYTES).hex()
        return TicketId(signed + self._signature(signed))

    def find(self, request: EngineRequest, wall_s: float, late: bool = False) -> Ticket | None:
        """The valid ticket that a request carries in its ids. `late` accepts expired ones."""
        for text in (request.external_req_id, request.request_id, request.session_id):
            match = TICKET_PATTERN.search(text) if text else None
            if match is None or not self._is_genuine(match.group()):
                continue
            ticket = _read(match.group())
            if late or -_ISSUED_AHEAD_S <= wall_s - ticket.issued_s <= self._ttl_s:
                return ticket
        return None

    def _is_genuine(self, text: str) -> bool:
        signed, signature = text[:-_SIGNATURE_DIGITS], text[-_SIGNATURE_DIGITS:]
        return hmac.compare_digest(signature, self._signature(signed))

    def _signature(self, signed: str) -> str:
        # Keyed BLAKE2 is a MAC by itself, and takes a tenth of the time of an HMAC.
        return hashlib.blake2b(
            signed.encode(), key=self._key, digest_size=_SIGNATURE_DIGITS // 2
        ).hexdigest()


def _read(text: str) -> Ticket:
    issued_s = int(text[:_TIME_DIGITS], 16) / 1000
    said = int(text[_TIME_DIGITS : _TIME_DIGITS + 2], 16)
    present, priority = divmod(said, 1 << _PRIORITY_BITS)
    at = _TIME_DIGITS + 2
    values = []
    for place, digits in enumerate(_FIELDS):
        width = digits if present >> place & 1 else 0
        values.append(text[at : at + width])
        at += width
    deadline_s, ttft_s, tpot_s = (_seconds(value) for value in values[:3])
    return Ticket(
        TicketId(text),
        issued_s,
        None if deadline_s is None else issued_s + deadline_s,
        Terms(
            None,
            values[3],
            _PRIORITIES[priority],
            ttft_s,
            tpot_s,
            int(values[4], 16) if values[4] else None,
        ),
    )


def _milliseconds(seconds: float | None) -> int | None:
    return None if seconds is None else round(seconds * 1000)


def _hex(milliseconds: int | None) -> str:
    return "" if milliseconds is None else f"{milliseconds:0{_MILLISECONDS_DIGITS}x}"


def _seconds(digits: str) -> float | None:
    return int(digits, 16) / 1000 if digits else None
