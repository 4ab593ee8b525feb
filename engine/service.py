"""The worker: an engine on one side, routers on the other, over gRPC.

At most one message per engine step and router carries all its new tokens, the worker's load, what
other routers have there and what changed in its prefix cache. Between steps routers are told what
others have given to the worker or taken back. A router that reads slowly gets the outputs of
several steps in one message; none waits for another, and none makes the worker keep more for it
than its requests' outputs.
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

from engine.attempts import Attempt, Attempts
from engine.base import OTHERS_INTERVAL_S, Engine, EngineInfo, EngineLoad, Queued
from engine.paced import Paced
from engine.router_link import RouterLink
from engine.spec import WorkerSpec
from engine.watch import AwakeClock
from kvstore.engine_blocks import EngineBlocks
from kvstore.index_report import CacheReports
from protos import worker_pb2, worker_pb2_grpc
from protos.ids import Incarnation

logger = logging.getLogger(__name__)

MAX_MESSAGE_BYTES: Final = 256 * 1024 * 1024
ROUTER_GRACE_S: Final = 10.0
"""A router that stays away for longer loses its requests."""
METRICS_INTERVAL_S: Final = 1.0
LOAD_INTERVAL_S: Final = 0.25
"""How often a router learns the load of a worker that has nothing for it."""
LAST_WORDS_STATUS: Final = grpc.StatusCode.ABORTED
"""With it a worker whose engine is gone ends its links; the details tell why."""

GRPC_OPTIONS: Final = [
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    # A port that is taken is an error, never shared in silence.
    ("grpc.so_reuseport", 0),
    # A router whose machine is gone, or that is stopped, counts as away after this time; a cut that
    # a link may survive must be shorter.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 10_000),
]


class WorkerService(worker_pb2_grpc.WorkerServicer):
    """Serves one engine to any number of routers."""

    def __init__(self, spec: WorkerSpec, engine: Engine) -> None:
        self._spec = spec
        self._engine = engine
        self.incarnation = Incarnation(time.time_ns())
        self._links: dict[str, RouterLink] = {}
        self._known_incarnations: dict[str, int] = {}
        self._learned: dict[str, tuple[float, worker_pb2.Learned]] = {}
        """What each router said last, and when."""
        self._awake = AwakeClock(time.monotonic())
        self._absent_since_s: dict[str, float] = {}
        """Of routers whose requests are kept, by `_awake`."""
        self._counters: dict[str, float] = defaultdict(float)
        self._last_words = ""
        self._tell_others = Paced(self._tell_others_work, OTHERS_INTERVAL_S)
        self._server: grpc.aio.Server | None = None
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> int:
        """Start the engine, then listen. Returns the port. Raises EngineError."""
        self._info: EngineInfo = await self._engine.start()
        self._load = EngineLoad(kv_blocks_total=self._info.kv_blocks_total)
        self._attempts = Attempts(self._info.max_model_len_tokens, self._info.vocabulary_tokens)
        self._cache = CacheReports(EngineBlocks(self._info.weights, self._info.block_size_tokens))
        self._server = grpc.aio.server(options=GRPC_OPTIONS)
        worker_pb2_grpc.add_WorkerServicer_to_server(self, self._server)
        port: int = self._server.add_insecure_port(f"{self._spec.listen_host}:0")
        await self._server.start()
        self._tasks.append(self._spawn(self._tell_idle_routers()))
        return port

    @property
    def weights(self) -> str:
        """Digest of what the engine computes with, once it was started."""
        return self._info.weights

    async def run(self) -> None:
        """Relay the engine's steps until it dies, which raises EngineError."""
        while True:
            step = await self._engine.step()
            for name, increment in step.counters.items():
                self._counters[name] += increment
            self._load = step.load
            by_router: dict[str, list[Attempt]] = defaultdict(list)
            for output in step.outputs:
                attempt = self._attempts.record(output)
                if attempt is not None and attempt.has_unsent:
                    by_router[attempt.router_id].append(attempt)
            cache_changed = self._cache.take(step.block_events)
            for router_id, link in self._links.items():
                attempts = by_router.get(router_id, [])
                if attempts or cache_changed:
                    link.put(self._load_message(router_id), attempts)
            self._work_may_have_changed()

    async def stop_serving(self, why: str = "") -> None:
        """End the links and refuse new ones. The routers are told why, if it is no orderly end."""
        self._last_words = why
        self._tell_others.stop()
        for task in self._tasks:
            task.cancel()
        for link in self._links.values():
            link.close()
        if self._server is not None:
            await self._server.stop(grace=0.5)

    async def stop(self) -> None:
        """End the links, the server and the engine."""
        await self.stop_serving()
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
            if self._last_words:
                await context.abort(LAST_WORDS_STATUS, self._last_words)
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
        link = RouterLink(hello.router_id, hello.router_incarnation, self._cache)
        link.ask_cache()
        now_s = time.monotonic()
        # Also what its predecessor learned: it begins with that.
        for said_s, learned in self._learned.values():
            aged = worker_pb2.Learned()
            aged.CopyFrom(learned)
            aged.age_s = now_s - said_s
            link.pass_on(aged)
        earlier = self._links.get(hello.router_id)
        self._links[hello.router_id] = link
        if earlier is not None:
            earlier.close()
        self._absent_since_s.pop(hello.router_id, None)
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
            index_block_tokens=self._cache.block_tokens,
        )

    async def _read(
        self, link: RouterLink, messages: AsyncIterator[worker_pb2.RouterMessage]
    ) -> None:
        # A broken link ends the iteration with an RpcError; `Attach` learns of it by itself.
        try:
            with contextlib.suppress(grpc.RpcError):
                async for message in messages:
                    if self._links.get(link.router_id) is not link:
                        return  # Its successor has attached; what comes late is fenced.
                    for command in message.commands:
                        self._handle(link, command)
                    self._work_may_have_changed()
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
                self._attempts.resend(attempt, resend.from_position)
                link.put(self._load_message(link.router_id), [attempt])
        elif command.HasField("forget"):
            self._forget(link, command.forget)
        elif command.HasField("ask_cache"):
            link.ask_cache()
        elif command.HasField("reserve"):
            self._reserve(link, command.reserve)
        elif command.HasField("queued"):
            said = command.queued
            queued = Queued(said.requests, said.work_s, said.first_due_in_s)
            self._attempts.work.queue(time.monotonic(), link.router_id, queued)
        elif command.HasField("learned"):
            command.learned.router_id = link.router_id
            self._learned[link.router_id] = time.monotonic(), command.learned
            for other in self._links.values():
                if other is not link:
                    other.pass_on(command.learned)

    def _reserve(self, link: RouterLink, reserve: worker_pb2.Reserve) -> None:
        work = self._attempts.work
        if reserve.context_tokens:
            work.reserve(link.router_id, reserve.request_key, reserve.context_tokens)
        else:
            work.release(link.router_id, reserve.request_key)

    def _forget(self, link: RouterLink, forget: worker_pb2.Forget) -> None:
        attempt = self._attempts.find(link.router_id, forget.request_key, forget.attempt)
        if attempt is not None:
            link.drop(attempt.engine_id)
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
            link.refuse(failed, self._load_message(link.router_id))
            return
        if fenced:
            self._engine.abort(fenced)
        if request is not None:
            self._engine.add(request)

    def _detach(self, link: RouterLink) -> None:
        if self._links.get(link.router_id) is not link:
            return  # its successor has attached
        del self._links[link.router_id]
        self._absent_since_s[link.router_id] = self._awake.look(time.monotonic())

    def _give_up_absent_routers(self) -> None:
        now_s = self._awake.look(time.monotonic())
        for router_id, since_s in list(self._absent_since_s.items()):
            if now_s - since_s >= ROUTER_GRACE_S:
                del self._absent_since_s[router_id]
                self._give_up(router_id)

    def _give_up(self, router_id: str) -> None:
        kept = self._attempts.of_router(router_id)
        # Blocks of one that was handed off are left to their lease: another worker may be reading
        # them just now, and only the lease tells it when they are gone.
        self._engine.abort([attempt.engine_id for attempt in kept if not attempt.ended])
        for attempt in kept:
            self._attempts.forget(router_id, attempt.request_key, attempt.number)
        self._attempts.work.forget(router_id)
        self._learned.pop(router_id, None)
        if kept:
            logger.warning("router %s stayed away; dropped its %d requests", router_id, len(kept))

    async def _tell_idle_routers(self) -> None:
        metrics_due_s = 0.0
        while True:
            await asyncio.sleep(LOAD_INTERVAL_S)
            self._give_up_absent_routers()
            metrics = None
            if time.monotonic() >= metrics_due_s:
                metrics_due_s = time.monotonic() + METRICS_INTERVAL_S
                metrics = worker_pb2.Metrics(values=self._figures())
            for router_id, link in self._links.items():
                link.put(self._load_message(router_id), metrics=metrics)

    def _work_may_have_changed(self) -> None:
        if self._attempts.work.changed_beside(self._links):
            self._tell_others.want()

    def _tell_others_work(self) -> None:
        for router_id in self._attempts.work.changed_beside(self._links):
            self._links[router_id].put(self._load_message(router_id, after_step=False))
        self._attempts.work.told()

    def _load_message(self, router_id: str, *, after_step: bool = True) -> worker_pb2.Load:
        load, work = self._load, self._attempts.work
        others, queued = work.others(router_id), work.queued_beside(time.monotonic(), router_id)
        return worker_pb2.Load(
            running=load.running,
            waiting=load.waiting,
            kv_blocks_used=load.kv_blocks_used,
            kv_blocks_total=load.kv_blocks_total,
            step_time_s=load.step_time_s if after_step else 0.0,
            others=None if others is None else worker_pb2.PlacedWork(**others._asdict()),
            queued_beside=worker_pb2.Queued(**queued._asdict()) if queued.requests else None,
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
