"""Tickets: the edge asks for one before it passes a request on, over UNIT_DIR/tickets.sock.

One line in, one line out, then the connection ends or asks again:
    v1 TAB method TAB path TAB name=value ...
    200 TAB ticket    or    status TAB retry-after seconds or "-" TAB message TAB ticket or "-"
    why TAB ticket                         (a front answered 5xx: what is known of it)
    status TAB retry-after TAB message TAB -     or    -

What a ticket is, `ticket_mint` knows.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Final, cast

from router.core.events import (
    Fault,
    Priority,
    Terms,
    TicketAsked,
    TicketGranted,
    TicketRefused,
)
from router.core.records import TicketStory
from router.ticket_mint import LONGEST_DEADLINE_MS, MOST_OUTPUT_TOKENS, TicketMint

LONGEST_LINE_BYTES: Final = 64 * 1024
DEADLINE_FIELD: Final = "x-baton-deadline-ms"

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
        deadline_ms = _milliseconds(fields, "X-Baton-Deadline-Ms")
        terms = _terms(fields, mint.tenant(_shown_key(fields)))
    except ValueError as error:
        return TicketRefused(400, None, str(error))
    return decide(TicketAsked(mint.issue(wall_s, terms, deadline_ms), method, path, terms))


def _terms(fields: Mapping[str, str], tenant: str) -> Terms:
    ttft_ms = _milliseconds(fields, "X-Baton-TTFT-Ms")
    itl_ms = _milliseconds(fields, "X-Baton-ITL-Ms")
    return Terms(
        body_bytes=_body_bytes(fields),
        tenant=tenant,
        priority=_priority(fields),
        ttft_slo_s=None if ttft_ms is None else ttft_ms / 1000,
        tpot_slo_s=None if itl_ms is None else itl_ms / 1000,
        output_tokens=_number(fields, "X-Baton-Output-Tokens", MOST_OUTPUT_TOKENS, "tokens"),
    )


def _milliseconds(fields: Mapping[str, str], header: str) -> int | None:
    return _number(fields, header, LONGEST_DEADLINE_MS, "milliseconds")


def _number(fields: Mapping[str, str], header: str, most: int, unit: str) -> int | None:
    text = fields.get(header.lower())
    if text is None:
        return None
    plain = text.isascii() and text.isdigit() and len(text) <= len(str(most))
    if not plain or not 1 <= int(text) <= most:
        raise ValueError(f"{header} is a whole number of {unit} from 1 to {most}, not {text}.")
    return int(text)


def _priority(fields: Mapping[str, str]) -> Priority:
    text = fields.get("x-baton-priority", Priority.NORMAL)
    if text not in set(Priority):
        raise ValueError(f"X-Baton-Priority is {', '.join(Priority)}, not {text}.")
    return Priority(text)


def _body_bytes(fields: Mapping[str, str]) -> int | None:
    text = fields.get("content-length", "")
    return int(text) if text.isascii() and text.isdigit() else None


def _shown_key(fields: Mapping[str, str]) -> str:
    """The API key: OpenAI's clients show it as a bearer's, Anthropic's as it is."""
    shown = fields.get("authorization", "").strip()
    scheme, _, key = shown.partition(" ")
    if scheme.lower() == "bearer":
        return key.strip()
    return shown or fields.get("x-api-key", "").strip()


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
    # Fields are parted by tabs, which a message has none of.
    return f"{answer.status}\t{retry_after}\t{message}\t{answer.ticket or '-'}\n".encode()


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
