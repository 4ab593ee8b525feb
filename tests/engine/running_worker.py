"""A worker with a simulated engine over real gRPC, and a router at the other end."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc

from engine.service import GRPC_OPTIONS, WorkerService
from engine.simulated.engine import SimulatedEngine
from engine.spec import SimulatedTiming, WorkerSpec
from protos import enginecore, worker_pb2, worker_pb2_grpc
from protos.enginecore import EngineRequest
from protos.ids import WorkerId
from router.core.events import OutputReport
from router.worker_messages import outputs_of

TOKEN = "the cluster's token"


class Router:
    """The other end of the stream: writes what it is told, keeps what it reads."""

    def __init__(self, address: str, router_id: str, incarnation: int, token: str = TOKEN) -> None:
        self._channel = grpc.aio.insecure_channel(address, options=GRPC_OPTIONS)
        stub = worker_pb2_grpc.WorkerStub(self._channel)
        self._stream = stub.Attach(metadata=(("authorization", f"Bearer {token}"),))
        self._hello = worker_pb2.Hello(router_id=router_id, router_incarnation=incarnation)

    async def attach(self) -> worker_pb2.Welcome:
        await self.send(hello=self._hello)
        message = await self._stream.read()
        if message is grpc.aio.EOF:
            await self._stream.code()
            raise EOFError
        return message.welcome

    async def send(self, **kind: Any) -> None:
        if "hello" in kind:
            message = worker_pb2.RouterMessage(**kind)
        else:
            message = worker_pb2.RouterMessage(commands=[worker_pb2.Command(**kind)])
        await self._stream.write(message)

    async def messages(self) -> AsyncIterator[worker_pb2.WorkerMessage]:
        while (message := await self._stream.read()) is not grpc.aio.EOF:
            yield message

    async def outputs(self) -> AsyncIterator[OutputReport]:
        async for message in self.messages():
            for output in outputs_of(message.step):
                yield output

    async def tokens_to_end(self) -> list[int]:
        tokens: list[int] = []
        async for output in self.outputs():
            assert output.first_position == len(tokens)
            tokens += output.token_ids
            if output.finish:
                return tokens
        raise AssertionError("the stream ended before the request did")

    async def close(self) -> None:
        self._stream.cancel()
        await self._channel.close()


def submit(key: str = "0:a", attempt: int = 1, max_tokens: int = 8) -> worker_pb2.Submit:
    params = {"max_tokens": max_tokens, "temperature": 0.0}
    request = EngineRequest("a", list(range(30, 60)), None, params, None, 1.0, None, None, None)
    return worker_pb2.Submit(
        request_key=key,
        attempt=attempt,
        engine_tag=enginecore.ENGINE_TAG,
        engine_request=enginecore.encode(request),
    )


def make_service(timing: SimulatedTiming) -> WorkerService:
    """One that has not started."""
    spec = WorkerSpec(
        WorkerId("decode-0"), "decode", "simulated", "none", "/nonexistent", TOKEN, simulated=timing
    )
    return WorkerService(spec, SimulatedEngine(spec))


@asynccontextmanager
async def running(timing: SimulatedTiming) -> AsyncIterator[tuple[WorkerService, str]]:
    """With its address."""
    service = make_service(timing)
    port = await service.start()
    work = asyncio.create_task(service.run())
    yield service, f"127.0.0.1:{port}"
    work.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await work
    await service.stop()
