"""Two units on the same workers, as on two nodes: real routers, each with an anchor of its own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from engine.spec import EngineTimes, PoolTimes, SimulatedTiming
from protos.enginecore import EngineRequest
from router.settings import JointSettings
from tests.router.running_router import STEP_S, Unit, expected

DECODE = ("d0", "d1", "d2", "d3")
ENGINE = EngineTimes(SimulatedTiming(step_base_s=STEP_S), max_step_tokens=2048)
JOINT = JointSettings(
    ttft_slo_s=1.0,
    tpot_slo_s=0.05,
    engines=PoolTimes(ENGINE, ENGINE),
)
PROMPT_TOKENS = 100
LONG = 1500
"""Output tokens: 6 s of them."""
TOLD_S = 0.3
"""Within this, a worker has told one router what the other has there."""
ROUNDS = 4


@pytest.fixture
async def units(tmp_path: Path) -> AsyncIterator[tuple[Unit, Unit]]:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    one, two = (Unit(tmp_path / name, joint=JOINT, router_id=name) for name in ("one", "two"))
    try:
        await one.start("p0", *DECODE)
        await two.start_beside(one)
        yield one, two
    finally:
        one.close()
        two.close()


async def decodes_at(unit: Unit, requests: list[EngineRequest]) -> list[str]:
    """The worker that makes each request's tokens."""
    told = [(await unit.get(f"/requests/{request.external_req_id}"))[1] for request in requests]
    return [each["requests"][0]["attempts"][-1]["worker"] for each in told]


async def test_a_router_goes_where_the_other_put_nothing(units: tuple[Unit, Unit]) -> None:
    one, two = units
    for first, second in [(one, two), (two, one)] * (ROUNDS // 2):
        taken: list[str] = []
        asked: list[tuple[Unit, EngineRequest]] = []
        for unit in (first, second):
            requests = [unit.request(PROMPT_TOKENS, max_tokens=LONG) for _ in range(2)]
            for request in requests:
                await unit.anchor.ask(request).begun(2)
            taken += await decodes_at(unit, requests)
            asked += [(unit, request) for request in requests]
            await asyncio.sleep(TOLD_S)
        # By chance alone once in six rounds: a router that only knows of its own takes any two.
        assert sorted(taken) == sorted(DECODE)
        for unit, request in asked:
            unit.anchor.abort(request.request_id)
        for unit in (first, second):
            await unit.idle()
        await asyncio.sleep(TOLD_S)


async def test_outputs_of_both_are_exact_while_one_dies(units: tuple[Unit, Unit]) -> None:
    one, two = units
    requests = [
        (unit, unit.request(50 + 37 * number, max_tokens=150))
        for number in range(8)
        for unit in units
    ]
    streams = [(request, unit.anchor.ask(request)) for unit, request in requests]
    for _, stream in streams:
        await stream.begun(20)
    hellos = one.anchor.hellos
    one.kill_router()
    one.start_router()
    await one.anchor.greeted(hellos + 1)
    for request, stream in streams:
        assert await stream.whole() == await expected(request)
    for unit in units:
        await unit.healthy()
        await unit.idle()
    _, state = await one.get("/state")
    assert state["counts"]["recovered"] > 0
    # Two's requests never saw it.
    _, state = await two.get("/state")
    assert state["counts"]["resends"] == 0


async def test_room_goes_to_who_came_first_whichever_router_it_waits_at(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    one, two = (Unit(tmp_path / name, joint=JOINT, router_id=name) for name in ("one", "two"))
    try:
        # Four fill its cache, for longer than the rest takes.
        await one.start("p0", "d0", step_s=0.05)
        await two.start_beside(one)
        for _ in range(10):
            two.request(1)  # So that no prompt of the one is one of the other.
        running = []
        for unit in (one, two, one, two):
            request = unit.request(1900, max_tokens=140)
            await unit.anchor.ask(request).begun(2)
            running.append((unit, request))
        waiting = []
        for unit in (two, one, one, two):
            request = unit.request(1900, max_tokens=2)
            waiting.append(unit.anchor.ask(request))
            await asyncio.sleep(TOLD_S / 2)
        assert not any(stream.tokens for stream in waiting), "they wait"
        for at, (unit, request) in enumerate(running):
            unit.anchor.abort(request.request_id)
            await waiting[at].whole()
        began_s = [stream.times_s[0] for stream in waiting]
        assert began_s == sorted(began_s)
    finally:
        one.close()
        two.close()
