"""The router process's link to its anchor, and through it to the fronts.

Boundary: turns the anchor's messages into calls of a `Listener`; what they mean is the core's. The
link's end is the process's end: the anchor starts the next one.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any, Final, Protocol, cast

from protos import anchor_link, enginecore
from router.metrics import LinkBytes

RETRY_S: Final = 0.02
_LINK: Final = "anchor-router"
_FRONTS: Final = "front-anchor"

UTILITY_ANSWERS: Final[dict[str, Any]] = {
    "get_supported_tasks": ["generate"],
    "reset_mm_cache": None,
    "reset_encoder_cache": None,
    "is_sleeping": False,
    "is_scheduler_paused": False,
}
"""What fronts ask of an engine besides generating, and what this one says."""


class Listener(Protocol):
    """Who is told what comes from the anchor."""

    def on_anchor_message(self, message: anchor_link.FromAnchor) -> None:
        """Anything but pings and utility calls, which are answered here."""
        ...

    def on_anchor_lost(self, why: str) -> None:
        """The link has ended."""
        ...


class AnchorClient(asyncio.Protocol):
    """One connection, for the process's whole life."""

    def __init__(self, listener: Listener, link_bytes: LinkBytes) -> None:
        self._listener = listener
        self._bytes = link_bytes
        self._splitter = anchor_link.Splitter()
        self._transport: asyncio.Transport | None = None
        self._deliveries: dict[int, list[anchor_link.Delivery]] = {}
        """What this turn of the loop has for each front: it goes out in one message."""

    def deliver(self, message: anchor_link.Deliver) -> None:
        """Queue outputs; they leave in the order in which they came, before other messages."""
        if not self._deliveries:
            asyncio.get_running_loop().call_soon(self._flush)
        self._deliveries.setdefault(message.front, []).extend(message.deliveries)

    def send(self, message: anchor_link.FromRouter) -> None:
        """Queue a message; nothing is lost while the link stands."""
        self._flush()
        self._write(anchor_link.encode(message))

    def _flush(self) -> None:
        given, self._deliveries = self._deliveries, {}
        for front, deliveries in given.items():
            self._write(anchor_link.encode(anchor_link.Deliver(front, deliveries)))

    def _write(self, data: bytes) -> None:
        """An anchor that reads nothing ends the link: the next router starts from what it has."""
        if self._transport is not None:
            self._bytes.responses[_LINK] += len(data)
            self._transport.write(data)
            if self._transport.get_write_buffer_size() > anchor_link.MAX_MESSAGE_BYTES:
                self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._listener.on_anchor_lost(str(exc) if exc else "it closed the link")

    def data_received(self, data: bytes) -> None:
        self._bytes.requests[_LINK] += len(data)
        for body in self._splitter.feed(data):
            message = anchor_link.from_anchor_decoder.decode(body)
            if isinstance(message, anchor_link.Ping):
                self.send(anchor_link.Pong())
                self._bytes.requests[_FRONTS] = message.front_request_bytes
                self._bytes.responses[_FRONTS] = message.front_response_bytes
            elif isinstance(message, anchor_link.Utility):
                self.send(anchor_link.UtilityReply(message.front, _answer(message.payload)))
            else:
                self._listener.on_anchor_message(message)


def _answer(payload: bytes) -> bytes:
    call = enginecore.decode_utility(payload)
    if call.method in UTILITY_ANSWERS:
        return enginecore.utility_reply(call.call_id, UTILITY_ANSWERS[call.method])
    return enginecore.utility_reply(
        call.call_id, None, f"{call.method} is not offered: many engines serve behind this router"
    )


async def connect(path: Path, listener: Listener, link_bytes: LinkBytes) -> AnchorClient:
    """Connects as soon as the anchor listens."""
    loop = asyncio.get_running_loop()
    while True:
        try:
            _, client = await loop.create_unix_connection(
                lambda: AnchorClient(listener, link_bytes), str(path)
            )
        except (FileNotFoundError, ConnectionRefusedError):
            await asyncio.sleep(RETRY_S)
        else:
            return client
