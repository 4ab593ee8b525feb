"""A worker without Ray: `worker_process.py ID ROLE TOKEN STEP_S MODEL`.

It prints its port, incarnation and weights.
"""

from __future__ import annotations

import asyncio
import sys

from engine.service import WorkerService
from engine.simulated.engine import SimulatedEngine
from engine.spec import SimulatedTiming, WorkerSpec


async def serve(worker_id: str, role: str, token: str, step_s: str, model: str) -> None:
    spec = WorkerSpec(
        worker_id=worker_id,  # type: ignore[arg-type]
        role=role,  # type: ignore[arg-type]
        engine="simulated",
        model=model,
        run_directory="/nonexistent",
        link_token=token,
        engine_args={"num_gpu_blocks_override": 512, "max_model_len": 2048},
        simulated=SimulatedTiming(step_base_s=float(step_s), transfer_block_s=0.0),
    )
    service = WorkerService(spec, SimulatedEngine(spec))
    print(await service.start(), service.incarnation, service.weights, flush=True)
    await service.run()


if __name__ == "__main__":
    asyncio.run(serve(*sys.argv[1:]))
