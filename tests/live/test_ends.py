"""Requests that end before they are done: clients that leave, workers that die."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
import pytest_asyncio

from tests.live.cluster_process import BatonServe
from tests.live.conftest import MODEL
from tests.live.streams import (
    LeavingClient,
    Stream,
    api_client,
    random_prompt,
    running,
    story,
    until,
)

FREE_WITHIN_S = 2.0
"""The lease on blocks that wait to be fetched is 30 s: what only it frees is not free in time."""
END_WITHIN_S = 3.0
DEADLINE_S = 4.0
REPLACED_WITHIN_S = 90.0
LONG_PROMPT_TOKENS = 6000
DISCONNECTS = 300
CONCURRENT_CLIENTS = 16


@pytest_asyncio.fixture
async def http(cluster: BatonServe) -> AsyncIterator[httpx.AsyncClient]:
    async with api_client(cluster) as client:
        yield client


# What is seen of the cluster


async def workers_of(cluster: BatonServe, role: str | None = None) -> list[dict[str, Any]]:
    return await asyncio.to_thread(cluster.workers, role)


async def used(cluster: BatonServe) -> dict[str, tuple[int, int, int]]:
    """Running and waiting requests and used blocks, by worker."""
    found = {}
    for worker in await workers_of(cluster):
        # None: no router answered, or none knows it yet.
        load = worker["load"] or {"running": -1, "waiting": -1, "kv_blocks_used": -1}
        found[worker["id"]] = (load["running"], load["waiting"], load["kv_blocks_used"])
    return found


def is_idle(loads: dict[str, tuple[int, int, int]]) -> bool:
    return all(load == (0, 0, 0) for load in loads.values())


async def until_idle(cluster: BatonServe, limit_s: float) -> float:
    async def idle() -> bool:
        return is_idle(await used(cluster))

    return await until(idle, limit_s, "no request and no used block on any worker")


async def until_replaced(cluster: BatonServe, dead: dict[str, Any]) -> dict[str, Any]:
    """Wait for the worker in the place of a dead one; /health is 200 then."""

    async def replaced() -> bool:
        workers = await workers_of(cluster, dead["role"])
        everyone_serves = all(w["state"] == "ready" and w["load"] for w in workers)
        return everyone_serves and dead["id"] not in {w["id"] for w in workers}

    took_s = await until(replaced, REPLACED_WITHIN_S, f"another serves in {dead['id']}'s place")
    await asyncio.to_thread(cluster.until_healthy)
    print(f"{dead['id']} was replaced after {took_s:.1f} s")
    newest = max(await workers_of(cluster, dead["role"]), key=lambda w: int(w["incarnation"]))
    assert newest["incarnation"] > dead["incarnation"]
    assert newest["pid"] != dead["pid"]
    assert newest["restarts"] == dead["restarts"] + 1
    return newest


def is_alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def states(record: dict[str, Any]) -> list[str]:
    """What a request went through, by the names of its states."""
    return [entry["what"].partition(":")[0] for entry in record["story"]]


async def texts_of(http: httpx.AsyncClient, streams: list[Stream]) -> list[str]:
    """What these requests answer when nothing is in their way, one at a time."""
    texts = []
    for stream in streams:
        again = await Stream(stream.prompt, stream.max_tokens).run(http)
        assert again.complete, again.error
        texts.append(again.text)
    return texts


# Clients that leave


LAST_STATE = {
    "mid-prefill": "prefilling",
    "mid-handoff": "handing_off",
    "mid-decode": "decoding",
}


@pytest.mark.parametrize("moment", LAST_STATE)
async def test_a_client_that_leaves_frees_everything_at_once(
    cluster: BatonServe, moment: str
) -> None:
    await until_idle(cluster, 10)
    dice = random.Random(f"leave {moment} {time.time()}")
    hits, tries = 0, 0
    while hits < 3:
        tries += 1
        assert tries <= 12, f"only {hits} of {tries} clients left {moment}"
        stream = Stream(random_prompt(dice, LONG_PROMPT_TOKENS), 1500)
        client = await LeavingClient.connect(cluster, stream)
        await client.send()
        await client.read_head()
        if moment == "mid-prefill":
            await until_prefilling(cluster)
        else:
            await client.read_events(1 if moment == "mid-handoff" else 20)
        left_s = await client.leave()
        freed_after_s = await seconds_until_freed(cluster, left_s)
        record = await story(cluster, stream.request_id)
        assert record["end"] == "cancelled", record
        hits += states(record)[-2] == LAST_STATE[moment]
        print(f"{moment}: {states(record)}, freed after {freed_after_s:.2f} s")


async def until_prefilling(cluster: BatonServe) -> None:
    """Some of a prompt is computed and holds blocks."""

    async def prefilling() -> bool:
        (worker,) = await workers_of(cluster, "prefill")
        return bool(worker["load"]["running"] and worker["load"]["kv_blocks_used"])

    await until(prefilling, 10, "the prefill worker computes")


async def seconds_until_freed(cluster: BatonServe, left_s: float) -> float:
    """Watch for the whole time allowed: an engine in the middle of a step tells at its end."""
    last_used_s = left_s
    while time.monotonic() < left_s + FREE_WITHIN_S:
        loads = await used(cluster)
        if not is_idle(loads):
            last_used_s = time.monotonic()
        await asyncio.sleep(0.02)
    loads = await used(cluster)
    assert is_idle(loads), f"{FREE_WITHIN_S} s after the client left: {loads}"
    return last_used_s - left_s


@pytest.mark.timeout(240)
async def test_no_block_is_lost_to_300_clients_that_leave_at_random(
    cluster: BatonServe, http: httpx.AsyncClient
) -> None:
    await until_idle(cluster, 10)
    dice = random.Random(300)
    witness = Stream(random_prompt(dice, 500), 32)
    (expected,) = await texts_of(http, [witness])
    await until_idle(cluster, 10)
    before = await workers_of(cluster)
    cancelled = cluster.metric("baton_requests_total", end="cancelled")
    places = asyncio.Semaphore(CONCURRENT_CLIENTS)
    began_s = time.monotonic()

    async def one(seed: int) -> None:
        async with places:
            await come_and_leave(cluster, random.Random(seed))

    async with asyncio.timeout(200):
        await asyncio.gather(*(one(seed) for seed in range(DISCONNECTS)))
    took_s = time.monotonic() - began_s
    idle_after_s = await until_idle(cluster, 5)
    cancelled = cluster.metric("baton_requests_total", end="cancelled") - cancelled
    print(
        f"{DISCONNECTS} clients in {took_s:.1f} s, {cancelled:.0f} cancelled under way; "
        f"idle after {idle_after_s:.2f} s"
    )
    # The others left before an engine request was made of what they had sent.
    assert cancelled > DISCONNECTS / 2
    assert cluster.metric("baton_requests_under_way") == 0
    after = await workers_of(cluster)
    for name in ("id", "pid", "engine_pid", "incarnation", "restarts"):
        assert [w[name] for w in after] == [w[name] for w in before]
    assert await texts_of(http, [witness]) == [expected]


async def come_and_leave(cluster: BatonServe, dice: random.Random) -> None:
    """One client: anything from half a request to many tokens, then it is gone."""
    stream = Stream(random_prompt(dice, dice.randint(1, 1500)), 1000)
    client = await LeavingClient.connect(cluster, stream)
    moment = dice.choice(["half sent", "sent", "head", "events", "events", "later", "later"])
    await client.send(dice.random() if moment == "half sent" else 1.0)
    if moment in ("head", "events"):
        await client.read_head()
    if moment == "events":
        await client.read_events(dice.randint(1, 40))
    if moment == "later":
        await asyncio.sleep(dice.uniform(0, 1.5))
    await client.leave()


# Workers that die


@pytest.mark.timeout(240)
async def test_requests_in_prefill_run_elsewhere_when_their_worker_dies(
    cluster: BatonServe, http: httpx.AsyncClient
) -> None:
    await until_idle(cluster, 10)
    (victim,) = await workers_of(cluster, "prefill")
    dice = random.Random(f"prefill {time.time()}")
    streams = [Stream(random_prompt(dice, LONG_PROMPT_TOKENS // 2), 24) for _ in range(6)]
    with running(http, streams) as tasks:
        await until_prefilling(cluster)
        os.kill(victim["pid"], signal.SIGKILL)
        killed_s = time.monotonic()
        await asyncio.gather(*tasks)
    slowest_s = max(stream.ended_s for stream in streams) - killed_s
    print(f"all complete {slowest_s:.1f} s after the kill")
    assert all(stream.complete for stream in streams), [stream.error for stream in streams]
    records = [await story(cluster, stream.request_id) for stream in streams]
    moved = [r for r in records if r["attempts"][0]["worker"] == victim["id"]]
    was_in_prefill = [r for r in moved if "waiting" in states(r)]
    assert len(was_in_prefill) >= 3, [states(record) for record in records]
    for record in was_in_prefill:
        assert record["attempts"][-1]["worker"] != victim["id"]
    # One that comes now is served too.
    late = await Stream(random_prompt(dice, 300), 8).run(http)
    assert late.complete

    await until_replaced(cluster, victim)
    assert [stream.text for stream in streams] == await texts_of(http, streams)
    (again,) = [await Stream(random_prompt(dice, 300), 8).run(http)]
    (newest,) = await workers_of(cluster, "prefill")
    record = await story(cluster, again.request_id)
    assert record["attempts"][0]["worker"] == newest["id"]
    assert again.complete


@pytest.mark.timeout(240)
@pytest.mark.parametrize("process", ["pid", pytest.param("engine_pid", marks=pytest.mark.slow)])
async def test_streams_of_a_dead_decode_worker_end_with_an_error(
    cluster: BatonServe, http: httpx.AsyncClient, process: str
) -> None:
    await until_idle(cluster, 10)
    (victim,) = await workers_of(cluster, "decode")
    dice = random.Random(f"decode {time.time()}")
    streams = [Stream(random_prompt(dice, 200), 4000) for _ in range(5)]
    whole = asyncio.create_task(not_streamed(http, random_prompt(dice, 200)))
    with running(http, streams) as tasks:
        await until_generating(cluster, victim["id"], streams, others=1)
        os.kill(victim[process], signal.SIGKILL)
        killed_s = time.monotonic()
        await asyncio.gather(*tasks)
    answer = await whole
    print(f"ended after {[round(stream.ended_s - killed_s, 2) for stream in streams]} s")
    for stream in streams:
        assert stream.ended_s - killed_s < END_WITHIN_S
        assert_ended_with_error(stream)
        await assert_record_says_failed(cluster, stream, victim["id"])
    assert answer.status_code >= 500
    assert answer.json()["error"]["message"]

    async def both_are_dead() -> bool:
        return not is_alive(victim["pid"]) and not is_alive(victim["engine_pid"])

    await until(both_are_dead, 5, "the actor and its engine are both dead")
    newest = await until_replaced(cluster, victim)
    again = await Stream(random_prompt(dice, 200), 16).run(http)
    assert again.complete
    record = await story(cluster, again.request_id)
    assert record["attempts"][-1]["worker"] == newest["id"]


@pytest.mark.slow
@pytest.mark.timeout(180)
async def test_streams_of_the_other_decode_workers_go_on(slow_pair: BatonServe) -> None:
    dice = random.Random(f"pair {time.time()}")
    streams = [Stream(random_prompt(dice, 100), 100) for _ in range(12)]
    async with api_client(slow_pair) as http:
        victim = (await workers_of(slow_pair, "decode"))[0]
        with running(http, streams) as tasks:
            await until_generating(slow_pair, victim["id"], streams)
            os.kill(victim["pid"], signal.SIGKILL)
            killed_s = time.monotonic()
            await asyncio.gather(*tasks)
        failed = [stream for stream in streams if stream.error is not None]
        others = [stream for stream in streams if stream.error is None]
        print(f"ended after {[round(stream.ended_s - killed_s, 2) for stream in failed]} s")
        assert len(failed) >= 4
        assert len(others) >= 4
        for stream in failed:
            assert stream.ended_s - killed_s < END_WITHIN_S
            assert_ended_with_error(stream)
            await assert_record_says_failed(slow_pair, stream, victim["id"])
        for stream in others:
            assert stream.complete
            assert stream.ended_s > killed_s
            record = await story(slow_pair, stream.request_id)
            assert victim["id"] not in {attempt["worker"] for attempt in record["attempts"]}
        await until_replaced(slow_pair, victim)
        with running(http, [Stream(s.prompt, s.max_tokens) for s in others]) as tasks:
            again = await asyncio.gather(*tasks)
        assert [stream.text for stream in again] == [stream.text for stream in others]


# Requests that run out of time


async def test_a_request_past_its_deadline_ends_with_an_error(slow_pair: BatonServe) -> None:
    dice = random.Random(f"deadline {time.time()}")
    async with api_client(slow_pair) as http:
        http.headers["X-Baton-Deadline-Ms"] = f"{DEADLINE_S * 1000:.0f}"
        began_s = time.monotonic()
        stream = await Stream(random_prompt(dice, 100), 1000).run(http)
        assert_ended_with_error(stream)
        took_s = stream.ended_s - began_s
        answer = await not_streamed(http, random_prompt(dice, 100))
    print(f"deadline {DEADLINE_S} s: ended after {took_s:.2f} s")
    assert took_s + 0.1 > DEADLINE_S
    assert took_s < DEADLINE_S + END_WITHIN_S
    assert answer.status_code == 504
    assert "deadline" in answer.json()["error"]["message"]
    for request_id in (stream.request_id, answer.headers["x-request-id"]):
        record = await story(slow_pair, request_id)
        assert record["end"] == "failed"
        assert "deadline" in record["error"]
    await until_idle(slow_pair, 5)


async def not_streamed(http: httpx.AsyncClient, prompt: list[int]) -> httpx.Response:
    body = {"model": MODEL, "prompt": prompt, "max_tokens": 4000, "ignore_eos": True}
    return await http.post("/v1/completions", json=body)


async def until_generating(
    cluster: BatonServe, worker_id: str, streams: list[Stream], others: int = 0
) -> None:
    """All have some tokens, and the worker runs at least 4 of them, and `others`."""

    async def generating() -> bool:
        running, _, _ = (await used(cluster))[worker_id]
        return running >= 4 + others and all(len(stream.texts) > 2 for stream in streams)

    await until(generating, 30, f"{worker_id} generates for all")


def assert_ended_with_error(stream: Stream) -> None:
    assert stream.error is not None
    assert stream.error["message"]
    assert stream.finish_reason is None
    assert len(stream.texts) > 2


async def assert_record_says_failed(cluster: BatonServe, stream: Stream, worker_id: str) -> None:
    record = await story(cluster, stream.request_id)
    assert record["end"] == "failed"
    assert worker_id in record["error"]
    assert "lost" in record["error"]
