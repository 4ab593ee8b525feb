"""What goes out to a router that reads slowly, or not at all."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import Raw

import engine.service
from engine.attempts import Attempt
from engine.cache_outlet import PART_ADDRESSES
from engine.outputs import Output
from engine.router_link import FULL_MESSAGE_BYTES, RouterLink
from engine.service import LOAD_INTERVAL_S, WorkerService
from engine.spec import SimulatedTiming
from engine.work_by_router import WorkByRouter
from kvstore.engine_blocks import EngineBlocks
from kvstore.index import KvIndex
from kvstore.index_feed import CacheChange, IndexFeed
from kvstore.index_report import CacheReports
from protos import worker_pb2
from protos.block_events import BlocksRemoved, BlocksStored
from protos.enginecore import EngineOutput
from protos.ids import Incarnation, WorkerId
from router.worker_messages import SnapshotParts, cache_changed, outputs_of
from tests.engine.running_worker import Router, running, submit

LOAD = worker_pb2.Load(running=1)
STALLED_TOKENS = 4000
PAYLOAD_BYTES = 4096


def make_link(incarnation: int = 1, cache: CacheReports | None = None) -> RouterLink:
    return RouterLink("r", incarnation, cache or CacheReports(EngineBlocks("m", 128)))


def attempt(key: str) -> Attempt:
    share = WorkByRouter().add("r", 1, 1, decodes=True)
    return Attempt("r", key, 1, "a", hand_off=False, first_position=0, share=share)


def add_outputs(to: Attempt, count: int, payload_bytes: int = 10) -> None:
    for _ in range(count):
        # One with prompt logprobs stays alone, as the engine made it.
        made = EngineOutput(
            "a", [1], new_prompt_logprobs_tensors=Raw(msgspec.msgpack.encode(bytes(payload_bytes)))
        )
        to.outputs.append(Output(to.request_key, 1, to.next_position, made))
        to.next_position += 1


async def steps_of(link: RouterLink) -> list[worker_pb2.Step]:
    """All that it would send now."""
    steps = []
    messages = link.messages()
    with contextlib.suppress(TimeoutError):
        while True:
            message = await asyncio.wait_for(anext(messages), 0.05)
            if message.HasField("step"):
                steps.append(message.step)
    return steps


def positions(steps: list[worker_pb2.Step], key: str) -> list[int]:
    """Of all tokens of a request, as they come."""
    return [
        position
        for step in steps
        for output in outputs_of(step)
        if output.key == key
        for position in range(output.first_position, output.first_position + len(output.token_ids))
    ]


async def test_what_waits_goes_out_together_in_messages_of_limited_size() -> None:
    link, kept = make_link(), [attempt("a"), attempt("b")]
    for _ in range(500):
        for each in kept:
            add_outputs(each, 1, PAYLOAD_BYTES)
        link.put(LOAD, kept)
    steps = await steps_of(link)
    whole_bytes = 2 * 500 * PAYLOAD_BYTES
    assert len(steps) == -(-whole_bytes // FULL_MESSAGE_BYTES)
    for step in steps:
        assert step.ByteSize() < FULL_MESSAGE_BYTES + 2 * PAYLOAD_BYTES
        assert step.load == LOAD
    for key in "ab":
        assert positions(steps, key) == list(range(500))


async def test_one_with_much_to_say_does_not_hold_up_another() -> None:
    link, long, short = make_link(), attempt("long"), attempt("short")
    add_outputs(long, 2000, PAYLOAD_BYTES)
    add_outputs(short, 1)
    link.put(LOAD, [long])
    link.put(LOAD, [short])
    steps = await steps_of(link)
    assert positions(steps[:2], "short") == [0]
    assert positions(steps, "long") == list(range(2000))


async def test_nothing_goes_out_of_what_is_held_back_or_dropped() -> None:
    link, held, dropped = make_link(), attempt("held"), attempt("dropped")
    for each in (held, dropped):
        add_outputs(each, 3)
        link.put(LOAD, [each])
    held.sent_outputs = None
    link.drop(dropped.engine_id)
    steps = await steps_of(link)
    assert [len(step.request_keys) for step in steps] == [0]


async def test_a_closed_link_takes_nothing_from_its_successor() -> None:
    earlier, later, kept = make_link(), make_link(2), attempt("a")
    add_outputs(kept, 5)
    earlier.put(LOAD, [kept])
    earlier.close()
    assert await asyncio.wait_for(anext(earlier.messages(), None), 1) is None
    later.put(LOAD, [kept])
    assert positions(await steps_of(later), "a") == list(range(5))


async def test_a_refusal_comes_with_the_load() -> None:
    link = make_link()
    link.refuse(Output("a", 1, 0, None, worker_pb2.REFUSED, error="no"), LOAD)
    (step,) = await steps_of(link)
    assert [output.error for output in outputs_of(step)] == ["no"]


def add_token(to: Attempt) -> None:
    made = EngineOutput("a", [1])
    to.outputs.append(Output(to.request_key, 1, to.next_position, made))
    to.next_position += 1


async def test_tokens_of_many_streams_share_events_and_the_first_of_a_new_one_goes_at_once() -> (
    None
):
    link, begun = make_link(), [attempt(str(n)) for n in range(100)]
    messages = link.messages()
    for each in begun:
        add_token(each)
    link.put(LOAD, begun)
    assert len(outputs_of((await anext(messages)).step)) == len(begun)
    # 100 outputs make a pause of 20 ms. What comes within it waits for its end:
    for _ in range(3):
        for each in begun:
            add_token(each)
        link.put(LOAD, begun)
    new = attempt("new")
    add_token(new)
    link.put(LOAD, [new])
    at_once = outputs_of((await asyncio.wait_for(anext(messages), 1)).step)
    assert [output.key for output in at_once] == ["new"]
    together = outputs_of((await asyncio.wait_for(anext(messages), 1)).step)
    assert [output.token_ids for output in together] == [[1, 1, 1]] * len(begun)


async def test_no_token_of_a_few_streams_waits_for_the_next() -> None:
    link, kept = make_link(), attempt("a")
    messages = link.messages()
    for _ in range(5):
        add_token(kept)
        link.put(LOAD, [kept])
        (output,) = outputs_of((await asyncio.wait_for(anext(messages), 1)).step)
        assert list(output.token_ids) == [1]


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 2)), max_size=30))
def test_whatever_the_rhythm_everything_goes_out_once_in_order(
    turns: list[tuple[int, int]],
) -> None:
    async def play() -> None:
        link, kept = make_link(), [attempt(str(n)) for n in range(3)]
        messages, steps = link.messages(), []
        for count, index in turns:
            add_outputs(kept[index], count, PAYLOAD_BYTES * 40)
            link.put(LOAD, [kept[index]])
            if count % 2:
                steps.append((await anext(messages)).step)
        link.put(LOAD, kept)
        while any(each.has_unsent for each in kept):
            steps.append((await anext(messages)).step)
        for each in kept:
            assert positions(steps, each.request_key) == list(range(each.next_position))

    asyncio.run(play())


# Over gRPC


@pytest.fixture
async def service() -> AsyncIterator[tuple[WorkerService, str]]:
    timing = SimulatedTiming(
        step_base_s=0.0002, prefill_token_s=0.0, decode_request_s=0.0, transfer_block_s=0.0
    )
    async with running(timing) as worker_and_address:
        yield worker_and_address


async def test_a_router_that_stops_reading_holds_up_nobody_and_loses_nothing(
    service: tuple[WorkerService, str],
) -> None:
    worker, address = service
    stalled, other = Router(address, "stalled", 1), Router(address, "other", 1)
    await stalled.attach()
    await other.attach()
    keys = [f"0:{n}" for n in range(40)]
    for key in keys:
        await stalled.send(submit=submit(key, max_tokens=STALLED_TOKENS))
    for n in range(10):
        await other.send(submit=submit(f"0:{n}", max_tokens=5))
    ended = 0
    async with asyncio.timeout(20):
        async for output in other.outputs():
            ended += output.finish == worker_pb2.LENGTH
            if ended == 10:
                break
    # The rest of what the stalled one is given lies with its attempts, and is sent when it reads.
    while worker.status()["vllm:num_requests_running"]:  # noqa: ASYNC110
        await asyncio.sleep(LOAD_INTERVAL_S)
    got: dict[str, int] = dict.fromkeys(keys, 0)
    async with asyncio.timeout(30):
        async for message in stalled.messages():
            assert message.ByteSize() < 2 * FULL_MESSAGE_BYTES
            for output in outputs_of(message.step):
                assert output.first_position == got[output.key]
                got[output.key] += len(output.token_ids)
            if all(count == STALLED_TOKENS for count in got.values()):
                break
    for router in (stalled, other):
        await router.close()


async def test_a_router_that_stays_away_loses_its_requests(
    service: tuple[WorkerService, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine.service, "ROUTER_GRACE_S", 0.6)
    worker, address = service
    router = Router(address, "r", 1)
    await router.attach()
    await router.send(submit=submit(max_tokens=STALLED_TOKENS))
    await anext(router.outputs())
    await router.close()
    async with asyncio.timeout(5):
        while worker.status()["attempts"]:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
    again = Router(address, "r", 1)
    assert not (await again.attach()).held
    await again.close()


async def test_a_worker_that_was_stopped_itself_keeps_what_absent_routers_left(
    service: tuple[WorkerService, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It wakes with the router's time long over, by the clock; the router is about to attach."""
    worker, address = service
    router = Router(address, "r", 1)
    await router.attach()
    await router.send(submit=submit(max_tokens=STALLED_TOKENS))
    await anext(router.outputs())
    await router.close()
    while worker.status()["routers"]:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    slept_s = 1000.0
    real = engine.service.time.monotonic
    monkeypatch.setattr(engine.service.time, "monotonic", lambda: real() + slept_s)
    await asyncio.sleep(2 * LOAD_INTERVAL_S)
    again = Router(address, "r", 2)
    assert len((await again.attach()).held) == 1
    await again.close()


