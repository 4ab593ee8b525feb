"""The asyncio shell: real time, idling, cancellation, stopping."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from typing import Any

import pytest

from engine.simulated.engine import SimulatedEngine
from engine.spec import SimulatedTiming, WorkerSpec
from protos.enginecore import decode_ready, hand_off_after_first_token
from protos.errors import ConfigError, EngineError
from protos.ids import WorkerId
from tests.contract.engine_contract import make_request

PROMPT = list(range(100, 140))


def make_engine(kv_lease_s: float = 30.0, **engine_args: Any) -> SimulatedEngine:
    return SimulatedEngine(
        WorkerSpec(
            worker_id=WorkerId("worker-a"),
            role="decode",
            engine="simulated",
            model="",
            run_directory="",
            link_token="",
            kv_lease_s=kv_lease_s,
            engine_args=engine_args,
            simulated=SimulatedTiming(step_base_s=0.05),
        )
    )


async def test_a_step_takes_its_time_and_idling_waits() -> None:
    engine = make_engine()
    loop = asyncio.get_running_loop()
    stepping = asyncio.create_task(engine.step())
    await asyncio.sleep(0.02)
    assert not stepping.done()
    started_s = loop.time()
    engine.add(make_request("a", PROMPT, max_tokens=1))
    step = await stepping
    assert 0.05 <= loop.time() - started_s < 0.5
    assert [output.request_id for output in step.outputs] == ["a"]


class LateClock:
    """Virtual time in which every sleep ends late."""

    def __init__(self, late_s: float) -> None:
        self.now_s = 1000.0
        self.late_s = late_s

    async def sleep(self, delay_s: float) -> None:
        self.now_s += max(0.0, delay_s) + self.late_s


@pytest.mark.parametrize(
    ("late_s", "took_s"),
    [
        # Only the last one is told late.
        (0.02, 20 * 0.05 + 0.02),
        # By a whole step: the process was stopped, and nothing is caught up.
        (0.06, 20 * 0.11),
    ],
)
async def test_a_step_that_is_told_late_does_not_make_the_next_one_late(
    late_s: float, took_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = LateClock(late_s)
    engine = make_engine()
    engine.add(make_request("a", [100], max_tokens=20))
    with monkeypatch.context() as patched:
        patched.setattr(asyncio.get_running_loop(), "time", lambda: clock.now_s)
        patched.setattr(asyncio, "sleep", clock.sleep)
        for _ in range(20):
            await engine.step()
    assert clock.now_s - 1000.0 == pytest.approx(took_s, rel=0.01)


async def test_a_cancelled_step_is_taken_up_by_the_next_call() -> None:
    engine = make_engine()
    engine.add(make_request("a", PROMPT, max_tokens=1))
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(engine.step(), 0.01)
    assert [output.request_id for output in (await engine.step()).outputs] == ["a"]


async def test_the_end_of_a_lease_is_told() -> None:
    engine = make_engine(kv_lease_s=0.1)
    request = make_request("a", PROMPT)
    hand_off_after_first_token(request)
    engine.add(request)
    assert (await engine.step()).load.kv_blocks_used == 3
    step = await asyncio.wait_for(engine.step(), 5)
    assert (step.outputs, step.load.kv_blocks_used) == ([], 0)


async def test_stop_wakes_who_waits() -> None:
    engine = make_engine()
    stepping = asyncio.create_task(engine.step())
    await asyncio.sleep(0)
    await engine.stop()
    await engine.stop()
    with pytest.raises(EngineError):
        await stepping


async def test_engine_arguments_are_vllms() -> None:
    info = await make_engine(
        block_size=128, num_gpu_blocks_override=64, max_model_len=4096, max_num_seqs=8
    ).start()
    ready = decode_ready(info.ready_payload)
    assert (info.block_size_tokens, info.kv_blocks_total) == (128, 64)
    assert (ready.max_model_len, ready.max_num_seqs, ready.kv_cache_size_tokens) == (4096, 8, 8192)
    with pytest.raises(ConfigError, match="num_gpu_blocks_override"):
        make_engine(num_gpu_blocks_override=1)


def test_it_loads_neither_vllm_nor_torch_nor_ray() -> None:
    script = (
        "import sys, engine.simulated.engine; "
        "print(sorted({'vllm', 'torch', 'ray', 'transformers'} & sys.modules.keys()))"
    )
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert loaded.stdout == "[]\n"
