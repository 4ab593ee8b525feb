"""Streamed completions as clients see them: whole ones, many at once, and clients that leave."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import random
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

from tests.live.cluster_process import BatonServe
from tests.live.conftest import MODEL

HANGS_S = 120.0
"""A stream that is not over after this time hangs."""


@dataclass
class Stream:
    """One greedy streamed completion; `run` reads it to its end, whichever that is."""

    prompt: list[int]
    max_tokens: int
    request_id: str = ""
    texts: list[str] = field(default_factory=list)
    arrived_s: list[float] = field(default_factory=list)
    """When each text came, by `time.monotonic`."""
    finish_reason: str | None = None
    error: dict[str, Any] | None = None
    done: bool = False
    """`[DONE]` came."""
    ended_s: float = 0.0
    """By `time.monotonic`."""

    @property
    def text(self) -> str:
        return "".join(self.texts)

    @property
    def complete(self) -> bool:
        """Whether its client takes it for complete."""
        return self.done and self.finish_reason is not None and self.error is None

    @property
    def body(self) -> dict[str, Any]:
        return {
            "model": MODEL,
            "prompt": self.prompt,
            "max_tokens": self.max_tokens,
            "temperature": 0.0,
            "ignore_eos": True,
            "stream": True,
        }

    @property
    def longest_gap_s(self) -> float:
        """Between two events of it."""
        return max((b - a for a, b in itertools.pairwise(self.arrived_s)), default=0.0)

    async def run(self, client: httpx.AsyncClient) -> Stream:
        """Read it to its end."""
        async with (
            asyncio.timeout(HANGS_S),
            client.stream("POST", "/v1/completions", json=self.body) as response,
        ):
            assert response.status_code == 200, (await response.aread()).decode()
            self.request_id = response.headers["x-request-id"]
            async for line in response.aiter_lines():
                self._take(line)
        self.ended_s = time.monotonic()
        return self

    def _take(self, line: str) -> None:
        kind, _, data = line.partition(": ")
        if kind != "data":
            return
        if data == "[DONE]":
            self.done = True
            return
        event = json.loads(data)
        if "error" in event:
            self.error = event["error"]
            return
        (choice,) = event["choices"]
        self.texts.append(choice["text"])
        self.arrived_s.append(time.monotonic())
        self.finish_reason = self.finish_reason or choice.get("finish_reason")


@contextlib.contextmanager
def running(
    client: httpx.AsyncClient, streams: Sequence[Stream]
) -> Iterator[list[asyncio.Task[Stream]]]:
    """All of them at once, in the background; those that are left at the end are cancelled."""
    tasks = [asyncio.create_task(stream.run(client)) for stream in streams]
    try:
        yield tasks
    finally:
        for task in tasks:
            task.cancel()


def api_client(cluster: BatonServe) -> httpx.AsyncClient:
    """For any number of streams at once; each has a connection of its own."""
    return httpx.AsyncClient(
        base_url=cluster.url,
        timeout=HANGS_S,
        limits=httpx.Limits(max_connections=None, max_keepalive_connections=0),
        trust_env=False,
    )


class LeavingClient:
    """A raw connection that asks for a stream and then goes away, as it pleases."""

    def __init__(
        self, stream: Stream, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self.stream = stream
        self._reader = reader
        self._writer = writer

    @classmethod
    async def connect(cls, cluster: BatonServe, stream: Stream) -> LeavingClient:
        reader, writer = await asyncio.open_connection("127.0.0.1", cluster.port)
        return cls(stream, reader, writer)

    async def send(self, part: float = 1.0) -> None:
        """Send the request, or only this part of its body."""
        body = json.dumps(self.stream.body).encode()
        head = (
            "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        self._writer.write(head.encode() + body[: int(len(body) * part)])
        await self._writer.drain()

    async def read_head(self) -> None:
        """Until the response's head has come, which it does before the first token."""
        head = await self._reader.readuntil(b"\r\n\r\n")
        assert b" 200 " in head.split(b"\r\n")[0], head
        fields = dict(line.split(b": ", 1) for line in head.lower().split(b"\r\n")[1:-2])
        self.stream.request_id = fields[b"x-request-id"].decode()

    async def read_events(self, count: int) -> None:
        """Until so many events have come, or the stream's end."""
        while count > 0 and (line := await self._reader.readline()):
            count -= line.startswith(b"data: ")

    async def leave(self) -> float:
        """Close the connection; returns when."""
        self._writer.close()
        left_s = time.monotonic()
        with contextlib.suppress(ConnectionError):  # The other side was writing.
            await self._writer.wait_closed()
        return left_s


async def until(condition: Callable[[], Awaitable[bool]], limit_s: float, what: str) -> float:
    """Wait until it holds; returns the seconds it took."""
    began_s = time.monotonic()
    while not await condition():
        assert time.monotonic() - began_s < limit_s, f"not within {limit_s} s: {what}"
        await asyncio.sleep(0.02)
    return time.monotonic() - began_s


async def story(cluster: BatonServe, request_id: str) -> dict[str, Any]:
    """The record of the one engine request behind a response."""
    answer = await asyncio.to_thread(cluster.get, f"/cluster/requests/{request_id}")
    (record,) = answer["requests"]
    found: dict[str, Any] = record
    return found


def random_prompt(dice: random.Random, tokens: int) -> list[int]:
    """Words of the tiny model."""
    return dice.choices(range(300, 2000), k=tokens)
