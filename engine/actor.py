"""The Ray actor around a worker. The pools subclass it; nothing of a request passes through Ray."""

from __future__ import annotations

import asyncio
import logging
import os
from typing import Any, Final

import ray

from engine.base import Engine
from engine.service import WorkerService
from engine.spec import WorkerAddress, WorkerSpec
from protos.errors import EngineError

logger = logging.getLogger(__name__)

_LAST_WORDS_S: Final = 0.3
"""For Ray to take the reason of the end to the supervisor."""


def make_engine(spec: WorkerSpec) -> Engine:
    """The engine that the spec asks for."""
    if spec.engine == "simulated":
        from engine.simulated.engine import SimulatedEngine

        return SimulatedEngine(spec)
    from engine.vllm_host.engine import VllmEngine

    return VllmEngine(spec)


class EngineActor:
    """One worker: the actor's process lives and dies with its engine."""

    def __init__(self, spec: WorkerSpec) -> None:
        self._spec = spec
        self._engine = make_engine(spec)
        self._service = WorkerService(spec, self._engine)
        self._address: WorkerAddress | None = None
        self._serving: asyncio.Task[None] | None = None
        self._over = asyncio.Event()
        self._why = ""

    async def start(self) -> WorkerAddress:
        """Load the engine and listen; returns when it can serve. Raises EngineError."""
        if self._address is None:
            port = await self._service.start()
            self._address = WorkerAddress(
                worker_id=self._spec.worker_id,
                incarnation=self._service.incarnation,
                role=self._spec.role,
                address=f"{self._spec.listen_host}:{port}",
                node=ray.get_runtime_context().get_node_id(),
                pid=os.getpid(),
                engine_pid=getattr(self._engine, "pid", None),
                weights=self._service.weights,
            )
            self._serving = asyncio.create_task(self._serve())
        return self._address

    async def status(self) -> dict[str, Any]:
        """Address, once serving, and figures."""
        if self._address is None:
            return {"state": "starting", "pid": os.getpid()}
        return {"state": "ready", "address": self._address, **self._service.status()}

    async def beat(self) -> tuple[str, int]:
        """Node and pid of this process; one that does not answer for long hangs."""
        return ray.get_runtime_context().get_node_id(), os.getpid()

    async def run_until_closed(self) -> None:
        """Never returns: its caller learns of the actor's death at once. If its engine ended, it
        raises EngineError shortly before."""
        await self._over.wait()
        raise EngineError(self._why)

    async def stop(self) -> None:
        """End the engine and the links; the actor itself is for its owner to end."""
        if self._serving is not None:
            self._serving.cancel()
        await self._service.stop()

    async def _serve(self) -> None:
        try:
            await self._service.run()
        except Exception as error:
            # Outermost: without its engine this process has nothing to live for, and its end is
            # what tells the supervisor and the routers.
            logger.exception("worker %s ends", self._spec.worker_id)
            self._why = str(error) if isinstance(error, EngineError) else repr(error)
            try:
                # The routers first: who waits for `run_until_closed` ends this process at once.
                await self._service.stop_serving(self._why)
            except Exception:
                logger.exception("worker %s could not end its links", self._spec.worker_id)
            self._over.set()
            try:
                await asyncio.sleep(_LAST_WORDS_S)
            finally:
                os._exit(1)
