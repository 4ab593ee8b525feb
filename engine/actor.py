"""The Ray actor around a worker. The pools subclass it; nothing of a request passes through Ray."""

from __future__ import annotations

import asyncio
import logging
import os
from typing import Any

import ray

from engine.base import Engine
from engine.service import WorkerService
from engine.spec import WorkerAddress, WorkerSpec

logger = logging.getLogger(__name__)


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
            )
            self._serving = asyncio.create_task(self._serve())
        return self._address

    async def status(self) -> dict[str, Any]:
        """Address, once serving, and figures."""
        if self._address is None:
            return {"state": "starting", "pid": os.getpid()}
        return {"state": "ready", "address": self._address, **self._service.status()}

    async def run_until_closed(self) -> None:
        """Never returns while the actor lives: its caller learns of the death at once."""
        await asyncio.Event().wait()

    async def stop(self) -> None:
        """End the engine and the links; the actor itself is for its owner to end."""
        if self._serving is not None:
            self._serving.cancel()
        await self._service.stop()

    async def _serve(self) -> None:
        try:
            await self._service.run()
        except Exception:
            # Outermost: without its engine this process has nothing to live for, and its end is
            # what tells the supervisor and the routers.
            logger.exception("worker %s ends", self._spec.worker_id)
            os._exit(1)
