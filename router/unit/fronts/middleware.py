"""ASGI middleware around the full front's server: limits, checks, errors, streams kept alive.

Boundary: it passes responses on as they come, except errors on Anthropic's paths, which are short.
What a body may say is `requests`' knowledge.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any, Final

from router.unit.fronts.requests import (
    Refusal,
    as_anthropic,
    check,
    error_body,
    error_event,
    is_anthropic,
    too_large,
)

_log = logging.getLogger("full front")

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

COMMENT: Final = b": keep-alive\n\n"
_ERROR_EVENT: Final = b"event: error\n"
_TICKET_HEADER: Final = b"x-request-id"
BODY_S: Final = 300.0
"""For a whole body, however small its parts."""
HELD_BODIES: Final = 16
"""As much as so many of the largest may lie in memory, waiting for their rest or an answer."""
_READ_TIMES: Final = 2
"""So much of a body that is too large is read: most clients look for an answer only when they have
sent all."""


class FrontMiddleware:
    """Wraps one ASGI application; `keep_alive_s` is the longest silence of a stream."""

    def __init__(self, app: App, max_body_bytes: int, keep_alive_s: float) -> None:
        self._app = app
        self._max_body_bytes = max_body_bytes
        self._keep_alive_s = keep_alive_s
        self._bodies = _Bodies(HELD_BODIES * max_body_bytes)

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = scope["path"]
        hold = _Hold(self._bodies)
        try:
            if scope["method"] == "POST":
                body = await self._read_body(receive, hold)
                if body is None:
                    return  # The client left.
                if isinstance(body, bytes):
                    body = check(path, body, _ticket(scope))
                if isinstance(body, Refusal):
                    await _refuse(send, path, body)
                    return
                receive = _replayed(body, receive)
            await self._respond(scope, receive, send, hold)
        finally:
            hold.release()

    async def _respond(
        self, scope: MutableMapping[str, Any], receive: Receive, send: Send, hold: _Hold
    ) -> None:
        response = _Response(send, scope["path"], self._keep_alive_s, hold.release)
        try:
            await self._app(scope, receive, response.send)
        except Exception as error:
            if not await response.told(error):
                raise
        finally:
            await response.close()

    async def _read_body(self, receive: Receive, hold: _Hold) -> bytes | Refusal | None:
        try:
            async with asyncio.timeout(BODY_S):
                return await self._read_whole_body(receive, hold)
        except TimeoutError:
            return Refusal(408, f"The body did not come within {BODY_S:.0f} s.")

    async def _read_whole_body(self, receive: Receive, hold: _Hold) -> bytes | Refusal | None:
        parts: list[bytes] = []
        read_bytes = 0
        more = True
        while more and read_bytes <= _READ_TIMES * self._max_body_bytes:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            part = message.get("body", b"")
            read_bytes += len(part)
            if read_bytes > self._max_body_bytes:
                parts.clear()
            else:
                if not hold.take(len(part)):
                    return Refusal(503, "Too many large requests are being read; try again.")
                parts.append(part)
            more = message.get("more_body", False)
        if read_bytes > self._max_body_bytes:
            return too_large(self._max_body_bytes)
        return b"".join(parts)


@dataclass(slots=True)
class _Bodies:
    """The bodies of all requests, each from its first part until its answer begins."""

    limit_bytes: int
    held_bytes: int = 0


class _Hold:
    """One request's share."""

    def __init__(self, bodies: _Bodies) -> None:
        self._bodies = bodies
        self._bytes = 0

    def take(self, size_bytes: int) -> bool:
        """Whether there is room for so much more."""
        if self._bodies.held_bytes + size_bytes > self._bodies.limit_bytes:
            return False
        self._bodies.held_bytes += size_bytes
        self._bytes += size_bytes
        return True

    def release(self) -> None:
        """Give it all back; repeated calls do nothing."""
        self._bodies.held_bytes -= self._bytes
        self._bytes = 0


