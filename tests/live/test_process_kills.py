"""A process of the router unit is killed under streams: what it takes along, and what it leaves.

Each test quotes the sentence that it proves. The engines are simulated, since no
engine runs in these processes; all else is as a person starts it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import httpx
import psutil
import pytest

from tests.live.cluster_process import BatonServe, wait_until_gone
from tests.live.conftest import MODEL
from tests.live.streams import Stream, api_client, random_prompt, running, story, until
from tests.live.test_ends import until_idle, until_replaced, workers_of
from tests.processes import command

BACK_WITHIN_S = 5.0
REPLICA_BACK_WITHIN_S = 30.0
"""Nobody waits for it. Ray notices the death and starts a process, which takes 2 s of CPU time."""
ENDED_WITHIN_S = 3.0
LOADED_WITHIN_S = 120.0
"""The full front imports vLLM, on a machine that may have other work."""
SETTLED_WITHIN_S = 15.0
TOKENS = 100
UNIT = ("router", "fast", "full", "edge", "anchor")


@dataclass
class Cut(Stream):
    """One whose connection may break."""

    front: str = "fast"
    was_cut: bool = False

    @property
    def body(self) -> dict[str, Any]:
        # A list of prompts is nothing for the fast front.
        prompt = [self.prompt] if self.front == "full" else self.prompt
        return {**super().body, "prompt": prompt}

    async def run(self, client: httpx.AsyncClient) -> Stream:
        try:
            return await super().run(client)
        except httpx.TransportError:
            self.was_cut = True
            self.ended_s = time.monotonic()
            return self


@pytest.fixture(scope="module")
def paced(slow_pair: BatonServe) -> BatonServe:
    """With both fronts."""
    slow_pair.until_complete()
    return slow_pair


# What is seen of the unit


async def unit_of(cluster: BatonServe) -> dict[str, Any]:
    """The processes of the one unit, by what they are."""
    answer = await asyncio.to_thread(cluster.get, "/cluster/routers")
    (unit,) = answer["routers"]
    fast, full = unit["fronts"]
    pids = {"router": unit["pid"], "fast": fast, "full": full}
    return {**pids, "edge": unit["edge"], "anchor": unit["anchor"], "seen": unit["seen"]}


async def until_in_time(
    condition: Callable[[], Awaitable[bool]],
    killed_s: float,
    what: str,
    limit_s: float = BACK_WITHIN_S,
) -> float:
    """Wait, without taking the cores from those who are waited for; seconds since the kill."""
    while not await condition():
        took_s = time.monotonic() - killed_s
        assert took_s < limit_s, f"not within {took_s:.1f} s of the kill: {what}"
        await asyncio.sleep(0.1)
    return time.monotonic() - killed_s


async def until_back(
    cluster: BatonServe,
    killed_s: float,
    is_back: Callable[[dict[str, Any]], bool],
    limit_s: float = BACK_WITHIN_S,
) -> float:
    """Until the unit is as it should be, whoever does not answer meanwhile; seconds since."""

    async def back() -> bool:
        try:
            return is_back(await unit_of(cluster))
        except (OSError, ValueError):
            return False

    return await until_in_time(back, killed_s, "the unit has what it needs", limit_s)


async def until_served(cluster: BatonServe, killed_s: float) -> float:
    """Until a request that comes now is answered in full; seconds since the kill."""
    body = {"model": MODEL, "prompt": [500, 600], "max_tokens": 2}
    async with api_client(cluster) as http:

        async def served() -> bool:
            with contextlib.suppress(httpx.TransportError):
                return (await http.post("/v1/completions", json=body)).status_code == 200
            return False

        return await until_in_time(served, killed_s, "a request is served")


async def until_changed(
    cluster: BatonServe, before: dict[str, Any], name: str, killed_s: float
) -> float:
    """Until another process is in its place."""
    return await until_back(
        cluster, killed_s, lambda now: now[name] is not None and now[name] != before[name]
    )


def assert_same_but(before: dict[str, Any], now: dict[str, Any], *killed: str) -> None:
    """The other processes of the unit are those from before."""
    for name in UNIT:
        assert now[name] is not None
        assert (now[name] != before[name]) == (name in killed), name


def replica_of(cluster: BatonServe) -> psutil.Process:
    """The process of the Ray Serve replica that owns the unit."""
    below = psutil.Process(cluster.process.pid).children(recursive=True)
    (replica,) = (p for p in below if any("RouterUnit" in word for word in command(p)))
    return replica


def refused_until_loaded(cluster: BatonServe, killed_s: float) -> tuple[int, float]:
    """What only the full front serves is refused with a time to come back, until it is served.

    Returns how often it was refused, and the seconds since the kill.
    """
    refusals = 0
    body = {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2}
    with httpx.Client(base_url=cluster.url, timeout=30, trust_env=False) as client:
        while (answer := client.post("/v1/messages", json=body)).status_code != 200:
            # 502 for what arrived as the process died.
            assert answer.status_code == 503 or refusals == 0, answer.text
            assert answer.json()["error"]["message"]
            assert answer.status_code == 502 or int(answer.headers["retry-after"]) >= 1
            refusals += 1
            assert time.monotonic() - killed_s < LOADED_WITHIN_S
            time.sleep(0.2)
    return refusals, time.monotonic() - killed_s


class Footprint(NamedTuple):
    """What would grow if something leaked."""

    processes: Counter[str]
    """By name, but for Ray's idle ones, which it keeps for later as it likes."""
    anchor_descriptors: int
    router_descriptors: int
    """Without those on which the edge asks for tickets: it keeps them for its next requests."""

    @classmethod
    def of(cls, cluster: BatonServe, unit: dict[str, Any]) -> Footprint:
        names = [title(process) for process in cluster.processes()]
        router = psutil.Process(unit["router"])
        for_tickets = [
            connection
            for connection in router.net_connections("unix")
            if str(connection.laddr).endswith("/tickets.sock")
        ]
        return cls(
            Counter(name for name in names if name and "IDLE" not in name),
            psutil.Process(unit["anchor"]).num_fds(),
            router.num_fds() - len(for_tickets),
        )


