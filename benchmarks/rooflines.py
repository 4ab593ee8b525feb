"""Engines that nobody measured for us, from their GPUs' data sheets.

A prompt's token costs two operations a parameter and a pair of tokens four operations a layer and
hidden unit (FAST'25 Mooncake, equation 1, causal), at a share of the peak that is the caller's
assumption. A step reads all weights once, and the context of what decodes, at MEMORY_SHARE of the
memory's bandwidth. A token that decodes is computed as a prompt's is.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from engine.profiles import EngineProfile

MEMORY_SHARE: Final = 0.7
_CACHE_SHARE: Final = 0.92
_ACTIVATION_BYTES: Final = 3e9


class Gpu(NamedTuple):
    """Of one, by its data sheet."""

    flops: float
    """Dense, of 16 bits."""
    memory_bytes: float
    memory_bytes_s: float
    link_bytes_s: float
    """To other machines."""


class Model(NamedTuple):
    """A dense transformer in 16 bits."""

    name: str
    parameters: float
    layers: int
    hidden: int
    kv_heads: int
    head_size: int

    @property
    def kv_bytes_per_token(self) -> int:
        return 2 * self.layers * self.kv_heads * self.head_size * 2


A100: Final = Gpu(312e12, 80e9, 2.04e12, 20e9)
A800: Final = Gpu(312e12, 80e9, 2.04e12, 87e9 / 8)
"""Its link: 87 GB/s for a machine of eight and four ports of 200 Gbit/s, as Mooncake measured."""
A10: Final = Gpu(125e12, 24e9, 0.6e12, 8e9)
LLAMA_7B: Final = Model("LLaMA-7B", 6.7e9, 32, 4096, 32, 128)
LLAMA_8B: Final = Model("Llama-3.1-8B", 8.0e9, 32, 4096, 8, 128)
LLAMA_70B: Final = Model("Llama-3-70B", 70.6e9, 80, 8192, 8, 128)


def roofline(
    model: Model, gpu: Gpu, gpus: int, compute_share: float, kv_tokens: int | None = None
) -> EngineProfile:
    """An engine of that model on so many of these."""
    operations_s = gpus * gpu.flops * compute_share
    bytes_s = gpus * gpu.memory_bytes_s * MEMORY_SHARE
    weights_bytes = 2 * model.parameters
    if kv_tokens is None:
        free = gpus * (gpu.memory_bytes * _CACHE_SHARE - _ACTIVATION_BYTES) - weights_bytes
        kv_tokens = int(free / model.kv_bytes_per_token)
    return EngineProfile(
        model=model.name,
        gpus=gpus,
        kv_bytes_per_token=model.kv_bytes_per_token,
        weights_bytes=weights_bytes,
        step_base_s=weights_bytes / bytes_s,
        prefill_token_s=2 * model.parameters / operations_s,
        prefill_pair_s=4 * model.layers * model.hidden / operations_s,
        decode_request_s=2 * model.parameters / operations_s,
        decode_context_token_s=model.kv_bytes_per_token / bytes_s,
        kv_tokens_reported=kv_tokens,
        link_bytes_s=gpu.link_bytes_s,
    )
