"""Bits of weights, by configs as checkpoints carry them."""

from __future__ import annotations

from typing import Any

import pytest

from engine.quantization import weight_bits
from engine.roofline import ModelSize

ONE_LAYER = {
    "num_hidden_layers": 1,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 1,
    "vocab_size": 1000,
}


@pytest.mark.parametrize(
    ("quantization", "bits"),
    [
        ({}, 16),
        ({"quant_method": None}, 16),
        ({"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}, 8),
        ({"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}, 8),
        ({"quant_method": "awq", "bits": 4, "group_size": 128}, 4),
        ({"quant_method": "awq", "w_bit": 4, "q_group_size": 128}, 4),
        ({"quant_method": "gptq", "bits": 8}, 8),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, 4),
        ({"quant_method": "modelopt", "quant_algo": "FP8"}, 8),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False}, 4),
        ({"quant_method": "bitsandbytes", "load_in_4bit": False, "load_in_8bit": True}, 8),
        ({"quant_method": "int8_per_channel_weight_only"}, 8),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {
                    "group_0": {"weights": {"num_bits": 4, "type": "int"}},
                    "group_1": {"weights": {"num_bits": 8, "type": "float"}},
                },
            },
            8,
        ),
        ({"quant_method": "a new one"}, 16),
    ],
)
def test_bits_are_those_that_the_config_names(quantization: dict[str, Any], bits: int) -> None:
    assert weight_bits(quantization) == bits


def test_the_output_layer_is_not_quantised() -> None:
    output = 1000 * 64
    plain, quantised = (
        ModelSize.read({**ONE_LAYER, "quantization_config": each})
        for each in (None, {"quant_method": "awq", "bits": 4})
    )
    assert plain is not None
    assert quantised is not None
    assert plain.weights_bytes == 2 * plain.parameters
    assert quantised.parameters == plain.parameters
    assert quantised.weights_bytes == (plain.parameters - output) / 2 + 2 * output