# What the prefix cache holds


def cached(number: int) -> BlocksStored:
    """A block that begins a prompt."""
    return BlocksStored([number.to_bytes(4, "big")], None, [number] * 128)


async def told_of_cache(link: RouterLink, feed: IndexFeed) -> list[int]:
    """Reads all that it would send now; bytes of each message that is about the cache."""
    parts, sizes = SnapshotParts(), []
    messages = link.messages()
    with contextlib.suppress(TimeoutError):
        while True:
            message = await asyncio.wait_for(anext(messages), 0.05)
            if message.HasField("cache_snapshot"):
                whole = parts.add(message.cache_snapshot)
                if whole is not None:
                    feed.begin(whole)
            elif message.step.HasField("cache_change"):
                event = cache_changed(WORKER, Incarnation(1), message.step.cache_change)
                assert isinstance(event.report, CacheChange)
                assert feed.change(event.report)
            else:
                continue
            sizes.append(message.ByteSize())
    return sizes


WORKER = WorkerId("d")


@pytest.fixture
def index() -> KvIndex:
    return KvIndex(1_000_000)


async def test_a_large_snapshot_goes_out_in_parts_and_changes_follow_it(index: KvIndex) -> None:
    blocks = EngineBlocks("m", 128)
    cache, feed = CacheReports(blocks), IndexFeed(index, WORKER)
    link = make_link(cache=cache)
    cache.take([cached(number) for number in range(2 * PART_ADDRESSES + 1)])
    link.put(LOAD)
    assert await told_of_cache(link, feed) == []  # Nobody asked.
    link.ask_cache()
    messages = link.messages()
    first = (await anext(messages)).cache_snapshot
    assert first.more
    assert len(first.held) == 32 * PART_ADDRESSES
    # It changes between the parts, and the router asks again.
    cache.take([cached(1_000_000), BlocksRemoved([(5).to_bytes(4, "big")])])
    link.ask_cache()
    link.put(LOAD)
    sizes = await told_of_cache(link, feed)
    assert max(sizes) < FULL_MESSAGE_BYTES
    assert index.blocks_of(WORKER) == len(blocks.held) == 2 * PART_ADDRESSES + 1
    cache.take([cached(5)])
    link.put(LOAD)
    assert len(await told_of_cache(link, feed)) == 1
    assert index.blocks_of(WORKER) == len(blocks.held)


async def test_a_router_that_reads_nothing_gets_one_change_or_a_snapshot(index: KvIndex) -> None:
    blocks = EngineBlocks("m", 128)
    cache, feed = CacheReports(blocks, kept_addresses=100), IndexFeed(index, WORKER)
    link = make_link(cache=cache)
    link.ask_cache()
    await told_of_cache(link, feed)
    for number in range(100):
        cache.take([cached(number)])
        link.put(LOAD)
    assert len(await told_of_cache(link, feed)) == 1
    assert index.blocks_of(WORKER) == 100
    for number in range(100, 300):
        cache.take([cached(number), BlocksRemoved([(number - 100).to_bytes(4, "big")])])
        link.put(LOAD)
    (size,) = await told_of_cache(link, feed)
    assert 32 * 100 < size < 32 * 101
    assert all(index.match([address]) for address in blocks.held)
    assert index.entries - index.blocks_of(WORKER) <= 200  # Of before, and still to be cleared.
