"""The worker: an engine on one side, routers on the other, over gRPC.

One message per engine step and router carries all its new tokens and the worker's load. A router
that reads slowly gets the outputs of several steps in one message; none waits for another.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Coroutine
from typing import Any, Final

import grpc
import msgspec

from engine.attempts import Attempts
from engine.base import Engine, EngineInfo, EngineLoad
from engine.spec import WorkerSpec
from protos import worker_pb2, worker_pb2_grpc
from protos.ids import Incarnation

logger = logging.getLogger(__name__)

MAX_MESSAGE_BYTES: Final = 256 * 1024 * 1024
ROUTER_GRACE_S: Final = 10.0
"""A router that stays away for longer loses its requests."""
METRICS_INTERVAL_S: Final = 1.0
LOAD_INTERVAL_S: Final = 0.25
"""How often a router learns the load of a worker that has nothing for it."""

GRPC_OPTIONS: Final = [
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    # A port that is taken is an error, never shared in silence.
    ("grpc.so_reuseport", 0),
]


class RouterLink:
    """An attached router: what waits to be sent to it."""

    def __init__(self, router_id: str, incarnation: int) -> None:
        self.router_id = router_id
        self.incarnation = incarnation
        self._outputs: list[worker_pb2.Output] = []
        self._load: worker_pb2.Load | None = None
        self._metrics: worker_pb2.Metrics | None = None
        self._wake = asyncio.Event()
        self._closed = False

    def put(
        self,
        outputs: list[worker_pb2.Output],
        load: worker_pb2.Load,
        metrics: worker_pb2.Metrics | None = None,
    ) -> None:
        """Queue; what is queued together goes out together."""
        self._outputs += outputs
        self._load = load
        self._metrics = metrics or self._metrics
        self._wake.set()

    def close(self) -> None:
        """End the stream to this router."""
        self._closed = True
        self._wake.set()

    async def messages(self) -> AsyncIterator[worker_pb2.WorkerMessage]:
        """What to send, until closed."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            if self._closed:
                return
            if self._load is not None:
                step = worker_pb2.Step(outputs=self._outputs, load=self._load)
                self._outputs, self._load = [], None
                yield worker_pb2.WorkerMessage(step=step)
            if self._metrics is not None:
                metrics, self._metrics = self._metrics, None
                yield worker_pb2.WorkerMessage(metrics=metrics)


