"""What the anchor and a router process say to each other on a Unix stream socket.

Each message is a 4-byte big-endian length and a msgpack array whose first element names its kind.
The anchor listens; a router connects, says Hello, gets the Snapshot, and from then on both send
freely. A broken connection loses nothing: the next router's Snapshot holds what was under way. A
router that does not answer pings is ended.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Final

import msgspec
from msgspec import Struct

from protos.errors import ProtocolError

MAX_MESSAGE_BYTES: Final = 256 * 1024 * 1024
LENGTH: Final = struct.Struct(">I")
"""Before each message."""


# Router to anchor


class Hello(Struct, array_like=True, tag="hello", gc=False):
    """First message of a router; the anchor drops the connection of any earlier incarnation."""

    router_incarnation: int
    pid: int


class Ready(Struct, array_like=True, tag="ready", gc=False):
    """What the anchor tells every front, now and on each connect: ReadyResponse as msgpack."""

    payload: bytes


class Delivery(Struct, array_like=True, gc=False):
    """One request's next output: `token_count` tokens from `first_position` on."""

    request_id: str
    first_position: int
    token_count: int
    finished: bool
    payload: bytes


class Deliver(Struct, array_like=True, tag="deliver", gc=False):
    """Outputs for one front, in order. What a front was given already, the anchor drops."""

    front: int
    deliveries: list[Delivery]


class UtilityReply(Struct, array_like=True, tag="reply", gc=False):
    """A whole message for the front that made a utility call."""

    front: int
    payload: bytes


class Pong(Struct, array_like=True, tag="pong", gc=False):
    """The answer to a Ping."""


# Anchor to router


class Underway(Struct, array_like=True, gc=False):
    """A request that has not ended: its ADD payload, and how many tokens its front was given."""

    front: int
    request_id: str
    payload: bytes
    given_tokens: int


class Snapshot(Struct, array_like=True, tag="snapshot", gc=False):
    """What is under way; the first message to a router, and if there is `more`, the next ones."""

    underway: list[Underway]
    more: bool = False


class Add(Struct, array_like=True, tag="add", gc=False):
    """A front's new request: the payload frame as it came."""

    front: int
    request_id: str
    payload: bytes


class Abort(Struct, array_like=True, tag="abort", gc=False):
    """A front no longer wants these: the client left, or a stop string matched."""

    front: int
    request_ids: list[str]


class Utility(Struct, array_like=True, tag="utility", gc=False):
    """A front's utility call: the payload frame as it came."""

    front: int
    payload: bytes


class FrontGone(Struct, array_like=True, tag="front_gone", gc=False):
    """A front ended; all its requests are over."""

    front: int


class Ping(Struct, array_like=True, tag="ping", gc=False):
    """To be answered by a Pong at once; with what went between the fronts and the anchor so far."""

    front_request_bytes: int
    front_response_bytes: int


FromRouter = Hello | Ready | Deliver | UtilityReply | Pong
FromAnchor = Snapshot | Add | Abort | Utility | FrontGone | Ping

_encoder = msgspec.msgpack.Encoder()
from_router_decoder: msgspec.msgpack.Decoder[FromRouter] = msgspec.msgpack.Decoder(FromRouter)
from_anchor_decoder: msgspec.msgpack.Decoder[FromAnchor] = msgspec.msgpack.Decoder(FromAnchor)


def encode(message: FromRouter | FromAnchor) -> bytes:
    """The message with its length in front, ready to be written."""
    body = _encoder.encode(message)
    return LENGTH.pack(len(body)) + body


class Splitter:
    """Cuts a byte stream into message bodies."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes | bytearray | memoryview) -> Iterator[memoryview]:
        """The bodies that `data` completes, to be read before the next call.

        Raises ProtocolError on an impossible length.
        """
        if self._buffer:
            self._buffer += data
            if len(self._buffer) < self._missing_until():
                return
            data, self._buffer = self._buffer, bytearray()
        view = memoryview(data)
        start = 0
        while len(view) - start >= LENGTH.size:
            (length,) = LENGTH.unpack_from(view, start)
            if length > MAX_MESSAGE_BYTES:
                raise ProtocolError(f"a message of {length} bytes on the anchor's link")
            end = start + LENGTH.size + length
            if end > len(view):
                break
            yield view[start + LENGTH.size : end]
            start = end
        self._buffer += view[start:]

    def _missing_until(self) -> int:
        """How long the buffer must be for its first body to be whole."""
        if len(self._buffer) < LENGTH.size:
            return LENGTH.size
        (length,) = LENGTH.unpack_from(self._buffer)
        # An impossible one is found by `feed` at once.
        return LENGTH.size + int(length) if length <= MAX_MESSAGE_BYTES else 0
