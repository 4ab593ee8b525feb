"""An engine's costs from constants of its model and its device, where nothing was measured. Pure.

A step's time is the greater of what it computes and what it reads (Williams, Waterman and Patterson
2009, the roofline model). Prompts are bound by computing: 2 operations for each parameter and token
(Kaplan et al. 2020, 2.1), and for each layer, and each pair of a token and one that it attends to,
4 x heads x head size (a product with keys and one with values). Decodes are bound by reading: the
weights once a step, and each request's KV state. Engines reach a share of either, named below; the
shares were chosen for `engine.profiles`, and the test holds each cost to within 1.5 times of those.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from engine.spec import SimulatedTiming

_BYTES: Final = 2
"""Of a weight or a number in the KV cache: bfloat16."""
PREFILL_SHARE: Final = 0.65
"""Of the device's operations, in products with weights."""
ATTENTION_SHARE: Final = 0.47
WEIGHTS_SHARE: Final = 0.7
"""Of the memory's bandwidth, over all small reads of a step."""
KV_SHARE: Final = 0.9
LINK_SHARE: Final = 0.8


@dataclass(frozen=True, slots=True)
class Device:
    """What a model runs on, by its data sheet."""

    operations_s: float
    """Dense, bfloat16."""
    memory_bytes_s: float
    link_bytes_s: float
    step_overhead_s: float = 0.0
    """What a step takes beside its work."""


H100: Final = Device(operations_s=989e12, memory_bytes_s=3.35e12, link_bytes_s=50e9)
"""NVIDIA's data sheet of the H100 SXM; a port of InfiniBand NDR."""
CPU: Final = Device(
    operations_s=100e9, memory_bytes_s=10e9, link_bytes_s=1e9, step_overhead_s=0.005
)
"""A guess at a few cores, beside others; PyTorch's calls are most of a small model's step."""


@dataclass(frozen=True, slots=True)
class ModelSize:
    """A dense transformer with grouped-query attention and a gated feed-forward layer."""

    layers: int
    hidden: int
    feed_forward: int
    heads: int
    kv_heads: int
    head_size: int
    vocabulary: int
    tied: bool
    """The output layer is the embedding."""

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> ModelSize | None:
        """From a checkpoint's config.json, as transformers writes it; None of another kind."""
        text = config.get("text_config", config)
        if text.get("num_experts_per_tok") or text.get("kv_lora_rank"):
            return None
        try:
            heads = int(text["num_attention_heads"])
            return cls(
                layers=int(text["num_hidden_layers"]),
                hidden=int(text["hidden_size"]),
                feed_forward=int(text["intermediate_size"]),
                heads=heads,
                kv_heads=int(text.get("num_key_value_heads") or heads),
                head_size=int(text.get("head_dim") or text["hidden_size"] // heads),
                vocabulary=int(text["vocab_size"]),
                tied=bool(text.get("tie_word_embeddings", False)),
            )
        except (KeyError, TypeError, ValueError):
            return None

    @property
    def parameters(self) -> int:
        """Weights that each token meets; the embedding is looked up, not multiplied."""
        attention = self.hidden * self.head_size * 2 * (self.heads + self.kv_heads)
        layer = attention + 3 * self.hidden * self.feed_forward
        return self.layers * layer + self.vocabulary * self.hidden

    @property
    def kv_bytes_per_token(self) -> int:
        """Keys and values of all layers."""
        return 2 * self.layers * self.kv_heads * self.head_size * _BYTES


def roofline(model: ModelSize, device: Device, devices: int, block_tokens: int) -> SimulatedTiming:
    """Costs of an engine on so many devices, among which its work is split evenly."""
    operations_s = devices * device.operations_s
    memory_bytes_s = devices * device.memory_bytes_s
    pair_operations = 4 * model.layers * model.heads * model.head_size
    block_bytes = block_tokens * model.kv_bytes_per_token
    return SimulatedTiming(
        step_base_s=device.step_overhead_s
        + _BYTES * model.parameters / (WEIGHTS_SHARE * memory_bytes_s),
        prefill_token_s=2 * model.parameters / (PREFILL_SHARE * operations_s),
        prefill_pair_s=pair_operations / (ATTENTION_SHARE * operations_s),
        # Computed while weights are read, so that the overlap makes up for what is lost.
        decode_request_s=2 * model.parameters / operations_s,
        decode_context_token_s=model.kv_bytes_per_token / (KV_SHARE * memory_bytes_s),
        transfer_block_s=block_bytes / (LINK_SHARE * devices * device.link_bytes_s),
    )
