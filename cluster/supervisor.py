"""The supervisor: an actor that starts workers, replaces dead ones and tells routers who is there.

A shell: what to start is decided by `cluster.pools`, what it knows is kept in `cluster.state`, and
the operator API reads that (`cluster.admin_api`).
It stands in no request's path. Restarted by Ray, it adopts the workers that it finds.
"""

from __future__ import annotations

import asyncio
import importlib
import logging
import os
import time
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any, Final

import ray
from ray.exceptions import RayError

from cluster import engine_defaults
from cluster.actors import (
    SILENCE_S,
    STARTED_WITHIN_S,
    ask,
    describe,
    settle,
    until_it_ends,
    until_it_hangs,
)
from cluster.admin_api import AdminApi
from cluster.news import Kind, News, NewsLog
from cluster.pools import BecameReady, Begun, Died, Event, Slot, Start, Tick, role_of
from cluster.state import ClusterState, SupervisorSettings, Unit
from engine.spec import Role, WorkerAddress, WorkerSpec
from protos.ids import WorkerId
from protos.membership import Membership

logger = logging.getLogger(__name__)

NAME: Final = "supervisor"
_WORKER_CLASSES: Final[dict[Role, str]] = {
    "prefill": "prefill_workers.actor:PrefillWorker",
    "decode": "decode_workers.actor:DecodeWorker",
}
_POLL_S: Final = 10.0
"""A question for news is answered after this time at the latest, so that askers notice a death."""
_ADOPT_S: Final = 8.0
_STOP_S: Final = 4.0


