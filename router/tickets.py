"""Tickets: the edge asks for one before it passes a request on, over UNIT_DIR/tickets.sock.

One line in, one line out, then the connection ends or asks again:
    v1 TAB method TAB path TAB name=value ...
    200 TAB ticket    or    status TAB retry-after seconds or "-" TAB message
    why TAB ticket                         (a front answered 5xx: what is known of it)
    status TAB retry-after TAB message     or    -

A ticket certifies itself: whoever has the cluster's token can tell that it was issued, when, and by
when its requests must have ended. So a router accepts what its predecessor issued, and keeps no
list.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import os
from collections.abc import Callable, Mapping
from typing import Final, cast

from protos.enginecore import EngineRequest
from protos.ids import TicketId
from router.core.events import (
    Fault,
    Priority,
    Terms,
    TicketAsked,
    TicketGranted,
    TicketRefused,
)
from router.core.records import TICKET_PATTERN, TicketStory

LONGEST_LINE_BYTES: Final = 64 * 1024
LONGEST_DEADLINE_MS: Final = 24 * 3600 * 1000
DEADLINE_FIELD: Final = "x-baton-deadline-ms"
_TENANT_BYTES: Final = 8
_TIME_DIGITS: Final = 12
_DEADLINE_DIGITS: Final = 8
_DEADLINE_AT: Final = slice(_TIME_DIGITS, _TIME_DIGITS + _DEADLINE_DIGITS)
_NONCE_BYTES: Final = 6
_SIGNED_DIGITS: Final = _TIME_DIGITS + _DEADLINE_DIGITS + 2 * _NONCE_BYTES
_SIGNATURE_DIGITS: Final = 12
_ISSUED_AHEAD_S: Final = 5.0
"""How far the clock of another router's node may be ahead."""

FAULT_STATUS: Final[dict[Fault, tuple[int, int | None]]] = {
    Fault.REFUSED: (400, None),
    Fault.DEADLINE: (504, None),
    Fault.NO_WORKER: (503, 5),
    Fault.WORKER_LOST: (502, 1),
    Fault.POISON: (500, None),
    Fault.ENGINE: (500, None),
    Fault.FRONT_LOST: (502, 1),
}
"""HTTP status and Retry-After, in seconds, of a response that had not begun."""

Answer = TicketGranted | TicketRefused


class TicketMint:
    """Issues and checks ticket ids.

    44 hex digits: issue time in ms, deadline in ms after it (0: none), nonce, signature.
    """

    def __init__(self, link_token: str, ttl_s: float) -> None:
        self._key = hmac.digest(link_token.encode(), b"baton ticket", "sha256")
        self._ttl_s = ttl_s

    def issue(self, wall_s: float, deadline_ms: int = 0) -> TicketId:
        """A new one, valid for the time to live."""
        times = f"{int(wall_s * 1000):0{_TIME_DIGITS}x}{deadline_ms:0{_DEADLINE_DIGITS}x}"
        signed = times + os.urandom(_NONCE_BYTES).hex()
        return TicketId(signed + self._signature(signed))

    def find(self, request: EngineRequest, wall_s: float, late: bool = False) -> TicketId | None:
        """The valid ticket that a request carries in its ids. `late` accepts expired ones."""
        for text in (request.external_req_id, request.request_id, request.session_id):
            match = TICKET_PATTERN.search(text) if text else None
            if match is not None and self._valid(match.group(), wall_s, late):
                return TicketId(match.group())
        return None

    def _valid(self, ticket: str, wall_s: float, late: bool) -> bool:
        signed, signature = ticket[:_SIGNED_DIGITS], ticket[_SIGNED_DIGITS:]
        if not hmac.compare_digest(signature, self._signature(signed)):
            return False
        return late or -_ISSUED_AHEAD_S <= wall_s - _issued_s(ticket) <= self._ttl_s

    def _signature(self, signed: str) -> str:
        # Keyed BLAKE2 is a MAC by itself, and takes a tenth of the time of an HMAC.
        return hashlib.blake2b(
            signed.encode(), key=self._key, digest_size=_SIGNATURE_DIGITS // 2
        ).hexdigest()


