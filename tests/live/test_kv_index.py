"""The router's KV index, fed by real engines."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable

from openai import OpenAI

from tests.live.cluster_process import BatonServe, once_settled
from tests.live.conftest import MODEL

BLOCK_TOKENS = 128
LIMIT_S = 10.0


def indexed(cluster: BatonServe) -> dict[str, int | None]:
    """By role: blocks of the worker's prefix cache that the router knows of; None: it has not heard
    of the worker."""
    return {worker["role"]: worker["kv_index_blocks"] for worker in cluster.workers()}


def until(condition: Callable[[], bool]) -> None:
    began_s = time.monotonic()
    while not condition():
        assert time.monotonic() - began_s < LIMIT_S
        time.sleep(0.05)


def ask(client: OpenAI, prompt: list[int], **extra: str) -> None:
    client.completions.create(
        model=MODEL, prompt=prompt, max_tokens=2, temperature=0, extra_body=extra
    )


def test_it_knows_what_both_workers_hold(cluster: BatonServe, client: OpenAI) -> None:
    prompt = random.Random(41).choices(range(300, 2000), k=5 * BLOCK_TOKENS + 7)
    before = once_settled(lambda: indexed(cluster))

    def added() -> dict[str, int]:
        return {
            role: (count or 0) - (before[role] or 0) for role, count in indexed(cluster).items()
        }

    ask(client, prompt)
    until(lambda: added() == {"prefill": 5, "decode": 5})
    ask(client, prompt)
    assert once_settled(added) == {"prefill": 5, "decode": 5}
    ask(client, prompt, cache_salt="a tenant")
    until(lambda: added() == {"prefill": 10, "decode": 10})
    entries = cluster.metric("baton_kv_index_entries")
    assert max(count or 0 for count in indexed(cluster).values()) <= entries
    assert cluster.metric("baton_kv_index_gaps_total") == 0


def test_the_next_router_is_told_all(cluster: BatonServe, client: OpenAI) -> None:
    ask(client, random.Random(42).choices(range(300, 2000), k=3 * BLOCK_TOKENS))
    known = once_settled(lambda: indexed(cluster))
    assert all(known.values())
    (router,) = cluster.get("/cluster/routers")["routers"]
    os.kill(router["pid"], signal.SIGKILL)
    until(lambda: cluster.get("/cluster/routers")["routers"][0]["pid"] not in (None, router["pid"]))
    until(lambda: indexed(cluster) == known)
    assert cluster.metric("baton_kv_index_snapshots_total") == 2
