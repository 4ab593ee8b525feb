"""An engine's costs from constants of its model and its device, where nothing was measured. Pure.

A step's time is the greater of what it computes and what it reads (Williams, Waterman and Patterson
2009, the roofline model). Prompts are bound by computing: 2 operations for each parameter and token
(Kaplan et al. 2020, 2.1), and for each layer, and each pair of a token and one that it attends to,
4 x heads x head size (a product with keys and one with values). Decodes are bound by reading: the
weights once a step, and each request's KV state. Engines reach a share of either; the default ones
were chosen for `engine.profiles`, and the test holds each cost to within 1.5 times of those.

Quantised weights are read as they are, and multiplied as if they had 16 bits: those of 4 bits have
by then, and engines with weights in fp8 were measured nearer to that than to twice the operations.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from engine.devices import Device
from engine.quantization import PLAIN_BITS, weight_bits
from engine.spec import SimulatedTiming

_BYTES: Final = 2
"""Of a number in the KV cache: bfloat16."""


@dataclass(frozen=True, slots=True)
class Shares:
    """What an engine reaches of its devices' peaks."""

    prefill: float = 0.65
    """Of the operations, in products of prompts with weights."""
    attention: float = 0.47
    decode: float = 1.0
    """Computed while weights are read, so that the overlap makes up for what is lost."""
    weights: float = 0.7
    """Of the memory's bandwidth, over all small reads of a step."""
    kv: float = 0.9
    link: float = 0.8


SHARES: Final = Shares()


@dataclass(frozen=True, slots=True)
class ModelSize:
    """A dense transformer with grouped-query attention and a gated feed-forward layer."""

    parameters: float
    """Weights that each token meets; the embedding is looked up, not multiplied."""
    weights_bytes: float
    """Of these."""
    layers: int
    heads: int
    kv_heads: int
    head_size: int

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> ModelSize | None:
        """From a checkpoint's config.json, as transformers writes it; None of another kind."""
        text = config.get("text_config", config)
        if text.get("num_experts_per_tok") or text.get("kv_lora_rank"):
            return None
        try:
            layers, hidden = int(text["num_hidden_layers"]), int(text["hidden_size"])
            heads = int(text["num_attention_heads"])
            kv_heads = int(text.get("num_key_value_heads") or heads)
            head_size = int(text.get("head_dim") or hidden // heads)
            attention = hidden * head_size * 2 * (heads + kv_heads)
            layer = attention + 3 * hidden * int(text["intermediate_size"])
            # The output layer, which quantisation leaves as it is.
            output = int(text["vocab_size"]) * hidden
            bits = weight_bits(config.get("quantization_config") or {})
        except (KeyError, TypeError, ValueError):
            return None
        parameters = layers * layer + output
        weights_bytes = (layers * layer * bits + output * PLAIN_BITS) / 8
        return cls(parameters, weights_bytes, layers, heads, kv_heads, head_size)

    @property
    def kv_bytes_per_token(self) -> int:
        """Keys and values of all layers."""
        return 2 * self.layers * self.kv_heads * self.head_size * _BYTES


def roofline(
    model: ModelSize, device: Device, devices: int, block_tokens: int, shares: Shares = SHARES
) -> SimulatedTiming:
    """Costs of an engine on so many devices, among which its work is split evenly."""
    operations_s = devices * device.operations_s
    memory_bytes_s = devices * device.memory_bytes_s
    pair_operations = 4 * model.layers * model.heads * model.head_size
    block_bytes = block_tokens * model.kv_bytes_per_token
    return SimulatedTiming(
        step_base_s=device.step_overhead_s
        + model.weights_bytes / (shares.weights * memory_bytes_s),
        prefill_token_s=2 * model.parameters / (shares.prefill * operations_s),
        prefill_pair_s=pair_operations / (shares.attention * operations_s),
        decode_request_s=2 * model.parameters / (shares.decode * operations_s),
        decode_context_token_s=model.kv_bytes_per_token / (shares.kv * memory_bytes_s),
        transfer_block_s=block_bytes / (shares.link * devices * device.link_bytes_s),
    )