def left_s(ticket: TicketId | None, wall_s: float) -> float | None:
    """Time until the deadline of a valid ticket, negative once it has passed; None without one."""
    deadline_ms = int(ticket[_DEADLINE_AT], 16) if ticket is not None else 0
    if ticket is None or not deadline_ms:
        return None
    return _issued_s(ticket) + deadline_ms / 1000 - wall_s


def _issued_s(ticket: str) -> float:
    return int(ticket[:_TIME_DIGITS], 16) / 1000


def parse_question(line: str) -> tuple[str, str, Mapping[str, str]] | None:
    """Method, path and fields; None if it is not a question of version 1."""
    version, *rest = line.split("\t")
    if version != "v1" or len(rest) < 2:
        return None
    method, path, *fields = rest
    return method, path, dict(field.split("=", 1) for field in fields if "=" in field)


def answer(
    line: str, mint: TicketMint, wall_s: float, decide: Callable[[TicketAsked], Answer]
) -> Answer:
    """To a question for a ticket."""
    question = parse_question(line)
    if question is None:
        return TicketRefused(500, None, "The edge's question can't be read.")
    method, path, fields = question
    try:
        deadline_ms = _milliseconds(fields, "X-Baton-Deadline-Ms") or 0
        terms = _terms(fields)
    except ValueError as error:
        return TicketRefused(400, None, str(error))
    return decide(TicketAsked(mint.issue(wall_s, deadline_ms), method, path, terms))


def _terms(fields: Mapping[str, str]) -> Terms:
    ttft_ms = _milliseconds(fields, "X-Baton-TTFT-Ms")
    itl_ms = _milliseconds(fields, "X-Baton-ITL-Ms")
    return Terms(
        body_bytes=_body_bytes(fields),
        tenant=_tenant(fields),
        priority=_priority(fields),
        ttft_slo_s=None if ttft_ms is None else ttft_ms / 1000,
        tpot_slo_s=None if itl_ms is None else itl_ms / 1000,
    )


def _milliseconds(fields: Mapping[str, str], header: str) -> int | None:
    text = fields.get(header.lower())
    if text is None:
        return None
    plain = text.isascii() and text.isdigit() and len(text) <= len(str(LONGEST_DEADLINE_MS))
    if not plain or not 1 <= int(text) <= LONGEST_DEADLINE_MS:
        most = LONGEST_DEADLINE_MS
        raise ValueError(
            f"{header} is a whole number of milliseconds from 1 to {most}, not {text}."
        )
    return int(text)


def _priority(fields: Mapping[str, str]) -> Priority:
    text = fields.get("x-baton-priority", Priority.NORMAL)
    if text not in set(Priority):
        raise ValueError(f"X-Baton-Priority is {', '.join(Priority)}, not {text}.")
    return Priority(text)


def _body_bytes(fields: Mapping[str, str]) -> int | None:
    text = fields.get("content-length", "")
    return int(text) if text.isascii() and text.isdigit() else None


def _tenant(fields: Mapping[str, str]) -> str:
    """Who asks, by the key that it shows; the key itself is kept nowhere."""
    shown = fields.get("authorization", "").encode()
    return hashlib.blake2b(shown, digest_size=_TENANT_BYTES).hexdigest() if shown else ""


def reason_line(story: TicketStory | None) -> bytes:
    """Why a ticket's request failed, as it goes to the edge."""
    failed = story.failure if story is not None else None
    if failed is None or failed.fault is None:
        return b"-\n"
    status, retry_after_s = FAULT_STATUS[failed.fault]
    return answer_line(TicketRefused(status, retry_after_s, failed.error))


def answer_line(answer: Answer) -> bytes:
    """As it goes to the edge."""
    if isinstance(answer, TicketGranted):
        return f"200\t{answer.ticket}\n".encode()
    retry_after = "-" if answer.retry_after_s is None else answer.retry_after_s
    # One line: what engines say may hold several.
    message = " ".join(answer.message.split())
    return f"{answer.status}\t{retry_after}\t{message}\n".encode()


class TicketConnection(asyncio.Protocol):
    """One connection of the edge. `ask` answers a line at once."""

    def __init__(self, ask: Callable[[str], bytes]) -> None:
        self._ask = ask
        self._buffer = b""
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        assert self._transport is not None
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        for line in lines:
            self._transport.write(self._ask(line.decode(errors="replace")))
        if len(self._buffer) > LONGEST_LINE_BYTES:
            self._transport.abort()
