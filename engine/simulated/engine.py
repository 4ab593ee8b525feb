"""The simulated engine in real time: an asyncio shell around `SimulatedCore`.

Hand-off without a data plane: engines in different processes don't see each other, so a fetch
takes its time and is verified against the manifest's digest, but never reaches its source. The
real engine frees handed-off blocks when NIXL notifies it that they were read; here the router's
`abort` of the finished request does, or the lease.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

from engine.base import EngineInfo, EngineStep
from engine.latency_model import StepTimes
from engine.simulated.core import SimulatedCore
from engine.simulated.scheduler import SimulatedLimits
from engine.spec import WorkerSpec
from engine.weights import weights_digest
from protos.enginecore import ENGINE_TAG, EngineRequest, ReadyResponse, encode
from protos.errors import EngineError


class SimulatedEngine:
    """An `Engine` without a model. Its steps are due at the times that its core says; one that is
    told late, since this process was, does not make the next one late."""

    def __init__(self, spec: WorkerSpec) -> None:
        self._limits = _limits(spec)
        self._model = Path(spec.model)
        self._core = SimulatedCore(self._limits, StepTimes(spec.simulated))
        self._changed = asyncio.Event()
        self._step_end_s: float | None = None
        self._previous_end_s: float | None = None
        """When the step before was due; None if it left nothing to compute."""
        self._stopped = False

    async def start(self) -> EngineInfo:
        """There is nothing to load; the model's files only name what it would be."""
        return EngineInfo(
            engine_tag=ENGINE_TAG,
            block_size_tokens=self._limits.block_size_tokens,
            kv_blocks_total=self._limits.kv_blocks,
            max_model_len_tokens=self._limits.max_model_len_tokens,
            ready_payload=encode(_ready_response(self._limits)),
            weights=weights_digest(self._model, {"engine": "simulated"}),
        )

    def add(self, request: EngineRequest) -> None:
        """Queue a request; a step that is under way does not include it."""
        self._core.add(request)
        self._changed.set()

    def abort(self, request_ids: list[str]) -> None:
        """End these and free their blocks at once. Unknown ids are ignored."""
        self._core.abort(request_ids)
        self._changed.set()

    async def step(self) -> EngineStep:
        """Wait for the next step. Cancelled during one, it leaves it to the next call."""
        loop = asyncio.get_running_loop()
        while not self._stopped:
            if self._step_end_s is None:
                self._changed.clear()
                now_s = loop.time()
                plan = self._core.start_step(now_s)
                if plan is None:
                    await self._wait_for_change(self._core.wake_s())
                    continue
                self._step_end_s = self._begin_s(now_s, plan.duration_s) + plan.duration_s
            await asyncio.sleep(self._step_end_s - loop.time())
            step = self._core.finish_step(loop.time())
            is_idle = not step.load.running + step.load.waiting
            self._previous_end_s = None if is_idle else self._step_end_s
            self._step_end_s = None
            step.block_events = self._core.take_block_events()
            return step
        raise EngineError("the engine was stopped")

    async def stop(self) -> None:
        """Make `step` raise."""
        self._stopped = True
        self._changed.set()

    def _begin_s(self, now_s: float, duration_s: float) -> float:
        """A step follows the one before without a gap; but this process was stopped if that one is
        late by a whole step, and then nothing is caught up."""
        previous_s = self._previous_end_s
        if previous_s is None or previous_s + duration_s <= now_s:
            return now_s
        return previous_s

    async def _wait_for_change(self, until_s: float | None) -> None:
        try:
            async with asyncio.timeout_at(until_s):
                await self._changed.wait()
        except TimeoutError:
            return


def _limits(spec: WorkerSpec) -> SimulatedLimits:
    """From vLLM's engine arguments; those that mean nothing without a model are ignored."""
    args = spec.engine_args
    return SimulatedLimits(
        engine_id=spec.worker_id,
        block_size_tokens=args.get("block_size", 16),
        kv_blocks=args.get("num_gpu_blocks_override", 4096),
        max_model_len_tokens=args.get("max_model_len", 8192),
        max_running_requests=args.get("max_num_seqs", 256),
        max_step_tokens=args.get("max_num_batched_tokens", 8192),
        kv_lease_s=spec.kv_lease_s,
    )


def _ready_response(limits: SimulatedLimits) -> ReadyResponse:
    capacity_tokens = limits.kv_blocks * limits.block_size_tokens
    return ReadyResponse(
        max_model_len=limits.max_model_len_tokens,
        num_gpu_blocks=limits.kv_blocks,
        block_size=limits.block_size_tokens,
        dp_stats_address=None,
        dtype="bfloat16",
        vllm_version="0.32.0",
        world_size=1,
        data_parallel_size=1,
        tensor_parallel_size=1,
        pipeline_parallel_size=1,
        decode_context_parallel_size=1,
        data_parallel_rank=0,
        max_num_seqs=limits.max_running_requests,
        max_num_batched_tokens=limits.max_step_tokens,
        instance_id=limits.engine_id,
        supports_lora=False,
        max_loras=0,
        kv_cache_size_tokens=capacity_tokens,
        kv_cache_max_concurrency=capacity_tokens / limits.max_model_len_tokens,
        effective_attention_block_size=limits.block_size_tokens,
    )