def title(process: psutil.Process) -> str:
    """Its name, without the method that an actor's process is in."""
    try:
        return str(process.name()).partition(".")[0]
    except psutil.Error:
        return ""


async def footprint(cluster: BatonServe) -> Footprint:
    unit = await unit_of(cluster)
    return await asyncio.to_thread(Footprint.of, cluster, unit)


async def until_ready(cluster: BatonServe) -> None:
    """Nothing under way, the full front loaded, every connection made that the test will use."""
    await asyncio.to_thread(cluster.until_complete)
    streams = [*make_streams("fast", 12, max_tokens=4), *make_streams("full", 6, max_tokens=4)]
    async with api_client(cluster) as http:
        bodies = ({**stream.body, "stream": False} for stream in streams)
        await asyncio.gather(*(http.post("/v1/completions", json=body) for body in bodies))
    await until_idle(cluster, SETTLED_WITHIN_S)


async def assert_nothing_leaked(cluster: BatonServe, before: Footprint) -> None:
    await until_idle(cluster, SETTLED_WITHIN_S)
    now = before

    async def as_before() -> bool:
        nonlocal now
        now = await footprint(cluster)
        return now == before

    try:
        await until(as_before, SETTLED_WITHIN_S, "everything is as before")
    except AssertionError as error:
        raise AssertionError(f"{error}: before {before}, now {now}") from None
    under_way = await asyncio.to_thread(cluster.metric, "baton_requests_under_way")
    assert under_way == 0


def make_streams(front: str, count: int, max_tokens: int = TOKENS) -> list[Cut]:
    dice = random.Random(f"{front} {time.time()}")
    return [Cut(random_prompt(dice, 100), max_tokens, front=front) for _ in range(count)]


async def until_generating(streams: list[Cut]) -> None:
    async def generating() -> bool:
        return all(len(stream.texts) > 2 for stream in streams)

    await until(generating, 30, "all streams have tokens")


def kill(pid: int) -> float:
    os.kill(pid, signal.SIGKILL)
    return time.monotonic()


def assert_broken(streams: list[Cut], killed_s: float) -> None:
    """Their clients learn at once that they are not complete."""
    for stream in streams:
        assert stream.was_cut
        assert not stream.complete
        assert 0 <= stream.ended_s - killed_s < ENDED_WITHIN_S


async def assert_ended(cluster: BatonServe, streams: list[Cut], end: str, error: str) -> None:
    """What their records say."""
    for stream in streams:
        record = await story(cluster, stream.request_id)
        assert record["end"] == end, record
        assert error in (record["error"] or ""), record


async def assert_untouched(cluster: BatonServe, streams: list[Cut], killed_s: float) -> None:
    """They went on over the same connection and are exact."""
    for stream in streams:
        assert stream.complete, stream
        assert stream.ended_s > killed_s
        record = await story(cluster, stream.request_id)
        assert record["output_tokens"] == stream.max_tokens
    # Of the same front: at a text's end, only the fast one shows bytes that are no whole character.
    again = [Cut(stream.prompt, stream.max_tokens, front=stream.front) for stream in streams]
    async with api_client(cluster) as http:
        with running(http, again) as tasks:
            await asyncio.gather(*tasks)
    assert [stream.text for stream in streams] == [stream.text for stream in again]


# The tests


@pytest.mark.slow
@pytest.mark.timeout(500)
async def test_a_killed_fast_front_takes_its_own_streams(paced: BatonServe) -> None:
    """ "If the anchor dies, its streams end, as when a front does." """
    await until_ready(paced)
    before = await footprint(paced)
    unit = await unit_of(paced)
    fast, full = make_streams("fast", 8), make_streams("full", 3)
    async with api_client(paced) as http:
        with running(http, [*fast, *full]) as tasks:
            await until_generating([*fast, *full])
            killed_s = kill(unit["fast"])
            back_s = await until_served(paced, killed_s)
            await asyncio.gather(*tasks)
    print(f"the fast front: a request is served {back_s:.2f} s after the kill")
    assert_same_but(unit, await unit_of(paced), "fast")
    assert_broken(fast, killed_s)
    await assert_ended(paced, fast, "failed", "front")
    await assert_untouched(paced, full, killed_s)
    await assert_nothing_leaked(paced, before)


