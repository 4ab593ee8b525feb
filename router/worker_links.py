"""The router process's links to the workers: one bidirectional gRPC stream each.

Boundary: turns messages into the core's events and the core's commands into messages, and says
when a worker is dead. A broken link is tried again at once; a worker is dead when its port refuses,
when another incarnation answers, when the membership no longer has it, or after too long a silence.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Protocol

import grpc

from engine.base import EngineLoad
from protos import worker_pb2, worker_pb2_grpc
from protos.enginecore import ENGINE_TAG
from protos.ids import Attempt, Incarnation, RequestKey, WorkerId
from protos.membership import Member
from router.core.events import (
    AbortOn,
    Event,
    Forget,
    HeldAttempt,
    OutputReport,
    PromptUse,
    Resend,
    Role,
    StepReported,
    Submit,
    WorkerDead,
    WorkerLinkBroken,
    WorkerUp,
)
from router.settings import RouterSettings

_log = logging.getLogger("router")

_make_stub: Any = worker_pb2_grpc.WorkerStub
"""Generated code has no types."""

ToWorker = Submit | AbortOn | Forget | Resend

RETRY_S: Final = 0.1
GREETING_S: Final = 2.0
"""The longest wait for a worker's Welcome, or for its port to answer."""
SILENCE_S: Final = 5.0
"""Workers report several times a second; one that says nothing for so long counts as cut off."""
QUEUED_MESSAGES: Final = 20_000
"""A worker that takes nothing until so many wait counts as cut off."""
FULL_MESSAGE_BYTES: Final = 1024 * 1024
"""Commands that wait together go out together, until prompts make up as much as this."""
_MESSAGE_BYTES: Final = 256 * 1024 * 1024
_OPTIONS: Final = [
    ("grpc.max_send_message_length", _MESSAGE_BYTES),
    ("grpc.max_receive_message_length", _MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 5_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.max_pings_without_data", 0),
    # A link that is tried again must not wait for the back-off of the one before.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_http_proxy", 0),
]


class Listener(Protocol):
    """Who is told what comes from workers."""

    def feed(self, event: Event) -> None:
        """An event for the core."""
        ...

    def on_welcome(self, worker: WorkerId, ready_payload: bytes) -> None:
        """A worker is up; what its engine would tell a front."""
        ...

    def on_metrics(self, worker: WorkerId, values: Mapping[str, float]) -> None:
        """A worker's figures as they stand."""
        ...


class WorkerLink:
    """The link to one member: `run` keeps it up until cancelled."""

    def __init__(
        self, member: Member, settings: RouterSettings, incarnation: int, listener: Listener
    ) -> None:
        self.member = member
        self._id = WorkerId(member.worker_id)
        self._settings = settings
        self._hello = worker_pb2.Hello(router_id=settings.router_id, router_incarnation=incarnation)
        self._listener = listener
        self._incarnation: Incarnation | None = None
        """Of the worker that was up last, until it is said to be dead."""
        self._said_dead = False
        self._call: Any = None
        self._heard_s = 0.0
        self._queue: deque[worker_pb2.Command] = deque()
        self._queued = asyncio.Event()

    def send(self, command: ToWorker) -> None:
        """Queue a command; it is lost if the link breaks before it is sent."""
        self._queue.append(_command(command))
        self._queued.set()
        if len(self._queue) > QUEUED_MESSAGES and self._call is not None:
            self._call.cancel()

    def check_silence(self, now_s: float) -> None:
        """Break the link to a worker that has stopped talking."""
        if self._call is not None and now_s - self._heard_s > SILENCE_S:
            _log.warning("%s says nothing for %.0f s", self._id, SILENCE_S)
            self._call.cancel()

    def give_up(self, why: str) -> None:
        """Say once that the worker is dead."""
        if not self._said_dead:
            self._said_dead = True
            incarnation, self._incarnation = self._incarnation, None
            self._listener.feed(WorkerDead(self._id, incarnation, why))

    async def run(self) -> None:
        """Attach, again and again; between times, judge whether the worker is dead."""
        loop = asyncio.get_running_loop()
        lost_s = loop.time()
        while True:
            self._heard_s = 0.0
            why = await self._attach()
            if self._heard_s:
                lost_s = loop.time()
            if not self._said_dead:
                if await _refuses(self.member.address):
                    self.give_up("its port refuses connections")
                elif loop.time() - lost_s > self._settings.worker_reconnect_s:
                    self.give_up(f"it can't be reached: {why}")
            await asyncio.sleep(RETRY_S)

    async def _attach(self) -> str:
        """One connection from its Hello to its end; returns why it ended."""
        metadata = (("authorization", f"Bearer {self._settings.link_token}"),)
        async with grpc.aio.insecure_channel(self.member.address, options=_OPTIONS) as channel:
            call = _make_stub(channel).Attach(metadata=metadata)
            try:
                async with asyncio.timeout(GREETING_S):
                    await call.write(worker_pb2.RouterMessage(hello=self._hello))
                    first = await call.read()
                if not _is_message(first) or not first.HasField("welcome"):
                    return "it did not say Welcome"
                if first.welcome.worker_id != self._id:
                    self.give_up(f"{first.welcome.worker_id} answers on its port")
                    return "another answers"
                self._up(first.welcome, call)
                await self._talk(call)
            except grpc.aio.AioRpcError as error:
                return f"{error.code().name}: {error.details()}"
            except TimeoutError:
                return "it does not answer"
            except asyncio.CancelledError:
                if asyncio.current_task().cancelling():  # type: ignore[union-attr]
                    raise
                return "the link was cut"  # By check_silence or send.
            finally:
                if self._call is not None and self._incarnation is not None:
                    self._listener.feed(WorkerLinkBroken(self._id, self._incarnation))
                self._call = None
            return "it ended the link"

    def _up(self, welcome: worker_pb2.Welcome, call: Any) -> None:
        self._call = call
        self._heard_s = asyncio.get_running_loop().time()
        self._queue.clear()
        self._incarnation = Incarnation(welcome.worker_incarnation)
        self._said_dead = False
        self._listener.feed(_worker_up(welcome))
        self._listener.on_welcome(self._id, welcome.ready_payload)

    async def _talk(self, call: Any) -> None:
        sender = asyncio.create_task(self._send_queued(call))
        try:
            while _is_message(message := await call.read()):
                self._heard_s = asyncio.get_running_loop().time()
                assert self._incarnation is not None
                if message.HasField("step"):
                    self._listener.feed(_step(self._id, self._incarnation, message.step))
                elif message.HasField("metrics"):
                    self._listener.on_metrics(self._id, dict(message.metrics.values))
        finally:
            sender.cancel()
            # Its errors are the link's, which the reader tells.
            await asyncio.gather(sender, return_exceptions=True)

    async def _send_queued(self, call: Any) -> None:
        while True:
            while self._queue:
                await call.write(worker_pb2.RouterMessage(commands=self._next_commands()))
            self._queued.clear()
            await self._queued.wait()

    def _next_commands(self) -> list[worker_pb2.Command]:
        """The oldest that wait, as many as a message may hold."""
        commands: list[worker_pb2.Command] = []
        size_bytes = 0
        while self._queue and size_bytes < FULL_MESSAGE_BYTES:
            command = self._queue.popleft()
            commands.append(command)
            size_bytes += len(command.submit.engine_request)
        return commands


class WorkerLinks:
    """A link to each member."""

    def __init__(
        self,
        settings: RouterSettings,
        incarnation: int,
        listener: Listener,
        on_defect: Callable[[asyncio.Task[None]], None],
    ) -> None:
        self._settings = settings
        self._incarnation = incarnation
        self._listener = listener
        self._on_defect = on_defect
        self._links: dict[str, tuple[WorkerLink, asyncio.Task[None]]] = {}

    def send(self, command: ToWorker) -> None:
        """To the worker that it names; to a removed one, nowhere."""
        known = self._links.get(command.worker)
        if known is not None:
            known[0].send(command)

    def update(self, members: Sequence[Member]) -> None:
        """Open links to new members, close those to removed or replaced ones."""
        wanted = {member.worker_id: member for member in members}
        for worker_id, (link, task) in list(self._links.items()):
            member = wanted.get(worker_id)
            if member is None or not _same_process(member, link.member):
                del self._links[worker_id]
                link.give_up("the membership no longer has it")
                task.cancel()
        for worker_id, member in wanted.items():
            if worker_id not in self._links:
                link = WorkerLink(member, self._settings, self._incarnation, self._listener)
                task = asyncio.create_task(link.run())
                task.add_done_callback(self._on_defect)
                self._links[worker_id] = link, task

    def check_silence(self, now_s: float) -> None:
        """Break the links that say nothing."""
        for link, _ in self._links.values():
            link.check_silence(now_s)

    def addresses(self) -> dict[str, str]:
        """By worker."""
        return {worker_id: link.member.address for worker_id, (link, _) in self._links.items()}


def _is_message(read: object) -> bool:
    """Else it is the end of the stream."""
    return isinstance(read, worker_pb2.WorkerMessage)


def _same_process(left: Member, right: Member) -> bool:
    return (left.address, left.incarnation) == (right.address, right.incarnation)


async def _refuses(address: str) -> bool:
    """Whether nobody listens there: the worker's process is gone."""
    host, _, port = address.rpartition(":")
    try:
        async with asyncio.timeout(GREETING_S):
            _, writer = await asyncio.open_connection(host.strip("[]"), int(port))
    except ConnectionRefusedError:
        return True
    except (OSError, TimeoutError):
        return False
    writer.close()
    return False


def _command(command: ToWorker) -> worker_pb2.Command:
    key, attempt = command.key, command.attempt
    if isinstance(command, Submit):
        submit = worker_pb2.Submit(
            request_key=key, attempt=attempt, engine_tag=ENGINE_TAG,
            engine_request=command.engine_request, output_token_ids=command.output_token_ids,
            manifest=command.manifest, hand_off=command.hand_off,
        )  # fmt: skip
        return worker_pb2.Command(submit=submit)
    if isinstance(command, AbortOn):
        return worker_pb2.Command(abort=worker_pb2.Abort(request_key=key, attempt=attempt))
    if isinstance(command, Forget):
        return worker_pb2.Command(forget=worker_pb2.Forget(request_key=key, attempt=attempt))
    resend = worker_pb2.Resend(
        request_key=key, attempt=attempt, from_position=command.from_position
    )
    return worker_pb2.Command(resend=resend)


def _worker_up(welcome: worker_pb2.Welcome) -> WorkerUp:
    held = tuple(
        HeldAttempt(
            RequestKey(each.request_key), Attempt(each.attempt),
            each.first_position, each.next_position, each.ended, each.aborted,
        )
        for each in welcome.held
    )  # fmt: skip
    return WorkerUp(
        WorkerId(welcome.worker_id), Incarnation(welcome.worker_incarnation), Role(welcome.role),
        welcome.engine_tag, welcome.block_size_tokens, welcome.kv_blocks_total,
        welcome.max_model_len_tokens, held,
    )  # fmt: skip


def _step(worker: WorkerId, incarnation: Incarnation, step: worker_pb2.Step) -> StepReported:
    load = step.load
    return StepReported(
        worker,
        incarnation,
        [_output(output) for output in step.outputs],
        EngineLoad(
            load.running, load.waiting, load.kv_blocks_used, load.kv_blocks_total, load.step_time_s
        ),
    )


def _output(output: worker_pb2.Output) -> OutputReport:
    use = None
    if output.HasField("prompt_use"):
        told = output.prompt_use
        use = PromptUse(
            told.prompt_tokens, told.computed_tokens, told.cached_tokens, told.transferred_tokens
        )
    return OutputReport(
        RequestKey(output.request_key), Attempt(output.attempt), output.first_position,
        tuple(output.token_ids), output.payload, output.finish, output.manifest, output.error, use,
    )  # fmt: skip