class WorkerService(worker_pb2_grpc.WorkerServicer):
    """Serves one engine to any number of routers."""

    def __init__(self, spec: WorkerSpec, engine: Engine) -> None:
        self._spec = spec
        self._engine = engine
        self.incarnation = Incarnation(time.time_ns())
        self._links: dict[str, RouterLink] = {}
        self._known_incarnations: dict[str, int] = {}
        self._absent: dict[str, asyncio.TimerHandle] = {}
        self._counters: dict[str, float] = defaultdict(float)
        self._server: grpc.aio.Server | None = None
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> int:
        """Start the engine, then listen. Returns the port. Raises EngineError."""
        self._info: EngineInfo = await self._engine.start()
        self._load = EngineLoad(kv_blocks_total=self._info.kv_blocks_total)
        self._attempts = Attempts(self._info.max_model_len_tokens, self._info.vocabulary_tokens)
        self._server = grpc.aio.server(options=GRPC_OPTIONS)
        worker_pb2_grpc.add_WorkerServicer_to_server(self, self._server)
        port: int = self._server.add_insecure_port(f"{self._spec.listen_host}:0")
        await self._server.start()
        self._tasks.append(self._spawn(self._tell_idle_routers()))
        return port

    async def run(self) -> None:
        """Relay the engine's steps until it dies, which raises EngineError."""
        while True:
            step = await self._engine.step()
            for name, increment in step.counters.items():
                self._counters[name] += increment
            self._load = step.load
            by_router: dict[str, list[worker_pb2.Output]] = defaultdict(list)
            for output in step.outputs:
                recorded = self._attempts.record(output)
                if recorded is not None and recorded[0].live:
                    by_router[recorded[0].router_id].append(recorded[1])
            load = self._load_message()
            for router_id, outputs in by_router.items():
                if (link := self._links.get(router_id)) is not None:
                    link.put(outputs, load)

    async def stop(self) -> None:
        """End the links, the server and the engine."""
        for task in self._tasks:
            task.cancel()
        for link in self._links.values():
            link.close()
        if self._server is not None:
            await self._server.stop(grace=0.5)
        await self._engine.stop()

    def status(self) -> dict[str, float]:
        """Load and counters, for whoever asks the actor."""
        return {**self._figures(), "attempts": len(self._attempts), "routers": len(self._links)}

    async def Attach(
        self,
        request_iterator: AsyncIterator[worker_pb2.RouterMessage],
        context: grpc.aio.ServicerContext,
    ) -> AsyncIterator[worker_pb2.WorkerMessage]:
        """A router's stream, for as long as both live."""
        await self._check_token(context)
        link = await self._greet(request_iterator, context)
        reader = self._spawn(self._read(link, request_iterator))
        try:
            yield worker_pb2.WorkerMessage(welcome=self._welcome(link.router_id))
            async for message in link.messages():
                yield message
        finally:
            reader.cancel()
            self._detach(link)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run beside the streams; a defect is logged when it happens, not when it is collected."""
        task = asyncio.create_task(work)
        task.add_done_callback(_log_defect)
        return task

    async def _check_token(self, context: grpc.aio.ServicerContext) -> None:
        metadata = dict(context.invocation_metadata() or ())
        shown = str(metadata.get("authorization", ""))
        if not hmac.compare_digest(shown.encode(), f"Bearer {self._spec.link_token}".encode()):
            await context.abort(
                grpc.StatusCode.UNAUTHENTICATED,
                "a worker takes routers of its own cluster only: send the cluster's token",
            )

    async def _greet(
        self,
        messages: AsyncIterator[worker_pb2.RouterMessage],
        context: grpc.aio.ServicerContext,
    ) -> RouterLink:
        first = await anext(aiter(messages), None)
        if first is None or not first.HasField("hello"):
            await context.abort(
                grpc.StatusCode.INVALID_ARGUMENT, "a router's first message is Hello"
            )
        assert first is not None
        hello = first.hello
        if hello.router_incarnation < self._known_incarnations.get(hello.router_id, 0):
            await context.abort(
                grpc.StatusCode.FAILED_PRECONDITION,
                f"a later incarnation of router {hello.router_id} has attached",
            )
        self._known_incarnations[hello.router_id] = hello.router_incarnation
        link = RouterLink(hello.router_id, hello.router_incarnation)
        earlier = self._links.get(hello.router_id)
        self._links[hello.router_id] = link
        if earlier is not None:
            earlier.close()
        if (timer := self._absent.pop(hello.router_id, None)) is not None:
            timer.cancel()
        return link

    def _welcome(self, router_id: str) -> worker_pb2.Welcome:
        return worker_pb2.Welcome(
            worker_id=self._spec.worker_id,
            worker_incarnation=self.incarnation,
            role=self._spec.role,
            engine_tag=self._info.engine_tag,
            block_size_tokens=self._info.block_size_tokens,
            kv_blocks_total=self._info.kv_blocks_total,
            max_model_len_tokens=self._info.max_model_len_tokens,
            ready_payload=self._info.ready_payload,
            held=self._attempts.hold_back(router_id),
        )

    async def _read(
        self, link: RouterLink, messages: AsyncIterator[worker_pb2.RouterMessage]
    ) -> None:
        # A broken link ends the iteration with an RpcError; `Attach` learns of it by itself.
        try:
            with contextlib.suppress(grpc.RpcError):
                async for message in messages:
                    for command in message.commands:
                        self._handle(link, command)
        finally:
            # Also after a defect: a link that hears nothing must not look alive.
            link.close()

    def _handle(self, link: RouterLink, command: worker_pb2.Command) -> None:
        if command.HasField("submit"):
            self._submit(link, command.submit)
        elif command.HasField("abort"):
            abort = command.abort
            engine_id = self._attempts.abort(link.router_id, abort.request_key, abort.attempt)
            if engine_id is not None:
                self._engine.abort([engine_id])
        elif command.HasField("resend"):
            resend = command.resend
            attempt = self._attempts.find(link.router_id, resend.request_key, resend.attempt)
            if attempt is not None:
                again = list(self._attempts.resend(attempt, resend.from_position))
                link.put(again, self._load_message())
        elif command.HasField("forget"):
            forget = command.forget
            unfinished = self._attempts.forget(link.router_id, forget.request_key, forget.attempt)
            if unfinished is not None:
                self._engine.abort([unfinished])

    def _submit(self, link: RouterLink, submit: worker_pb2.Submit) -> None:
        try:
            if submit.engine_tag != self._info.engine_tag:
                raise ValueError(
                    f"this worker's engine speaks {self._info.engine_tag}, not {submit.engine_tag}"
                )
            request, fenced = self._attempts.submit(link.router_id, submit)
        except (msgspec.DecodeError, ValueError) as error:
            failed = self._attempts.fail(link.router_id, submit, str(error))
            link.put([failed], self._load_message())
            return
        if fenced:
            self._engine.abort(fenced)
        if request is not None:
            self._engine.add(request)

    def _detach(self, link: RouterLink) -> None:
        if self._links.get(link.router_id) is not link:
            return  # its successor has attached
        del self._links[link.router_id]
        self._absent[link.router_id] = asyncio.get_running_loop().call_later(
            ROUTER_GRACE_S, self._give_up, link.router_id
        )

    def _give_up(self, router_id: str) -> None:
        self._absent.pop(router_id, None)
        kept = self._attempts.of_router(router_id)
        # Blocks of one that was handed off are left to their lease: another worker may be reading
        # them just now, and only the lease tells it when they are gone.
        self._engine.abort([attempt.engine_id for attempt in kept if not attempt.ended])
        for attempt in kept:
            self._attempts.forget(router_id, attempt.request_key, attempt.number)
        if kept:
            logger.warning("router %s stayed away; dropped its %d requests", router_id, len(kept))

    async def _tell_idle_routers(self) -> None:
        metrics_due_s = 0.0
        while True:
            await asyncio.sleep(LOAD_INTERVAL_S)
            metrics = None
            if time.monotonic() >= metrics_due_s:
                metrics_due_s = time.monotonic() + METRICS_INTERVAL_S
                metrics = worker_pb2.Metrics(values=self._figures())
            for link in self._links.values():
                link.put([], self._load_message(), metrics)

    def _load_message(self) -> worker_pb2.Load:
        load = self._load
        return worker_pb2.Load(
            running=load.running,
            waiting=load.waiting,
            kv_blocks_used=load.kv_blocks_used,
            kv_blocks_total=load.kv_blocks_total,
            step_time_s=load.step_time_s,
        )

    def _figures(self) -> dict[str, float]:
        load = self._load
        return {
            **self._counters,
            "vllm:num_requests_running": float(load.running),
            "vllm:num_requests_waiting": float(load.waiting),
            "vllm:kv_cache_usage_perc": load.kv_blocks_used / max(1, load.kv_blocks_total),
            "baton:kv_blocks_used": float(load.kv_blocks_used),
            "baton:kv_blocks_total": float(load.kv_blocks_total),
        }


def _log_defect(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        logger.error("a defect in the worker", exc_info=error)