@pytest.mark.slow
@pytest.mark.timeout(500)
async def test_a_killed_full_front_takes_its_own_streams(paced: BatonServe) -> None:
    """ "If the anchor dies, its streams end, as when a front does." And of the start: "It starts
    after the fast one (its routes answer 503 with `Retry-After` until then)"."""
    await until_ready(paced)
    before = await footprint(paced)
    unit = await unit_of(paced)
    fast, full = make_streams("fast", 8), make_streams("full", 3)
    async with api_client(paced) as http:
        with running(http, [*fast, *full]) as tasks:
            await until_generating([*fast, *full])
            killed_s = kill(unit["full"])
            loading = asyncio.create_task(asyncio.to_thread(refused_until_loaded, paced, killed_s))
            back_s = await until_changed(paced, unit, "full", killed_s)
            served_s = await until_served(paced, killed_s)
            await asyncio.gather(*tasks)
    print(f"the full front: started again {back_s:.2f} s after the kill; fast: {served_s:.2f} s")
    assert_same_but(unit, await unit_of(paced), "full")
    assert_broken(full, killed_s)
    await assert_ended(paced, full, "failed", "front")
    await assert_untouched(paced, fast, killed_s)
    refusals, loaded_s = await loading
    print(f"the full front: loaded {loaded_s:.1f} s after the kill, {refusals} refusals meanwhile")
    assert refusals > 0
    await until_ready(paced)
    await assert_nothing_leaked(paced, before)


@pytest.mark.timeout(500)
async def test_a_killed_edge_takes_its_connections(paced: BatonServe) -> None:
    """ "HAProxy … owns the listening port"; the anchor "starts and restarts the edge"."""
    await until_ready(paced)
    before = await footprint(paced)
    unit = await unit_of(paced)
    streams = [*make_streams("fast", 8), *make_streams("full", 3)]
    async with api_client(paced) as http:
        with running(http, streams) as tasks:
            await until_generating(streams)
            killed_s = kill(unit["edge"])
            back_s = await until_served(paced, killed_s)
            await asyncio.gather(*tasks)
    print(f"the edge: a request is served {back_s:.2f} s after the kill")
    assert_same_but(unit, await unit_of(paced), "edge")
    assert_broken(streams, killed_s)
    await assert_ended(paced, streams, "cancelled", "")
    await assert_nothing_leaked(paced, before)


@pytest.mark.timeout(500)
async def test_a_killed_replica_takes_nothing(paced: BatonServe) -> None:
    """ "its replica … adopts it [the anchor] after its own restart (by pid and start time), watches
    it and tells it who the workers are, but stands in no request's path"."""
    await until_ready(paced)
    before = await footprint(paced)
    unit = await unit_of(paced)
    streams = [*make_streams("fast", 8), *make_streams("full", 3)]
    replica = replica_of(paced)
    async with api_client(paced) as http:
        with running(http, streams) as tasks:
            await until_generating(streams)
            killed_at_s = time.time()
            killed_s = kill(replica.pid)
            back_s = await until_back(
                paced, killed_s, lambda now: now["seen"] > killed_at_s, REPLICA_BACK_WITHIN_S
            )
            await asyncio.gather(*tasks)
    print(f"the replica: asks for the workers {back_s:.2f} s after the kill")
    assert replica_of(paced).pid != replica.pid
    assert_same_but(unit, await unit_of(paced))
    await assert_untouched(paced, streams, killed_s)
    await assert_nothing_leaked(paced, before)
    # It tells who the workers are.
    victim = (await workers_of(paced, "decode"))[0]
    kill(victim["pid"])
    await until_replaced(paced, victim)


@pytest.mark.slow
@pytest.mark.timeout(500)
async def test_a_killed_anchor_takes_the_units_streams(paced: BatonServe) -> None:
    """ "If the anchor dies, its streams end"; it "starts … the edge, the fronts and the router of
    its node"; the replica "watches it"."""
    await until_ready(paced)
    before = await footprint(paced)
    unit = await unit_of(paced)
    processes = psutil.Process(unit["anchor"]).children(recursive=True)
    workers = await workers_of(paced)
    streams = [*make_streams("fast", 8), *make_streams("full", 3)]
    async with api_client(paced) as http:
        with running(http, streams) as tasks:
            await until_generating(streams)
            killed_s = kill(unit["anchor"])
            back_s = await until_served(paced, killed_s)
            await asyncio.gather(*tasks)
    print(f"the anchor: a request is served {back_s:.2f} s after the kill")
    assert_broken(streams, killed_s)
    assert len(processes) >= 5
    assert wait_until_gone(processes, ENDED_WITHIN_S) == []
    now = await unit_of(paced)
    assert all(now[name] not in (None, unit[name]) for name in UNIT)
    await until_ready(paced)
    await assert_nothing_leaked(paced, before)
    for name in ("id", "pid", "incarnation", "restarts"):
        assert [w[name] for w in await workers_of(paced)] == [w[name] for w in workers]
