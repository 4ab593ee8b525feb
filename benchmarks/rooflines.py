"""Engines that nobody measured for us, by the costs of `engine.roofline`.

What share of their peaks the publications' engines reached is not known. Here all that is
computed, in prompts, attention and decodes, is at one share, which is the caller's assumption, and
all that is read at MEMORY_SHARE of the memory's bandwidth. Models are as large as they are called.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final, NamedTuple

from engine import roofline as costs
from engine.devices import GPUS, Device
from engine.profiles import EngineProfile
from engine.roofline import ModelSize, Shares

MEMORY_SHARE: Final = 0.7


class Gpu(NamedTuple):
    """Its link to other machines is as it was measured, or assumed."""

    device: Device
    memory_bytes: float


class Model(NamedTuple):
    """A dense transformer in 16 bits."""

    name: str
    size: ModelSize


A100: Final = Gpu(replace(GPUS["A100"], link_bytes_s=20e9), 80e9)
A800: Final = Gpu(replace(GPUS["A100"], link_bytes_s=87e9 / 8), 80e9)
"""Its link: 87 GB/s for a machine of eight and four ports of 200 Gbit/s, as Mooncake measured."""
A10: Final = Gpu(replace(GPUS["A10"], link_bytes_s=8e9), 24e9)
LLAMA_7B: Final = Model("LLaMA-7B", ModelSize(6.7e9, 2 * 6.7e9, 32, 32, 32, 128))
LLAMA_8B: Final = Model("Llama-3.1-8B", ModelSize(8.0e9, 2 * 8.0e9, 32, 32, 8, 128))
LLAMA_70B: Final = Model("Llama-3-70B", ModelSize(70.6e9, 2 * 70.6e9, 80, 64, 8, 128))


def roofline(
    model: Model, gpu: Gpu, gpus: int, compute_share: float, kv_tokens: int | None = None
) -> EngineProfile:
    """An engine of that model on so many of these."""
    shares = Shares(compute_share, compute_share, compute_share, MEMORY_SHARE, MEMORY_SHARE)
    timing = costs.roofline(model.size, gpu.device, gpus, block_tokens=1, shares=shares)
    return EngineProfile(
        model=model.name,
        gpus=gpus,
        kv_bytes_per_token=model.size.kv_bytes_per_token,
        weights_bytes=model.size.weights_bytes,
        step_base_s=timing.step_base_s,
        prefill_token_s=timing.prefill_token_s,
        prefill_pair_s=timing.prefill_pair_s,
        decode_request_s=timing.decode_request_s,
        decode_context_token_s=timing.decode_context_token_s,
        kv_tokens_reported=kv_tokens,
        gpu_memory_bytes=gpu.memory_bytes,
        link_bytes_s=gpu.device.link_bytes_s,
    )
