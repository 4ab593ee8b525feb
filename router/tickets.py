"""Tickets: the edge asks for one before it passes a request on, over UNIT_DIR/tickets.sock.

One line in, one line out, then the connection ends or asks again:
    v1 TAB method TAB path TAB name=value ...
    200 TAB ticket    or    status TAB retry-after seconds or "-" TAB message

A ticket certifies itself: whoever has the cluster's token can tell that it was issued and when. So
a router accepts what its predecessor issued, and keeps no list.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import os
from collections.abc import Callable
from typing import Final, cast

from protos.enginecore import EngineRequest
from protos.ids import TicketId
from router.core.events import TicketAsked, TicketGranted, TicketRefused
from router.core.records import TICKET_PATTERN

LONGEST_LINE_BYTES: Final = 64 * 1024
_TIME_DIGITS: Final = 8
_NONCE_BYTES: Final = 6
_SIGNED_DIGITS: Final = _TIME_DIGITS + 2 * _NONCE_BYTES
_SIGNATURE_DIGITS: Final = 12
_ISSUED_AHEAD_S: Final = 5.0
"""How far the clock of another router's node may be ahead."""

Answer = TicketGranted | TicketRefused


class TicketMint:
    """Issues and checks ticket ids: 32 hex digits of issue time, nonce and signature."""

    def __init__(self, link_token: str, ttl_s: float) -> None:
        self._key = hmac.digest(link_token.encode(), b"baton ticket", hashlib.sha256)
        self._ttl_s = ttl_s

    def issue(self, wall_s: float) -> TicketId:
        """A new one, valid for the time to live."""
        signed = f"{int(wall_s):0{_TIME_DIGITS}x}{os.urandom(_NONCE_BYTES).hex()}"
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
        age_s = wall_s - int(signed[:_TIME_DIGITS], 16)
        return late or -_ISSUED_AHEAD_S <= age_s <= self._ttl_s

    def _signature(self, signed: str) -> str:
        return hmac.digest(self._key, signed.encode(), hashlib.sha256).hex()[:_SIGNATURE_DIGITS]


def parse_question(line: str, ticket: TicketId) -> TicketAsked | None:
    """None if it is not a question of version 1."""
    version, *rest = line.split("\t")
    if version != "v1" or len(rest) < 2:
        return None
    method, path, *fields = rest
    named = dict(field.split("=", 1) for field in fields if "=" in field)
    return TicketAsked(ticket, method, path, named)


def answer_line(answer: Answer) -> bytes:
    """As it goes to the edge."""
    if isinstance(answer, TicketGranted):
        return f"200\t{answer.ticket}\n".encode()
    retry_after = "-" if answer.retry_after_s is None else answer.retry_after_s
    return f"{answer.status}\t{retry_after}\t{answer.message}\n".encode()


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