class _Response:
    """One response on its way: a silent stream gets comments, one that fails an error event."""

    def __init__(
        self, send: Send, path: str, keep_alive_s: float, on_begin: Callable[[], None]
    ) -> None:
        self._on_begin = on_begin
        self._send = send
        self._path = path
        self._keep_alive_s = keep_alive_s
        self._start: Message | None = None
        """Held back while an error is put into another form."""
        self._error = b""
        self._comments: asyncio.Task[None] | None = None
        self._turn = asyncio.Lock()
        self._sent_s = 0.0
        self._events = 0
        self._tail = b"\n\n"
        """The stream's last bytes: a comment may only follow an event's end."""
        self._ended = False

    async def send(self, message: Message) -> None:
        """ASGI's send, for the application."""
        if message["type"] == "http.response.start":
            await self._begin(message)
        elif self._start is not None:
            await self._collect_error(message)
        elif self._comments is not None:
            await self._pass_on(message)
        else:
            await self._send(message)

    async def _begin(self, message: Message) -> None:
        self._on_begin()
        if message["status"] >= 400 and is_anthropic(self._path):
            self._start = message
            return
        await self._send(message)
        kind = dict(message["headers"]).get(b"content-type", b"")
        if kind.startswith(b"text/event-stream"):
            self._sent_s = asyncio.get_running_loop().time()
            self._comments = asyncio.create_task(self._keep_alive())

    async def _collect_error(self, message: Message) -> None:
        self._error += message.get("body", b"")
        if message.get("more_body", False):
            return
        assert self._start is not None
        status = self._start["status"]
        await _answer(self._send, status, as_anthropic(self._path, status, self._error))

    async def _pass_on(self, message: Message) -> None:
        """A part of a stream."""
        body = message.get("body", b"")
        if body.startswith(_ERROR_EVENT) and is_anthropic(self._path):
            # vLLM takes the error for one of its own events, and tells what it misses in it.
            message = {**message, "body": error_event(self._path, self._events)}
        async with self._turn:
            self._events += bool(body)
            self._tail = (self._tail + body)[-2:]
            self._ended = not message.get("more_body", False)
            await self._send(message)
            self._sent_s = asyncio.get_running_loop().time()

    async def told(self, error: Exception) -> bool:
        """Whether the client of a stream that can't go on was told so."""
        if self._comments is None or self._ended:
            return False
        _log.error("a stream on %s failed: %r", self._path, error.__cause__ or error)
        body = error_event(self._path, self._events)
        await self._pass_on({"type": "http.response.body", "body": body, "more_body": False})
        return True

    async def close(self) -> None:
        """The response is over."""
        if self._comments is not None:
            self._comments.cancel()
            await asyncio.wait({self._comments})

    async def _keep_alive(self) -> None:
        loop = asyncio.get_running_loop()
        while not self._ended:
            await asyncio.sleep(self._sent_s + self._keep_alive_s - loop.time())
            # Whoever takes nothing, for whom a part waits, needs no comment on top.
            async with self._turn:
                if self._ended or loop.time() < self._sent_s + self._keep_alive_s:
                    continue
                if self._tail == b"\n\n":
                    comment = {"type": "http.response.body", "body": COMMENT, "more_body": True}
                    await self._send(comment)
                self._sent_s = loop.time()


def _ticket(scope: MutableMapping[str, Any]) -> str | None:
    value = dict(scope["headers"]).get(_TICKET_HEADER)
    return None if value is None else value.decode("latin-1")


def _replayed(body: bytes, receive: Receive) -> Receive:
    """A receive that gives a body which was read already, and then what comes."""
    waiting: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return waiting.pop() if waiting else await receive()

    return replay


async def _refuse(send: Send, path: str, refusal: Refusal) -> None:
    await _answer(
        send, refusal.status, error_body(path, refusal), close=refusal.status in (408, 413, 503)
    )


async def _answer(send: Send, status: int, body: bytes, close: bool = False) -> None:
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
    ]
    if close:
        headers.append((b"connection", b"close"))
    if status == 503:
        headers.append((b"retry-after", b"1"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
