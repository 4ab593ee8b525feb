"""A load client that sends requests at their times, whether or not those before are over.

Boundary: a trace in, what its client saw of each request out. Prompts are token ids that follow
from the trace, so that two of them begin alike exactly where the trace says so.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import aiohttp
import uvloop

from cluster.model import TINY_NAME
from simulator.traces import BLOCK_TOKENS, TracedRequest

LIMIT_S: Final = 120.0
"""A request that takes longer hangs."""
_VOCABULARY: Final = range(300, 2000)
"""Ids of ordinary tokens of the tiny model."""
_LEAD_S: Final = 0.5


@dataclass(frozen=True, slots=True)
class Served:
    """One request, as its client saw it."""

    request_id: str
    ttft_s: float
    tpot_s: float | None
    """Mean over the tokens after the first; None if there are none."""
    sent_late_s: float
    """After its time: the client's own delay."""


def play(port: int, requests: Sequence[TracedRequest], salt: int = 0) -> list[Served]:
    """Serve a trace; in its order. Other salts make other prompts of it. Raises RuntimeError unless
    every request was served whole."""
    served: list[Served] = uvloop.run(
        _play(f"http://127.0.0.1:{port}/v1/completions", requests, salt)
    )
    return served


def prompt_of(request: TracedRequest, number: int, salt: int) -> list[int]:
    """Its token ids: each of the trace's blocks has its own, whatever prompt it is in."""
    tokens: list[int] = []
    for block in request.block_ids:
        tokens += random.Random(f"{salt} block {block}").choices(_VOCABULARY, k=BLOCK_TOKENS)
    rest = random.Random(f"{salt} rest of {number}")
    tokens += rest.choices(_VOCABULARY, k=max(0, request.input_tokens - len(tokens)))
    return tokens[: request.input_tokens]


async def _play(url: str, requests: Sequence[TracedRequest], salt: int) -> list[Served]:
    bodies = [_body(request, number, salt) for number, request in enumerate(requests)]
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector) as session:
        began_s = time.perf_counter() + _LEAD_S
        async with asyncio.TaskGroup() as tasks:
            running = [
                tasks.create_task(_one(session, url, body, request, began_s))
                for body, request in zip(bodies, requests, strict=True)
            ]
        return [task.result() for task in running]


def _body(request: TracedRequest, number: int, salt: int) -> bytes:
    body = {
        "model": TINY_NAME, "prompt": prompt_of(request, number, salt), "temperature": 0,
        "max_tokens": request.output_tokens, "ignore_eos": True, "stream": True,
        "stream_options": {"include_usage": True},
    }  # fmt: skip
    return json.dumps(body).encode()


async def _one(
    session: aiohttp.ClientSession, url: str, body: bytes, request: TracedRequest, began_s: float
) -> Served:
    due_s = began_s + request.arrival_s
    await asyncio.sleep(due_s - time.perf_counter())
    sent_s = time.perf_counter()
    first_s = last_s = tokens = None
    async with (
        asyncio.timeout(LIMIT_S),
        session.post(url, data=body, headers={"Content-Type": "application/json"}) as response,
    ):
        if response.status != 200:
            raise RuntimeError(f"status {response.status}: {await response.text()}")
        async for line in response.content:
            if not line.startswith(b"data: {"):
                continue
            now_s = time.perf_counter()
            event = json.loads(line[len(b"data: ") :])
            if event.get("error"):
                raise RuntimeError(f"a stream ended with {event['error']}")
            if event["choices"]:
                first_s, last_s = now_s if first_s is None else first_s, now_s
            if event.get("usage"):
                tokens = event["usage"]["completion_tokens"]
    if tokens != request.output_tokens or first_s is None or last_s is None:
        raise RuntimeError(f"{tokens} instead of {request.output_tokens} tokens came")
    tpot_s = (last_s - first_s) / (tokens - 1) if tokens > 1 else None
    request_id = response.headers["X-Request-Id"]
    return Served(request_id, first_s - sent_s, tpot_s, sent_s - due_s)
