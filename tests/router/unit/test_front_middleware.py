"""The full front's middleware around small applications."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from typing import Any

import pytest

from router.unit.fronts import middleware
from router.unit.fronts.middleware import (
    COMMENT,
    HELD_BODIES,
    App,
    FrontMiddleware,
    Message,
    Receive,
    Send,
)

SILENCE_S = 0.1
MAX_BODY_BYTES = 100
EVENT = b'data: {"a": 1}\n\n'
STREAM = {
    "type": "http.response.start",
    "status": 200,
    "headers": [(b"content-type", b"text/event-stream; charset=utf-8")],
}


def part(body: bytes, more: bool = True) -> Message:
    return {"type": "http.response.body", "body": body, "more_body": more}


class Client:
    """Sends a request in parts, and keeps what comes back."""

    def __init__(self, parts: Sequence[bytes], path: str = "/v1/completions") -> None:
        self.scope = {
            "type": "http", "method": "POST", "path": path, "headers": [(b"x-request-id", b"T")]
        }  # fmt: skip
        self.waiting: list[Message] = [
            {"type": "http.request", "body": body, "more_body": number < len(parts) - 1}
            for number, body in enumerate(parts)
        ]
        self.sent: list[Message] = []
        self.commented = asyncio.Event()

    async def receive(self) -> Message:
        return self.waiting.pop(0) if self.waiting else {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        self.sent.append(message)
        if message.get("body") == COMMENT:
            self.commented.set()

    async def comments(self, count: int) -> None:
        """Returns as soon as so many more have come."""
        for _ in range(count):
            self.commented.clear()
            await self.commented.wait()

    async def ask(self, app: App) -> None:
        middleware = FrontMiddleware(app, MAX_BODY_BYTES, SILENCE_S)
        await middleware(self.scope, self.receive, self.send)

    @property
    def status(self) -> int:
        return int(self.sent[0]["status"])

    @property
    def bodies(self) -> list[bytes]:
        return [message["body"] for message in self.sent[1:]]


class Echo:
    """Answers with what it was sent; `calls` counts."""

    def __init__(self) -> None:
        self.calls = 0

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        self.calls += 1
        message = await receive()
        assert not message["more_body"]
        assert (await receive())["type"] == "http.disconnect"
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send(part(message["body"], more=False))


async def test_a_body_in_parts_reaches_the_application_whole() -> None:
    client = Client([b'{"a":', b" 1}"])
    await client.ask(Echo())
    assert (client.status, client.bodies) == (200, [b'{"a": 1}'])


async def test_a_body_of_the_largest_size_passes() -> None:
    body = b'{"a": 1}'.ljust(MAX_BODY_BYTES)
    client = Client([body[:50], body[50:]])
    await client.ask(Echo())
    assert client.bodies == [body]


async def test_a_body_that_is_too_large_is_read_and_refused() -> None:
    client, app = Client([b" " * 50, b" " * 51, b" " * 50]), Echo()
    await client.ask(app)
    assert (client.status, app.calls) == (413, 0)
    assert client.waiting == []
    assert (b"connection", b"close") in client.sent[0]["headers"]
    assert "100 bytes" in json.loads(client.bodies[0])["error"]["message"]


async def test_a_body_without_end_is_not_read_to_its_end() -> None:
    client = Client([b" " * 50] * 50)
    await client.ask(Echo())
    assert client.status == 413
    assert len(client.waiting) == 45


async def test_a_client_that_leaves_within_its_body_is_not_served() -> None:
    client, app = Client([b'{"a":', b" 1}"]), Echo()
    client.waiting.pop()
    await client.ask(app)
    assert (client.sent, app.calls) == ([], 0)


async def test_a_silent_stream_gets_comments_before_and_between_its_events() -> None:
    async def app(scope: Any, receive: Receive, send: Send) -> None:
        await send(STREAM)
        await client.comments(2)
        await send(part(EVENT))
        await client.comments(1)
        await send(part(EVENT, more=False))
        await asyncio.sleep(2 * SILENCE_S)

    client = Client([b"{}"])
    await client.ask(app)
    assert client.bodies == [COMMENT, COMMENT, EVENT, COMMENT, EVENT]


async def test_a_comment_never_splits_an_event() -> None:
    async def app(scope: Any, receive: Receive, send: Send) -> None:
        await send(STREAM)
        await send(part(EVENT[:-1]))
        await asyncio.sleep(2.5 * SILENCE_S)
        await send(part(EVENT[-1:]))
        await client.comments(1)
        await send(part(b"", more=False))

    client = Client([b"{}"])
    await client.ask(app)
    assert client.bodies == [EVENT[:-1], EVENT[-1:], COMMENT, b""]


async def test_a_client_that_takes_nothing_gets_no_comments_on_top() -> None:
    taken = asyncio.Event()

    class Slow(Client):
        async def send(self, message: Message) -> None:
            if message.get("body") == EVENT:
                await taken.wait()
            await super().send(message)

    async def app(scope: Any, receive: Receive, send: Send) -> None:
        await send(STREAM)
        asyncio.get_running_loop().call_later(2.5 * SILENCE_S, taken.set)
        await send(part(EVENT))
        await send(part(EVENT, more=False))

    client = Slow([b"{}"])
    await client.ask(app)
    assert client.bodies == [EVENT, EVENT]


async def test_what_is_no_stream_gets_no_comment() -> None:
    async def app(scope: Any, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await asyncio.sleep(2 * SILENCE_S)
        await send(part(b"{}", more=False))

    client = Client([b"{}"])
    await client.ask(app)
    assert client.bodies == [b"{}"]


@pytest.mark.parametrize("path", ["/v1/responses", "/v1/messages"])
async def test_a_stream_that_breaks_ends_with_an_error_event(path: str) -> None:
    async def app(scope: Any, receive: Receive, send: Send) -> None:
        await send(STREAM)
        await send(part(EVENT))
        raise RuntimeError("broken")

    client = Client([b"{}"], path)
    await client.ask(app)
    event, last = client.bodies
    assert event == EVENT
    assert last.startswith(b"event: error\n")
    assert last.endswith(b"\n\n")
    assert not client.sent[-1]["more_body"]


async def test_a_defect_before_the_response_is_not_hidden() -> None:
    async def app(scope: Any, receive: Receive, send: Send) -> None:
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        await Client([b"{}"]).ask(app)


async def test_a_client_that_leaves_a_stream_ends_its_comments() -> None:
    async def app(scope: Any, receive: Receive, send: Send) -> None:
        await send(STREAM)
        raise asyncio.CancelledError

    client = Client([b"{}"])
    with pytest.raises(asyncio.CancelledError):
        await client.ask(app)
    await asyncio.sleep(2 * SILENCE_S)
    assert client.bodies == []


async def test_vllms_errors_on_anthropics_paths_are_put_into_their_form() -> None:
    async def app(scope: Any, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 404, "headers": []})
        await send(part(b'{"error": {"message": "no '))
        await send(part(b'such model", "type": "NotFoundError"}}', more=False))

    client = Client([b"{}"], "/v1/messages")
    await client.ask(app)
    assert client.status == 404
    assert json.loads(b"".join(client.bodies))["error"] == {
        "type": "not_found_error", "message": "no such model"
    }  # fmt: skip


class Slow(Client):
    """Sends its last part when it is told to."""

    def __init__(self, parts: Sequence[bytes]) -> None:
        super().__init__(parts)
        self.go_on = asyncio.Event()

    async def receive(self) -> Message:
        if len(self.waiting) == 1:
            await self.go_on.wait()
        return await super().receive()


BODY = json.dumps({"prompt": "x" * (MAX_BODY_BYTES - 20)}).encode().ljust(MAX_BODY_BYTES)


async def test_bodies_that_wait_for_their_rest_take_a_limited_room_together() -> None:
    echo = Echo()
    middleware = FrontMiddleware(echo, MAX_BODY_BYTES, SILENCE_S)
    slow = [Slow([BODY[:-1], BODY[-1:]]) for _ in range(HELD_BODIES)]
    running = [
        asyncio.create_task(middleware(each.scope, each.receive, each.send)) for each in slow
    ]
    await asyncio.sleep(0)
    late = Client([BODY, b""])
    await middleware(late.scope, late.receive, late.send)
    assert late.status == 503
    assert (b"retry-after", b"1") in late.sent[0]["headers"]
    for each in slow:
        each.go_on.set()
    await asyncio.gather(*running)
    assert [each.status for each in slow] == [200] * HELD_BODIES
    # What they took is free again.
    again = Client([BODY])
    await middleware(again.scope, again.receive, again.send)
    assert again.status == 200


async def test_a_body_that_never_ends_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(middleware, "BODY_S", 0.05)
    echo, slow = Echo(), Slow([b"{", b"}"])
    await slow.ask(echo)
    assert slow.status == 408
    assert echo.calls == 0