class Supervisor:
    """See the module."""

    def __init__(self, settings: SupervisorSettings) -> None:
        self._state = ClusterState(settings)
        self._news = NewsLog()
        self._actors: dict[WorkerId, Any] = {}
        self._was_ready: set[Role] = set()
        self._units_ran: set[str] = set()
        self._changed = asyncio.Condition()
        self._closing = False
        self._admin_api = AdminApi(self._state)
        self._tasks: set[asyncio.Task[None]] = set()
        self._spawn(self._run())

    # Asked from outside

    async def news_after(self, number: int) -> list[News]:
        """What happened after the news of that number; waits a while for some."""
        await self._wait_until(lambda: self._news.count > number)
        return self._news.after(number)

    async def membership_after(
        self, router_id: str, node: str, directory: str, version: int
    ) -> Membership | None:
        """A router unit's question: waits a while for a newer membership; None: end yourself."""
        self._state.units[router_id] = Unit(router_id, node, Path(directory), time.time())
        await self._wait_until(lambda: self._closing or self._state.version > version)
        return None if self._closing else self._state.membership()

    async def unit_changed(self, router_id: str, problem: str | None, ran: bool) -> None:
        """A router unit's anchor runs, or why it does not; and whether one ever did."""
        if ran:
            self._units_ran.add(router_id)
        if problem is None:
            self._tell(router_id, "ready", "")
        else:
            self._tell(router_id, "failed", problem, fatal=router_id not in self._units_ran)
        await self._notify()

    async def stop(self) -> None:
        """End the workers, and let the units end themselves."""
        self._closing = True
        await self._notify()
        actors = list(self._actors.values())
        stops = [asyncio.ensure_future(settle(actor.stop.remote())) for actor in actors]
        if stops:
            await asyncio.wait(stops, timeout=_STOP_S)
        for actor in actors:
            ray.kill(actor)

    # Its own life

    async def _run(self) -> None:
        await self._admin_api.listen(Path(self._state.settings.admin_socket))
        names = await asyncio.to_thread(ray.util.list_named_actors)
        workers = [WorkerId(name) for name in names if role_of(name) is not None]
        found = await asyncio.gather(*(self._find(worker_id) for worker_id in workers))
        addresses = [address for address in found if address is not None]
        for address in addresses:
            self._admit(address)
        await self._handle(Begun({address.worker_id: address.role for address in addresses}))
        for address in addresses:
            self._tell(address.worker_id, "ready", "")
            self._spawn(self._watch(address.worker_id, self._actors[address.worker_id]))

    async def _handle(self, event: Event) -> None:
        before = {slot.worker_id for slot in self._state.pools.slots()}
        for command in self._state.pools.handle(time.monotonic(), event):
            if isinstance(command, Start):
                self._spawn(self._run_worker(command))
            else:
                self._spawn(self._tick_at(command.at_s))
        for slot in self._state.pools.slots():
            if slot.worker_id not in before and slot.state == "starting":
                self._tell(slot.worker_id, "starting", slot.reason)
        await self._notify()

    async def _tick_at(self, at_s: float) -> None:
        await asyncio.sleep(at_s - time.monotonic())
        if not self._closing:
            await self._handle(Tick())

    async def _run_worker(self, start: Start) -> None:
        """Start a worker and watch it until it dies."""
        spec = self._spec(start)
        os.makedirs(spec.run_directory, mode=0o700, exist_ok=True)
        try:
            actor = self._create(spec)
        except ValueError as error:  # The name may still be that of one that was just ended.
            await self._bury(start.worker_id, None, str(error))
            return
        self._actors[start.worker_id] = actor
        began_s = time.monotonic()
        address = await self._outlived(
            start.worker_id, actor, ask(actor.start.remote()), STARTED_WITHIN_S
        )
        if address is None:
            return
        self._admit(address)
        self._tell(start.worker_id, "ready", "", duration_s=time.monotonic() - began_s)
        await self._handle(BecameReady(start.worker_id))
        await self._watch(start.worker_id, actor)

    async def _watch(self, worker_id: WorkerId, actor: Any) -> None:
        """Wait for its end: the pending call fails at once."""
        await self._outlived(worker_id, actor, until_it_ends(actor), SILENCE_S)

    async def _outlived(
        self, worker_id: WorkerId, actor: Any, call: Coroutine[Any, Any, Any], first_answer_s: float
    ) -> Any | None:
        """What the call answers; None: the worker failed, died or hung before, and is buried."""
        answer = asyncio.ensure_future(call)
        hang = asyncio.ensure_future(until_it_hangs(actor, first_answer_s))
        await asyncio.wait({answer, hang}, return_when=asyncio.FIRST_COMPLETED)
        try:
            # The call of one that hung and was killed has failed, too, but does not know why.
            if not hang.done() or hang.exception() is not None:
                return await answer
            reason = hang.result()
        except RayError as error:
            reason = describe(error)
        finally:
            answer.cancel()
            hang.cancel()
        await self._bury(worker_id, actor, reason)
        return None

    async def _find(self, worker_id: WorkerId) -> WorkerAddress | None:
        """A worker that serves; one that does not answer, or was still starting, is ended."""
        try:
            actor = await asyncio.to_thread(ray.get_actor, worker_id)
        except ValueError:
            return None  # It died since it was listed.
        try:
            status = await asyncio.wait_for(ask(actor.status.remote()), _ADOPT_S)
        except (RayError, TimeoutError):
            status = {}
        address: WorkerAddress | None = status.get("address")
        if address is None:
            ray.kill(actor)
        else:
            self._actors[worker_id] = actor
        return address

    def _admit(self, address: WorkerAddress) -> None:
        self._state.admit(address)
        self._was_ready.add(address.role)

    async def _bury(self, worker_id: WorkerId, actor: Any | None, reason: str) -> None:
        if self._closing:
            return
        if actor is not None:
            ray.kill(actor)
            del self._actors[worker_id]
        slot = self._slot(worker_id)
        if slot.state == "starting":
            self._tell(worker_id, "failed", reason, fatal=slot.role not in self._was_ready)
        else:
            self._tell(worker_id, "died", reason)
        self._state.expel(worker_id, reason)
        await self._handle(Died(worker_id, reason))

    # Helpers

    def _spec(self, start: Start) -> WorkerSpec:
        settings = self._state.settings
        config = settings.config
        return WorkerSpec(
            worker_id=start.worker_id,
            role=start.role,
            engine=config.engine,
            model=settings.model,
            run_directory=f"{settings.run_directory}/workers/{start.worker_id}",
            link_token=settings.link_token,
            kv_lease_s=config.kv.lease_s,
            engine_args=engine_defaults.arguments(config, start.role),
            environment=engine_defaults.environment(config, start.role),
            simulated=config.simulated.timing(),
        )

    def _create(self, spec: WorkerSpec) -> Any:
        module, _, name = _WORKER_CLASSES[spec.role].partition(":")
        worker_class = getattr(importlib.import_module(module), name)
        gpus = 0
        if spec.engine == "vllm" and ray.cluster_resources().get("GPU", 0):
            arguments = spec.engine_args
            gpus = arguments.get("tensor_parallel_size", 1) * arguments.get(
                "pipeline_parallel_size", 1
            )
        options = {"name": spec.worker_id, "lifetime": "detached", "num_cpus": 0, "num_gpus": gpus}
        return ray.remote(worker_class).options(**options).remote(spec)

    def _slot(self, worker_id: WorkerId) -> Slot:
        return next(slot for slot in self._state.pools.slots() if slot.worker_id == worker_id)

    def _tell(
        self,
        subject: str,
        kind: Kind,
        reason: str,
        *,
        duration_s: float = 0.0,
        fatal: bool = False,
    ) -> None:
        self._news.add(subject, kind, reason, duration_s, fatal)
        logger.info("%s %s %s", subject, kind, reason)

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    async def _wait_until(self, condition: Callable[[], bool]) -> None:
        try:
            async with self._changed, asyncio.timeout(_POLL_S):
                await self._changed.wait_for(condition)
        except TimeoutError:
            return

    def _spawn(self, work: Awaitable[None]) -> None:
        task: asyncio.Task[None] = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("a defect of the supervisor", exc_info=error)
