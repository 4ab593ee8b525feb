"""A worker hangs (SIGSTOP): noticed, treated as dead, replaced, and fenced should it wake."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import re
import signal
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import pytest

from tests.live.cluster_process import HANDED_OVER, BatonServe
from tests.live.streams import Stream, api_client, random_prompt, running, story, until
from tests.live.test_ends import is_alive, until_idle, until_replaced, used, workers_of

pytestmark = pytest.mark.slow

NOTICED_WITHIN_S = 10.0
LATE_S = 10.0
"""What a request may take once the hang is noticed, while an engine loads on the same cores."""
ASK_EVERY_S = 0.5
LONG_TOKENS = 1200


@pytest.fixture(scope="module")
def trio(tiny_model: object) -> Iterator[BatonServe]:
    """One prefill and two decode workers, real vLLM; every request is handed over."""
    serve = BatonServe.start({"decode": {"replicas": 2}, "router": HANDED_OVER})
    try:
        print(f"\nhealthy after {serve.until_healthy():.1f} s")
        yield serve
    finally:
        serve.interrupt()


async def until_all_serve(cluster: BatonServe) -> None:
    async def all_serve() -> bool:
        workers = await workers_of(cluster)
        return len(workers) == 3 and all(w["state"] == "ready" and w["load"] for w in workers)

    await until(all_serve, 120, "three workers are ready")
    await until_idle(cluster, 20)


@contextlib.asynccontextmanager
async def arriving(http: httpx.AsyncClient, dice: random.Random) -> AsyncIterator[list[Stream]]:
    """Short requests that keep coming; all of them have ended when this has."""
    asked: list[Stream] = []
    over = asyncio.Event()

    async def ask() -> None:
        async with asyncio.TaskGroup() as group:
            while not over.is_set():
                asked.append(Stream(random_prompt(dice, 100), 8))
                group.create_task(asked[-1].run(http))
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(over.wait(), ASK_EVERY_S)

    asking = asyncio.create_task(ask())
    try:
        yield asked
    finally:
        over.set()
        await asking


async def until_generating(cluster: BatonServe, worker_id: str, streams: list[Stream]) -> None:
    async def generating() -> bool:
        on_it, _, _ = (await used(cluster)).get(worker_id, (-1, -1, -1))
        return on_it >= 2 and all(len(stream.texts) > 2 for stream in streams)

    await until(generating, 60, f"all generate, some on {worker_id}")


async def on_worker(
    cluster: BatonServe, streams: list[Stream], worker_id: str
) -> tuple[list[Stream], list[Stream]]:
    """Those that the worker had last, and the others."""
    theirs: tuple[list[Stream], list[Stream]] = [], []
    for stream in streams:
        record = await story(cluster, stream.request_id)
        theirs[record["attempts"][-1]["worker"] != worker_id].append(stream)
    return theirs


async def assert_exact_so_far(http: httpx.AsyncClient, streams: list[Stream]) -> None:
    """What came is the beginning of what comes when nothing is in the way."""
    again = [Stream(stream.prompt, stream.max_tokens) for stream in streams]
    with running(http, again) as tasks:
        await asyncio.gather(*tasks)
    for stream, whole in zip(streams, again, strict=True):
        assert whole.complete, whole.error
        assert whole.text.startswith(stream.text)
        assert stream.error is not None or stream.text == whole.text


def assert_ended_in_time(ended: list[Stream], stopped_s: float) -> float:
    """When the last one was told; each by an error, after some tokens."""
    for stream in ended:
        assert stream.error is not None
        assert stream.error["message"]
        assert stream.finish_reason is None
        assert len(stream.texts) > 2
    noticed_s = max(stream.ended_s for stream in ended) - stopped_s
    assert noticed_s < NOTICED_WITHIN_S
    return noticed_s


async def assert_nobody_hung(
    cluster: BatonServe, asked: list[Stream], victim: dict[str, Any], noticed_s: float
) -> None:
    """Those that came meanwhile: complete elsewhere, if it needs be after the hang was noticed."""
    assert all(stream.complete for stream in asked), [stream.error for stream in asked]
    for stream in asked:
        record = await story(cluster, stream.request_id)
        assert record["attempts"][-1]["worker"] != victim["id"]
        assert seconds(record) < noticed_s + LATE_S


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("process", "reason", "failure"),
    [
        ("pid", r"decode-\d+ is gone: it hangs", "it hung"),
        ("engine_pid", r"hung .*SIGSTOP", r"hung .*SIGSTOP"),
    ],
)
async def test_a_decode_worker_that_hangs_is_dead_and_replaced(
    trio: BatonServe, process: str, reason: str, failure: str
) -> None:
    await until_all_serve(trio)
    dice = random.Random(f"{process} {time.time()}")
    streams = [Stream(random_prompt(dice, 100), LONG_TOKENS) for _ in range(6)]
    victim: dict[str, Any] = (await workers_of(trio, "decode"))[0]
    async with api_client(trio) as http:
        with running(http, streams) as tasks:
            await until_generating(trio, victim["id"], streams)
            stopped_s = time.monotonic()
            os.kill(victim[process], signal.SIGSTOP)
            async with arriving(http, dice) as asked:
                await asyncio.wait(tasks)
        ended, others = await on_worker(trio, streams, victim["id"])
        noticed_s = assert_ended_in_time(ended, stopped_s)
        for stream in ended:
            record = await story(trio, stream.request_id)
            assert record["end"] == "failed"
            assert re.search(reason, record["error"]), record["error"]
        assert len(others) >= 2
        assert all(stream.complete for stream in others)
        await assert_nobody_hung(trio, asked, victim, noticed_s)

        newest = await until_replaced(trio, victim)
        replaced_s = time.monotonic() - stopped_s
        assert re.search(failure, newest["last_failure"]), newest
        # A process that was killed can't be woken.
        assert not is_alive(victim["pid"])
        assert not is_alive(victim["engine_pid"])
        print(f"{process}: noticed after {noticed_s:.1f} s, replaced after {replaced_s:.0f} s")
        await assert_exact_so_far(http, streams)
    await until_idle(trio, 20)


@pytest.mark.timeout(600)
async def test_a_decode_worker_that_wakes_once_it_was_given_up_stays_fenced(
    trio: BatonServe,
) -> None:
    await until_all_serve(trio)
    dice = random.Random(f"wakes {time.time()}")
    streams = [Stream(random_prompt(dice, 100), LONG_TOKENS) for _ in range(6)]
    victim = (await workers_of(trio, "decode"))[0]
    async with api_client(trio) as http:
        with running(http, streams) as tasks:
            await until_generating(trio, victim["id"], streams)
            stopped_s = time.monotonic()
            os.kill(victim["pid"], signal.SIGSTOP)
            await until_one_ended(tasks)
            with contextlib.suppress(ProcessLookupError):  # Killed already, as it hangs.
                os.kill(victim["pid"], signal.SIGCONT)
            await asyncio.wait(tasks)
        ended, others = await on_worker(trio, streams, victim["id"])
        noticed_s = assert_ended_in_time(ended, stopped_s)
        print(f"woken after {noticed_s:.1f} s")
        assert all(stream.complete for stream in others)
        # Whether it woke in time to stay or was replaced: what it had is over, and it serves.
        await until_all_serve(trio)
        for stream in ended:
            assert (await story(trio, stream.request_id))["end"] == "failed"
        await assert_exact_so_far(http, streams)
    await until_idle(trio, 20)


async def until_one_ended(tasks: list[asyncio.Task[Stream]]) -> None:
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)


@pytest.mark.timeout(600)
async def test_prompts_of_a_prefill_worker_that_hangs_are_computed_elsewhere(
    trio: BatonServe,
) -> None:
    await until_all_serve(trio)
    dice = random.Random(f"prefill {time.time()}")
    streams = [Stream(random_prompt(dice, 2000), 8) for _ in range(8)]
    (victim,) = await workers_of(trio, "prefill")
    async with api_client(trio) as http:
        with running(http, streams) as tasks:
            await until_prefilling(trio, victim["id"])
            stopped_s = time.monotonic()
            os.kill(victim["pid"], signal.SIGSTOP)
            async with arriving(http, dice) as asked:
                await asyncio.wait(tasks)
        slowest_s = max(stream.ended_s for stream in streams) - stopped_s
        assert all(stream.complete for stream in [*streams, *asked])
        records = [await story(trio, stream.request_id) for stream in [*streams, *asked]]
        moved = [r for r in records if r["attempts"][0]["worker"] == victim["id"] != last(r)]
        assert any(seconds(record) > 4 for record in moved), "none was on it when it stopped"
        newest = await until_replaced(trio, victim)
        print(f"prefill: all complete {slowest_s:.1f} s after the stop")
        assert "hung" in newest["last_failure"]
        assert not is_alive(victim["pid"])
        assert not is_alive(victim["engine_pid"])
        await assert_exact_so_far(http, streams)
    await until_idle(trio, 20)


def seconds(record: dict[str, Any]) -> float:
    """From its arrival to its end."""
    took_s: float = record["ended_at"] - record["arrived_at"]
    return took_s


def last(record: dict[str, Any]) -> str:
    """The worker of its last attempt."""
    worker: str = record["attempts"][-1]["worker"]
    return worker


async def until_prefilling(cluster: BatonServe, worker_id: str) -> None:
    async def prefilling() -> bool:
        on_it, waiting, blocks = (await used(cluster)).get(worker_id, (-1, -1, -1))
        return on_it + waiting >= 4 and blocks > 0

    await until(prefilling, 30, f"{worker_id} computes prompts")
