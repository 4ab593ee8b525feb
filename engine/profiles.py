"""Engines on GPUs, as the engine model's costs: for simulated clusters, and for first predictions.

Costs are least-squares fits, relative, of `engine.latency_model` to summed kernel times on H100 SXM
(SHARED/perf/h100_sxm_step_times_derived.csv; `python -m benchmarks.engine_profiles` makes them
again). Prefill costs are 1.2 times the fit, since such sums leave out 10 to 30 %. KV bytes per
token are 2 x layers x KV heads x head size x 2 bytes. What Qwen3-32B's cache holds is llm-d's
report of its pods (SHARED/perf/published_results.csv); its step's base, 13.9 ms by the fit, is what
their 11 ms between tokens at 3 requests/s leave (SHARED/perf/llm-d_prefix_routing_by_qps.csv).

Llama-3.3-70B-FP8 is fitted to sweeps of whole vLLM engines (benchmarks/results/engine-model.md), so
its prefill stands as it is. Profiles of one `model` are its degrees of tensor parallelism: those
that were measured and whose weights leave room for KV, which Llama-3.1-70B's on 2 GPUs do not.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

from engine.spec import SimulatedTiming

_H100_BYTES: Final = 80e9
_MEMORY_SHARE: Final = 0.92
"""vLLM's gpu_memory_utilization."""
_ACTIVATION_BYTES: Final = 3e9
"""A GPU's, beside weights and KV: what vLLM's profiling run leaves out of the KV cache."""
_LINK_BYTES_S: Final = 40e9
"""A GPU's InfiniBand NDR port, 50 GB/s per direction, at 80 %."""


@dataclass(frozen=True, slots=True)
class EngineProfile:
    """One engine: a model on its GPUs."""

    model: str
    gpus: int
    """That one engine runs on."""
    kv_bytes_per_token: int
    weights_bytes: float
    step_base_s: float
    prefill_token_s: float
    prefill_pair_s: float
    decode_request_s: float
    decode_context_token_s: float
    max_step_tokens: int = 8192
    max_running_requests: int = 1024
    """Both vLLM's for servers of 70 GiB and more."""
    max_model_len_tokens: int = 131_072
    kv_tokens_reported: int | None = None
    """What its KV cache holds, where that is known better than it can be computed."""
    gpu_memory_bytes: float = _H100_BYTES
    link_bytes_s: float = _LINK_BYTES_S
    """A GPU's part of what reaches other engines."""
    transfer_base_s: float = 0.0
    """What each transfer takes beside its bytes."""

    @property
    def kv_tokens(self) -> int:
        """What its KV cache holds."""
        if self.kv_tokens_reported is not None:
            return self.kv_tokens_reported
        memory = self.gpus * (self.gpu_memory_bytes * _MEMORY_SHARE - _ACTIVATION_BYTES)
        return int((memory - self.weights_bytes) / self.kv_bytes_per_token)

    def timing(self, block_tokens: int) -> SimulatedTiming:
        """Its costs, with blocks of this size."""
        block_bytes = block_tokens * self.kv_bytes_per_token
        return SimulatedTiming(
            step_base_s=self.step_base_s,
            prefill_token_s=self.prefill_token_s,
            prefill_pair_s=self.prefill_pair_s,
            decode_request_s=self.decode_request_s,
            decode_context_token_s=self.decode_context_token_s,
            transfer_block_s=block_bytes / (self.gpus * self.link_bytes_s),
            transfer_base_s=self.transfer_base_s,
        )

    def slower(self, factor: float) -> EngineProfile:
        """One whose steps and transfers take so many times as long."""
        return replace(
            self,
            step_base_s=factor * self.step_base_s,
            prefill_token_s=factor * self.prefill_token_s,
            prefill_pair_s=factor * self.prefill_pair_s,
            decode_request_s=factor * self.decode_request_s,
            decode_context_token_s=factor * self.decode_context_token_s,
            link_bytes_s=self.link_bytes_s / factor,
            transfer_base_s=factor * self.transfer_base_s,
        )


PROFILES: Final[dict[str, EngineProfile]] = {
    "llama-3.1-8b-h100": EngineProfile(
        model="Llama-3.1-8B",
        gpus=1,
        kv_bytes_per_token=131_072,
        weights_bytes=16.1e9,
        step_base_s=6.37e-3,
        prefill_token_s=19.4e-6,
        prefill_pair_s=1.13e-9,
        decode_request_s=12.8e-6,
        decode_context_token_s=42.8e-9,
    ),
    "qwen3-32b-h100x2": EngineProfile(
        model="Qwen3-32B",
        gpus=2,
        kv_bytes_per_token=262_144,
        weights_bytes=65.5e9,
        step_base_s=10.0e-3,
        prefill_token_s=49.5e-6,
        prefill_pair_s=2.37e-9,
        decode_request_s=26.7e-6,
        decode_context_token_s=44.2e-9,
        kv_tokens_reported=307_328,
    ),
    "llama-3.1-70b-h100x4": EngineProfile(
        model="Llama-3.1-70B",
        gpus=4,
        kv_bytes_per_token=327_680,
        weights_bytes=141e9,
        step_base_s=16.2e-3,
        prefill_token_s=66.0e-6,
        prefill_pair_s=1.35e-9,
        decode_request_s=27.0e-6,
        decode_context_token_s=27.3e-9,
    ),
    "llama-3.1-70b-h100x8": EngineProfile(
        model="Llama-3.1-70B",
        gpus=8,
        kv_bytes_per_token=327_680,
        weights_bytes=141e9,
        step_base_s=10.5e-3,
        prefill_token_s=43.6e-6,
        prefill_pair_s=0.615e-9,
        decode_request_s=25.9e-6,
        decode_context_token_s=13.7e-9,
    ),
    "llama-3.3-70b-fp8-h100x2": EngineProfile(
        model="Llama-3.3-70B-FP8",
        gpus=2,
        kv_bytes_per_token=327_680,
        weights_bytes=72.7e9,
        step_base_s=17.01e-3,
        prefill_token_s=79.2e-6,
        prefill_pair_s=4.77e-9,
        decode_request_s=93.9e-6,
        decode_context_token_s=59.8e-9,
    ),
    "llama-3.3-70b-fp8-h100x4": EngineProfile(
        model="Llama-3.3-70B-FP8",
        gpus=4,
        kv_bytes_per_token=327_680,
        weights_bytes=72.7e9,
        step_base_s=12.50e-3,
        prefill_token_s=47.2e-6,
        prefill_pair_s=2.50e-9,
        decode_request_s=70.9e-6,
        decode_context_token_s=30.6e-9,
    ),
    "llama-3.3-70b-fp8-h100x8": EngineProfile(
        model="Llama-3.3-70B-FP8",
        gpus=8,
        kv_bytes_per_token=327_680,
        weights_bytes=72.7e9,
        step_base_s=9.80e-3,
        prefill_token_s=33.6e-6,
        prefill_pair_s=0.91e-9,
        decode_request_s=55.8e-6,
        decode_context_token_s=20.8e-9,
    ),
}
