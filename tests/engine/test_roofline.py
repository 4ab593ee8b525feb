"""The roofline against what was measured."""

from __future__ import annotations

from dataclasses import asdict

import pytest

from engine.devices import CPU, H100
from engine.profiles import PROFILES
from engine.roofline import ModelSize, roofline

BLOCK_TOKENS = 16


def config(layers: int, hidden: int, feed_forward: int, heads: int, vocabulary: int) -> object:
    return {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": feed_forward,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": vocabulary,
    }


CONFIGS = {
    "llama-3.1-8b-h100": (config(32, 4096, 14_336, 32, 128_256), 8.03e9 - 128_256 * 4096),
    "qwen3-32b-h100x2": (config(64, 5120, 25_600, 64, 151_936), 32.76e9 - 151_936 * 5120),
    "llama-3.1-70b-h100x4": (config(80, 8192, 28_672, 64, 128_256), 70.55e9 - 128_256 * 8192),
}
"""Of their checkpoints, and the weights that their cards tell, without the embedding."""


@pytest.mark.parametrize("name", CONFIGS)
def test_it_is_near_what_was_measured(name: str) -> None:
    """Every cost within 1.5 times; a step of each kind within 1.35."""
    values, parameters = CONFIGS[name]
    model = ModelSize.read(values)  # type: ignore[arg-type]
    assert model is not None
    assert model.parameters == pytest.approx(parameters, rel=0.01)
    profile = PROFILES[name]
    assert model.kv_bytes_per_token == profile.kv_bytes_per_token
    guess = asdict(roofline(model, H100, profile.gpus, BLOCK_TOKENS))
    measured = asdict(profile.timing(BLOCK_TOKENS))
    assert guess.pop("transfer_base_s") == measured.pop("transfer_base_s") == 0
    factors = {cost: guess[cost] / measured[cost] for cost in guess}
    print(name, {cost: round(factor, 2) for cost, factor in factors.items()})
    for cost, factor in factors.items():
        assert 1 / 1.5 < factor < 1.5, cost
    for tokens, pairs, requests, context in ((8192, 8192**2 / 2, 0, 0), (0, 0, 64, 64 * 2000)):
        guessed_s, measured_s = (
            each["step_base_s"] + tokens * each["prefill_token_s"] + pairs * each["prefill_pair_s"]
            + requests * each["decode_request_s"] + context * each["decode_context_token_s"]
            for each in (guess, measured)
        )  # fmt: skip
        assert 1 / 1.35 < guessed_s / measured_s < 1.35


def test_quantised_weights_are_read_as_they_are() -> None:
    """With 16 bits a step's base would be 1.7 times what was measured of two H100s."""
    values, _ = CONFIGS["llama-3.1-70b-h100x4"]
    assert isinstance(values, dict)
    model = ModelSize.read(values | {"quantization_config": {"quant_method": "fp8"}})
    plain = ModelSize.read(values)
    assert model is not None
    assert plain is not None
    guess, unquantised = (roofline(each, H100, 2, BLOCK_TOKENS) for each in (model, plain))
    measured = PROFILES["llama-3.3-70b-fp8-h100x2"].timing(BLOCK_TOKENS)
    assert guess.step_base_s == pytest.approx(measured.step_base_s, rel=0.15)
    assert unquantised.step_base_s > 1.5 * measured.step_base_s
    assert guess.prefill_token_s == unquantised.prefill_token_s


def test_cpus_are_slower() -> None:
    model = ModelSize.read(CONFIGS["llama-3.1-8b-h100"][0])  # type: ignore[arg-type]
    assert model is not None
    cpu, gpu = (asdict(roofline(model, each, 1, BLOCK_TOKENS)) for each in (CPU, H100))
    assert all(cpu[cost] > gpu[cost] for cost in gpu if cost != "transfer_base_s")


@pytest.mark.parametrize(
    "values", [{}, {"num_hidden_layers": 2}, {"num_experts_per_tok": 8}, {"kv_lora_rank": 512}]
)
def test_models_of_other_kinds_are_not_guessed(values: dict[str, int]) -> None:
    assert ModelSize.read(values) is None
