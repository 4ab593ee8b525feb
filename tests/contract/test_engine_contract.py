"""The engine contract, held by the simulated engine."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest

from engine.base import Engine
from engine.simulated.engine import SimulatedEngine
from engine.spec import SimulatedTiming, WorkerSpec
from protos.ids import WorkerId
from tests.contract.engine_contract import Driver, EngineContract, EngineFactory, driven, prompt

__all__ = ["prompt"]

FAST = SimulatedTiming(
    step_base_s=0.0005, prefill_token_s=1e-7, decode_request_s=1e-7, transfer_block_s=1e-4
)


def _simulated(name: str, engine_args: dict[str, Any]) -> Engine:
    return SimulatedEngine(
        WorkerSpec(
            worker_id=WorkerId(name),
            role="decode",
            engine="simulated",
            model="",
            run_directory="",
            link_token="",
            engine_args=engine_args,
            simulated=FAST,
        )
    )


# vLLM's block sizes on GPUs and on CPUs.
@pytest.fixture(params=[16, 128], ids=["simulated-16", "simulated-128"])
def engine_args(request: pytest.FixtureRequest) -> dict[str, Any]:
    return {"block_size": request.param, "max_model_len": 2048, "num_gpu_blocks_override": 256}


@pytest.fixture
def fresh(engine_args: dict[str, Any]) -> EngineFactory:
    return lambda: _simulated("worker-c", engine_args)


@pytest.fixture
async def engine(engine_args: dict[str, Any]) -> AsyncIterator[Driver]:
    async with driven(lambda: _simulated("worker-a", engine_args)) as driver:
        yield driver


@pytest.fixture
async def other(engine_args: dict[str, Any]) -> AsyncIterator[Driver]:
    async with driven(lambda: _simulated("worker-b", engine_args)) as driver:
        yield driver


class TestSimulatedEngine(EngineContract):
    pass
