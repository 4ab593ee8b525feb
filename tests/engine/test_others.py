"""Two routers on one worker: each is told what the other has there."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

import engine.service
from engine.base import NOTHING_PLACED, NOTHING_QUEUED, QUEUE_VALID_S, PlacedWork, Queued
from engine.service import WorkerService
from engine.simulated.engine import SimulatedEngine
from engine.spec import SimulatedTiming, WorkerSpec
from protos import worker_pb2
from protos.ids import Incarnation, WorkerId
from router.core.events import LearnedElsewhere, StepReported, TellLearned
from router.core.shared_margin import Learned, LearnedMargin
from router.worker_messages import command_of, learned_elsewhere, step_reported
from tests.engine.running_worker import TOKEN, Router, submit

WORKER = WorkerId("decode-0")
LONG = 5000
"""Output tokens of a request that does not end within a test."""
DECODES = PlacedWork(decodes=1, context_tokens=30, running=1, running_context_tokens=30, routers=1)
NOTHING_MORE = PlacedWork(routers=1)
"""Of a router that is known."""


@pytest.fixture
async def address(tmp_path: Path) -> AsyncIterator[str]:
    spec = WorkerSpec(
        WORKER, "decode", "simulated", "none", str(tmp_path), TOKEN,
        simulated=SimulatedTiming(step_base_s=0.005),
    )  # fmt: skip
    service = WorkerService(spec, SimulatedEngine(spec))
    port = await service.start()
    running = asyncio.create_task(service.run())
    yield f"127.0.0.1:{port}"
    running.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await running
    await service.stop()


@pytest.fixture
def silent_while_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers say nothing just because time passed."""
    monkeypatch.setattr(engine.service, "LOAD_INTERVAL_S", 1000.0)


async def attached(address: str, router_id: str, incarnation: int = 1) -> Router:
    router = Router(address, router_id, incarnation)
    await router.attach()
    return router


async def reports(router: Router) -> AsyncIterator[StepReported]:
    """What it is told, for some seconds."""
    async with asyncio.timeout(5):
        async for message in router.messages():
            if message.HasField("step"):
                yield step_reported(WORKER, Incarnation(1), message.step)
    raise AssertionError("the link ended")


async def hears(router: Router, is_it: Callable[[PlacedWork], bool]) -> PlacedWork:
    """What it is told of others' work, once that is as wanted."""
    async with contextlib.aclosing(reports(router)) as heard:
        return await anext(each.others async for each in heard if is_it(each.others))


async def hears_queued(router: Router, is_it: Callable[[Queued], bool]) -> Queued:
    """The same of what waits at others."""
    async with contextlib.aclosing(reports(router)) as heard:
        return await anext(each.queued_beside async for each in heard if is_it(each.queued_beside))


def standing(others: PlacedWork) -> PlacedWork:
    """Without what was computed."""
    return others._replace(computed_tokens=0, computed_pairs=0)


async def test_what_one_submits_and_aborts_the_other_is_told(address: str) -> None:
    one, other = await attached(address, "one"), await attached(address, "other")
    assert await hears(other, lambda others: True) == NOTHING_PLACED
    asked = submit(max_tokens=LONG)
    asked.to_compute_tokens = 20
    await one.send(submit=asked)
    told = await hears(other, lambda others: others.running == 1)
    assert standing(told) == DECODES
    assert told.computed_tokens == 20
    # The other is told of nobody as long as it alone has work; now both have.
    await other.send(submit=submit(key="0:b", max_tokens=LONG))
    assert standing(await hears(one, lambda others: others.running == 1)) == DECODES
    await one.send(abort=worker_pb2.Abort(request_key="0:a", attempt=1))
    told = await hears(other, lambda others: not others.decodes)
    assert standing(told) == NOTHING_MORE
    for router in (one, other):
        await router.close()


async def test_a_prompt_is_told_while_it_waits_and_when_nothing_steps(
    silent_while_idle: None, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SimulatedEngine, "add", lambda self, request: None)
    one, other = await attached(address, "one"), await attached(address, "other")
    await one.send(submit=submit())
    waits = PlacedWork(1, 30, 450, decodes=1, context_tokens=30, coming_tokens=30, routers=1)
    assert await hears(other, lambda others: others.prompts == 1) == waits
    await one.send(forget=worker_pb2.Forget(request_key="0:a", attempt=1))
    assert await hears(other, lambda others: not others.prompts) == NOTHING_MORE
    for router in (one, other):
        await router.close()


