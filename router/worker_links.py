"""The router process's links to the workers: one bidirectional gRPC stream each.

Boundary: turns messages into the core's events and the core's commands into messages, and says
when a worker is dead. A broken link is tried again at once; a worker is dead when its port refuses,
when another incarnation answers, when the membership no longer has it, or when it is silent for too
long (`link_watch`).
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, Final, Protocol

import grpc

from engine.service import LAST_WORDS_STATUS
from engine.watch import AwakeClock
from protos import worker_pb2, worker_pb2_grpc
from protos.ids import Incarnation, WorkerId
from protos.membership import Member, Membership
from router.core.events import CacheReported, Event, WorkerDead, WorkerLinkBroken
from router.link_watch import SILENCE_S, LinkWatch, Reach
from router.metrics import LinkBytes
from router.settings import RouterSettings
from router.worker_messages import (
    SnapshotParts,
    ToWorker,
    cache_changed,
    command_of,
    learned_elsewhere,
    step_reported,
    worker_up,
)

_log = logging.getLogger("router")

_make_stub: Any = worker_pb2_grpc.WorkerStub
"""Generated code has no types."""

_LINK: Final = "router-worker"
RETRY_S: Final = 0.1
AGAIN_S: Final = 0.01
"""The same, after a link that stood."""
LONGEST_LOOK_S: Final = 0.5
"""Silence is looked for ten times a second; after a longer pause this process was not awake."""
QUEUED_MESSAGES: Final = 20_000
"""A worker that takes nothing until so many wait counts as cut off."""
FULL_MESSAGE_BYTES: Final = 1024 * 1024
"""Commands that wait together go out together, until prompts make up as much as this."""
_MESSAGE_BYTES: Final = 256 * 1024 * 1024
_OPTIONS: Final = [
    ("grpc.max_send_message_length", _MESSAGE_BYTES),
    ("grpc.max_receive_message_length", _MESSAGE_BYTES),
    # Silence is noticed sooner, by what workers say; this must not end a link that is cut for 5 s.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 10_000),
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
        self,
        member: Member,
        settings: RouterSettings,
        incarnation: int,
        listener: Listener,
        clock: AwakeClock,
        link_bytes: LinkBytes,
    ) -> None:
        self._bytes = link_bytes
        self.member = member
        self._id = WorkerId(member.worker_id)
        self._settings = settings
        self._hello = worker_pb2.Hello(router_id=settings.router_id, router_incarnation=incarnation)
        self._listener = listener
        self._incarnation: Incarnation | None = None
        """Of the worker that was up last, until it is said to be dead."""
        self._said_dead = False
        self._last_words = ""
        """What it said of its own end."""
        self._call: Any = None
        self._clock = clock
        self._watch = LinkWatch(clock.time_s, settings.worker_reconnect_s)
        self._queue: deque[worker_pb2.Command] = deque()
        self._queued = asyncio.Event()

    def send(self, command: ToWorker) -> None:
        """Queue a command; it is lost if the link breaks before it is sent."""
        self._queue.append(command_of(command))
        self._queued.set()
        if len(self._queue) > QUEUED_MESSAGES and self._call is not None:
            self._call.cancel()

    def check_silence(self) -> None:
        """Break the link to a worker that has stopped talking."""
        if self._call is not None and self._watch.is_silent(self._clock.time_s):
            _log.warning("%s says nothing for %.0f s", self._id, SILENCE_S)
            self._call.cancel()

    def give_up(self, why: str) -> None:
        """Say once that the worker is dead."""
        if not self._said_dead:
            self._said_dead = True
            incarnation, self._incarnation = self._incarnation, None
            last_words = " ".join(self._last_words.split())
            if last_words and last_words != why:
                why = f"{why} ({last_words})"
            self._listener.feed(WorkerDead(self._id, incarnation, why))

    async def run(self) -> None:
        """Attach, again and again; between times, judge whether the worker is dead."""
        while True:
            reach, detail = await self._try()
            verdict = self._watch.judge(self._clock.time_s, reach)
            if verdict is not None:
                self.give_up(f"{verdict} ({detail})" if detail else verdict)
            await asyncio.sleep(RETRY_S if reach is not Reach.WELCOMED else AGAIN_S)

    async def _try(self) -> tuple[Reach, str]:
        """One connection from its first packet to its end."""
        limit_s = self._watch.time_left_s(self._clock.time_s)
        reach = await _knock(self.member.address, limit_s)
        if reach is not None:
            return reach, ""
        metadata = (("authorization", f"Bearer {self._settings.link_token}"),)
        async with grpc.aio.insecure_channel(self.member.address, options=_OPTIONS) as channel:
            call = _make_stub(channel).Attach(metadata=metadata)
            try:
                async with asyncio.timeout(limit_s):
                    await call.write(worker_pb2.RouterMessage(hello=self._hello))
                    first = await call.read()
                if not _is_message(first) or not first.HasField("welcome"):
                    return Reach.ANSWERED, "without Welcome"
                if first.welcome.worker_id != self._id:
                    self.give_up(f"{first.welcome.worker_id} answers on its port")
                    return Reach.ANSWERED, "another answers"
                self._up(first.welcome, call)
                await self._talk(call)
            except grpc.aio.AioRpcError as error:
                if self._call is None:
                    return Reach.ANSWERED, f"{error.code().name}: {error.details()}"
                if error.code() is LAST_WORDS_STATUS:
                    self._last_words = error.details()
            except TimeoutError:
                return Reach.SILENT, ""
            except asyncio.CancelledError:
                if asyncio.current_task().cancelling():  # type: ignore[union-attr]
                    raise
                # The call was cancelled, by check_silence or send.
            finally:
                if self._call is not None and self._incarnation is not None:
                    self._listener.feed(WorkerLinkBroken(self._id, self._incarnation))
                self._call = None
            return Reach.WELCOMED, ""

    def _up(self, welcome: worker_pb2.Welcome, call: Any) -> None:
        self._call = call
        self._watch.heard(self._clock.time_s)
        self._queue.clear()
        self._incarnation = Incarnation(welcome.worker_incarnation)
        self._said_dead = False
        self._last_words = ""
        if welcome.index_block_tokens != self._settings.index_block_tokens:
            _log.warning(
                "%s tells of its prefix cache in blocks of %d tokens, this router looks for %d, so "
                "it finds nothing there: set engine_args.block_size to that of the engine",
                self._id, welcome.index_block_tokens, self._settings.index_block_tokens,
            )  # fmt: skip
        self._listener.feed(worker_up(welcome))
        self._listener.on_welcome(self._id, welcome.ready_payload)

    async def _talk(self, call: Any) -> None:
        sender = asyncio.create_task(self._send_queued(call))
        snapshot_parts = SnapshotParts()
        try:
            while _is_message(message := await call.read()):
                self._watch.heard(self._clock.time_s)
                self._bytes.responses[_LINK] += message.ByteSize()
                assert self._incarnation is not None
                if message.HasField("step"):
                    self._hear_step(self._incarnation, message.step)
                elif message.HasField("cache_snapshot"):
                    snapshot = snapshot_parts.add(message.cache_snapshot)
                    if snapshot is not None:
                        self._listener.feed(CacheReported(self._id, self._incarnation, snapshot))
                elif message.HasField("metrics"):
                    self._listener.on_metrics(self._id, dict(message.metrics.values))
                elif message.HasField("learned"):
                    self._listener.feed(learned_elsewhere(message.learned))
        finally:
            sender.cancel()
            # Its errors are the link's, which the reader tells.
            await asyncio.gather(sender, return_exceptions=True)

    def _hear_step(self, incarnation: Incarnation, step: worker_pb2.Step) -> None:
        self._listener.feed(step_reported(self._id, incarnation, step))
        if step.HasField("cache_change"):
            self._listener.feed(cache_changed(self._id, incarnation, step.cache_change))

    async def _send_queued(self, call: Any) -> None:
        while True:
            while self._queue:
                message = worker_pb2.RouterMessage(commands=self._next_commands())
                self._bytes.requests[_LINK] += message.ByteSize()
                await call.write(message)
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
        link_bytes: LinkBytes,
    ) -> None:
        self._bytes = link_bytes
        self._settings = settings
        self._incarnation = incarnation
        self._listener = listener
        self._on_defect = on_defect
        self._clock = AwakeClock(asyncio.get_running_loop().time(), LONGEST_LOOK_S)
        self._links: dict[str, tuple[WorkerLink, asyncio.Task[None]]] = {}

    def send(self, command: ToWorker) -> None:
        """To the worker that it names; to a removed one, nowhere."""
        known = self._links.get(command.worker)
        if known is not None:
            known[0].send(command)

    def update(self, read: Membership) -> None:
        """Open links to new members, close those to removed or replaced ones."""
        wanted = {member.worker_id: member for member in read.members}
        gone = {(each.worker_id, each.incarnation): each.why for each in read.gone}
        for worker_id, (link, task) in list(self._links.items()):
            member = wanted.get(worker_id)
            if member is None or not _same_process(member, link.member):
                del self._links[worker_id]
                known_as = worker_id, link.member.incarnation
                link.give_up(gone.get(known_as) or "the membership no longer has it")
                task.cancel()
        for worker_id, member in wanted.items():
            if worker_id not in self._links:
                link = WorkerLink(
                    member, self._settings, self._incarnation, self._listener, self._clock,
                    self._bytes,
                )  # fmt: skip
                task = asyncio.create_task(link.run())
                task.add_done_callback(self._on_defect)
                self._links[worker_id] = link, task

    def check_silence(self, now_s: float) -> None:
        """Break the links that say nothing; to be called several times a second."""
        self._clock.look(now_s)
        for link, _ in self._links.values():
            link.check_silence()

    def addresses(self) -> dict[str, str]:
        """By worker."""
        return {worker_id: link.member.address for worker_id, (link, _) in self._links.items()}


def _is_message(read: object) -> bool:
    """Else it is the end of the stream."""
    return isinstance(read, worker_pb2.WorkerMessage)


def _same_process(left: Member, right: Member) -> bool:
    return (left.address, left.incarnation) == (right.address, right.incarnation)


async def _knock(address: str, limit_s: float) -> Reach | None:
    """Whether a connection is refused, or does not come about at all; None: its port is open."""
    host, _, port = address.rpartition(":")
    try:
        async with asyncio.timeout(limit_s):
            _, writer = await asyncio.open_connection(host.strip("[]"), int(port))
    except ConnectionRefusedError:
        return Reach.REFUSED
    except (OSError, TimeoutError):
        return Reach.CUT
    writer.close()
    return None
