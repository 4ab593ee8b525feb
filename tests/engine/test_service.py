"""The worker over real gRPC, with a simulated engine behind it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import grpc
import pytest

from engine.router_link import RouterLink
from engine.service import LAST_WORDS_STATUS
from engine.spec import SimulatedTiming
from kvstore.engine_blocks import EngineBlocks
from kvstore.index_report import CacheReports
from protos import enginecore, worker_pb2
from router.worker_messages import outputs_of
from tests.engine.running_worker import Router, make_service, running, submit


@pytest.fixture
async def address() -> AsyncIterator[str]:
    async with running(SimulatedTiming(step_base_s=0.005)) as (_, address):
        yield address


async def test_last_words_reach_its_routers() -> None:
    service = make_service(SimulatedTiming())
    router = Router(f"127.0.0.1:{await service.start()}", "r", 1)
    await router.attach()
    stopping = asyncio.create_task(service.stop_serving("the engine hung"))
    with pytest.raises(grpc.aio.AioRpcError) as ended:
        async for _ in router.messages():
            pass
    assert ended.value.code() is LAST_WORDS_STATUS
    assert ended.value.details() == "the engine hung"
    await stopping
    await router.close()


async def test_a_request_from_submit_to_end_with_load_in_every_step(address: str) -> None:
    router = Router(address, "r", 1)
    welcome = await router.attach()
    assert (welcome.worker_id, welcome.role) == ("decode-0", "decode")
    assert enginecore.decode_ready(welcome.ready_payload).max_model_len
    await router.send(submit=submit())
    tokens = 0
    async for message in router.messages():
        if message.HasField("step"):
            assert message.step.load.kv_blocks_total > 0
            tokens += sum(len(output.token_ids) for output in outputs_of(message.step))
        if any(output.finish == worker_pb2.LENGTH for output in outputs_of(message.step)):
            break
    assert tokens == 8
    await router.close()


async def test_strangers_get_no_stream(address: str) -> None:
    router = Router(address, "r", 1, token="a guess")
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await router.attach()
    assert refused.value.code() == grpc.StatusCode.UNAUTHENTICATED
    await router.close()


async def test_an_earlier_incarnation_is_refused_once_a_later_one_has_attached(
    address: str,
) -> None:
    later = Router(address, "r", 2)
    await later.attach()
    earlier = Router(address, "r", 1)
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await earlier.attach()
    assert refused.value.code() == grpc.StatusCode.FAILED_PRECONDITION
    for router in (earlier, later):
        await router.close()


async def test_a_later_incarnation_takes_over_without_loss_or_doubling(address: str) -> None:
    first = Router(address, "r", 1)
    await first.attach()
    await first.send(submit=submit(max_tokens=60))
    got: list[int] = []
    async for output in first.outputs():
        got += output.token_ids
        if len(got) >= 5:
            break
    await first.close()
    second = Router(address, "r", 2)
    welcome = await second.attach()
    (held,) = welcome.held
    assert (held.request_key, held.attempt, held.ended) == ("0:a", 1, False)
    await second.send(
        resend=worker_pb2.Resend(request_key="0:a", attempt=1, from_position=len(got))
    )
    async for output in second.outputs():
        assert output.first_position == len(got)
        got += output.token_ids
        if output.finish:
            break
    reference = Router(address, "other", 1)
    await reference.attach()
    await reference.send(submit=submit(max_tokens=60))
    assert got == await reference.tokens_to_end()
    for router in (second, reference):
        await router.close()


async def test_a_request_that_can_not_be_read_is_answered_with_the_reason(address: str) -> None:
    router = Router(address, "r", 1)
    await router.attach()
    broken = submit()
    broken.engine_tag = "vllm-9"
    await router.send(submit=broken)
    output = await anext(router.outputs())
    assert output.finish == worker_pb2.REFUSED
    assert "vllm-9" in output.error
    await router.close()


async def test_forgetting_a_running_request_frees_its_blocks(address: str) -> None:
    router = Router(address, "r", 1)
    await router.attach()
    await router.send(submit=submit(max_tokens=5000))
    seen_used = 0
    async for message in router.messages():
        load = message.step.load
        if load.kv_blocks_used and not seen_used:
            seen_used = load.kv_blocks_used
            await router.send(forget=worker_pb2.Forget(request_key="0:a", attempt=1))
        if seen_used and message.HasField("step") and not load.kv_blocks_used:
            assert not load.running
            break
    assert seen_used
    await router.close()


async def test_figures_come_under_vllms_names(address: str) -> None:
    router = Router(address, "r", 1)
    await router.attach()
    await router.send(submit=submit())
    async for message in router.messages():
        values = message.metrics.values
        if values.get("vllm:generation_tokens_total") == 8:
            assert values["vllm:prompt_tokens_total"] == 30
            assert values["vllm:num_requests_running"] == 0
            break
    await router.close()


async def test_what_comes_late_on_a_superseded_link_is_not_carried_out() -> None:
    service = make_service(SimulatedTiming())
    await service.start()

    async def late() -> AsyncIterator[worker_pb2.RouterMessage]:
        yield worker_pb2.RouterMessage(commands=[worker_pb2.Command(submit=submit())])

    try:
        link = RouterLink("r", 1, CacheReports(EngineBlocks("m", 128)))
        await service._read(link, late())
        assert service.status()["attempts"] == 0
    finally:
        await service.stop()