async def test_what_will_decode_there_is_told_until_it_is_taken_back(address: str) -> None:
    one, other = await attached(address, "one"), await attached(address, "other")
    await one.send(reserve=worker_pb2.Reserve(request_key="0:a", context_tokens=700))
    told = await hears(other, lambda others: others.decodes == 1)
    assert told == PlacedWork(decodes=1, context_tokens=700, coming_tokens=700, routers=1)
    await one.send(reserve=worker_pb2.Reserve(request_key="0:a"))
    assert await hears(other, lambda others: not others.decodes) == NOTHING_MORE
    for router in (one, other):
        await router.close()


async def test_what_waits_at_a_router_is_told_to_others_as_long_as_it_says_so(address: str) -> None:
    one, other = await attached(address, "one"), await attached(address, "other")
    said = worker_pb2.Queued(requests=3, work_s=1.5, first_due_in_s=2.0)
    await one.send(queued=said)
    told = await hears_queued(other, lambda queued: queued.requests > 0)
    assert told[:2] == (3, 1.5)
    assert 1.0 < told.first_due_in_s < 2.0
    # It is not repeated.
    assert await hears_queued(other, lambda queued: not queued.requests) == NOTHING_QUEUED
    await one.send(queued=said)
    await hears_queued(other, lambda queued: queued.requests > 0)
    await one.send(queued=worker_pb2.Queued())
    async with asyncio.timeout(QUEUE_VALID_S / 2):
        await hears_queued(other, lambda queued: not queued.requests)
    assert await hears_queued(one, lambda queued: True) == NOTHING_QUEUED
    for router in (one, other):
        await router.close()


async def hears_learned(router: Router) -> LearnedElsewhere:
    """The next word of another router."""
    async with asyncio.timeout(5):
        async for message in router.messages():
            if message.HasField("learned"):
                return learned_elsewhere(message.learned)
    raise AssertionError("the link ended")


async def test_what_a_router_learned_is_passed_on_to_all_others(address: str) -> None:
    one, other, third = [await attached(address, name) for name in ("one", "other", "third")]
    said = Learned(
        LearnedMargin(40.0, -0.5, 0.04, 50.0, 0.3), LearnedMargin(7.0, 0.1, 0.01, 9.0, 0.0)
    )
    command = command_of(TellLearned(WORKER, said)).learned
    command.router_id = "another"
    await one.send(learned=command)
    for router in (other, third):
        assert await hears_learned(router) == LearnedElsewhere("one", said)
    # It hears all of the others, and nothing of itself.
    await other.send(learned=worker_pb2.Learned())
    assert (await hears_learned(one)).router_id == "other"
    # One that begins hears all of before, its predecessor's word among them.
    await one.close()
    await asyncio.sleep(0.2)
    successor = await attached(address, "one", incarnation=2)
    words = {(word := await hears_learned(successor)).router_id: word for _ in range(2)}
    assert words["one"].learned == said
    assert 0.1 < words["one"].age_s < 5.0
    for router in (other, third, successor):
        await router.close()


async def test_a_routers_work_outlives_it_until_its_successor_forgets_it(address: str) -> None:
    one, other = await attached(address, "one"), await attached(address, "other")
    await one.send(submit=submit(max_tokens=LONG))
    await one.send(reserve=worker_pb2.Reserve(request_key="0:b", context_tokens=700))
    await hears(other, lambda others: others.decodes == 2 and others.running == 1)
    await one.close()
    successor = await attached(address, "one", incarnation=2)
    # What waits for a hand-off its successor does not know; what runs it finds.
    assert standing(await hears(other, lambda others: others.decodes == 1)) == DECODES
    await successor.send(forget=worker_pb2.Forget(request_key="0:a", attempt=1))
    assert standing(await hears(other, lambda others: not others.decodes)) == NOTHING_MORE
    for router in (successor, other):
        await router.close()


async def test_what_a_router_left_behind_is_gone_with_its_grace(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine.service, "ROUTER_GRACE_S", 0.3)
    one, other = await attached(address, "one"), await attached(address, "other")
    await one.send(submit=submit(max_tokens=LONG))
    await hears(other, lambda others: others.running == 1)
    await one.close()
    # Not even what it computed is known any more.
    assert await hears(other, lambda others: not others.decodes) == NOTHING_PLACED
    await other.close()
