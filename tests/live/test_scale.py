"""From aggregated serving over one worker of each kind to four, on the simulated engine."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from tests.live.cluster_process import HANDED_OVER, BatonServe
from tests.live.streams import Stream, api_client, running, story

pytestmark = pytest.mark.slow

STREAMS = 200
POOLS = {"aggregated": (0, 1), "1x1": (1, 1), "4x4": (4, 4)}


def make_streams() -> list[Stream]:
    """The same every time: prompts around block boundaries, some with a shared beginning."""
    dice = random.Random(44)
    shared = dice.choices(range(300, 2000), k=128)
    streams = []
    for index in range(STREAMS):
        length = dice.choice([1, 15, 16, 17, 33, 128, 257, 700, 1500])
        own = dice.choices(range(300, 2000), k=length)
        streams.append(Stream(shared + own if index % 3 == 0 else own, dice.randint(2, 48)))
    return streams


@pytest.fixture(scope="module")
def answers() -> dict[str, list[str]]:
    """The texts by pools, from the tests that ran already."""
    return {}


@pytest.fixture(scope="module", params=POOLS)
def sized(request: pytest.FixtureRequest) -> Iterator[tuple[str, BatonServe]]:
    prefill, decode = POOLS[request.param]
    config: dict[str, Any] = {
        "engine": "simulated",
        "prefill": {"replicas": prefill},
        "decode": {"replicas": decode},
        "router": HANDED_OVER,
    }
    serve = BatonServe.start(config)
    try:
        print(f"\n{request.param}: healthy after {serve.until_healthy():.1f} s")
        yield request.param, serve
    finally:
        serve.interrupt()


@pytest.mark.timeout(240)
async def test_200_streams_at_once_give_the_same_text_on_any_number_of_workers(
    sized: tuple[str, BatonServe], answers: dict[str, list[str]]
) -> None:
    name, cluster = sized
    prefill, decode = POOLS[name]
    workers = cluster.workers()
    assert Counter(w["role"] for w in workers) == Counter(prefill=prefill, decode=decode)
    streams = make_streams()
    began_s = time.monotonic()
    async with api_client(cluster) as http:
        with running(http, streams) as tasks:
            await asyncio.gather(*tasks)
    print(f"{name}: {STREAMS} streams in {time.monotonic() - began_s:.1f} s")

    assert all(stream.complete for stream in streams)
    assert {stream.finish_reason for stream in streams} == {"length"}
    answers[name] = [stream.text for stream in streams]
    assert len(set(answers[name])) > STREAMS * 0.95  # Else equal texts would prove nothing.
    for other in answers.values():
        assert answers[name] == other

    handoffs = cluster.metric("baton_handoffs_total")
    assert handoffs == (STREAMS if prefill else 0)
    records = [await story(cluster, stream.request_id) for stream in streams]
    assert {record["end"] for record in records} == {"complete"}
    assert [r["output_tokens"] for r in records] == [s.max_tokens for s in streams]
    first = Counter(record["attempts"][0]["worker"] for record in records)
    last = Counter(record["attempts"][-1]["worker"] for record in records)
    for worker in workers:
        got = first if worker["role"] == "prefill" else last
        # None is left out, and none gets the work of two.
        fair = STREAMS / (prefill if worker["role"] == "prefill" else decode)
        assert fair / 2 <= got[worker["id"]] <= fair * 2, (first, last)
    assert sum(len(record["attempts"]) for record in records) == STREAMS * (2 if prefill else 1)


def test_no_worker_holds_anything_afterwards(sized: tuple[str, BatonServe]) -> None:
    _, cluster = sized
    deadline_s = time.monotonic() + 5
    while any(w["load"]["running"] + w["load"]["kv_blocks_used"] for w in cluster.workers()):
        assert time.monotonic() < deadline_s, cluster.workers()
        time.sleep(0.05)
    assert cluster.metric("baton_requests_under_way") == 0
    assert cluster.metric("baton_requests_total", end="complete") >= STREAMS
    assert cluster.metric("baton_requests_total", end="failed") == 0
