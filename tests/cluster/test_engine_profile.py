"""Where the router's predictions start from, and what is said of a profile that is none."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from cluster import engine_profile
from cluster.config import Config
from engine.devices import GPUS
from engine.profiles import PROFILES
from engine.spec import PoolTimes, SimulatedTiming
from protos.errors import ConfigError

MINE = SimulatedTiming(step_base_s=0.5, prefill_pair_s=1e-9)
SMALL = {
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "vocab_size": 2048,
}


def times(
    tmp_path: Path,
    model: dict[str, Any] = SMALL,
    accelerators: Collection[str] = ("H100",),
    **values: Any,
) -> PoolTimes:
    (tmp_path / "config.json").write_text(json.dumps(model))
    return engine_profile.times(Config.model_validate(values), tmp_path, accelerators)


def timing(
    tmp_path: Path,
    model: dict[str, Any] = SMALL,
    accelerators: Collection[str] = ("H100",),
    **values: Any,
) -> SimulatedTiming:
    return times(tmp_path, model, accelerators, **values).decode.timing


def test_simulated_engines_times_are_known(tmp_path: Path) -> None:
    found = timing(tmp_path, engine="simulated", simulated={"step_base_s": 0.05})
    assert found == SimulatedTiming(step_base_s=0.05)


def test_a_built_in_profile_goes_before(tmp_path: Path) -> None:
    router = {"engine_profile": "llama-3.1-8b-h100"}
    found = timing(tmp_path, engine="simulated", router=router, engine_args={"block_size": 64})
    assert found == PROFILES["llama-3.1-8b-h100"].timing(64)


@pytest.mark.parametrize("name", ["mine.yaml", "mine.json"])
def test_a_file_of_ones_own(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text(json.dumps(asdict(MINE)))
    assert timing(tmp_path, router={"engine_profile": str(tmp_path / name)}) == MINE


def test_else_the_models_constants_tell(tmp_path: Path) -> None:
    small = timing(tmp_path)
    large = timing(tmp_path, model={**SMALL, "num_hidden_layers": 20})
    assert large.prefill_token_s > small.prefill_token_s > 0


def test_weights_that_engines_quantise_as_they_load_them(tmp_path: Path) -> None:
    plain = timing(tmp_path)
    loaded = timing(tmp_path, engine_args={"quantization": "fp8"})
    own = {"quantization_config": {"quant_method": "awq", "bits": 4}}
    stored = timing(tmp_path, {**SMALL, **own}, engine_args={"quantization": "awq"})
    assert plain.step_base_s > loaded.step_base_s > stored.step_base_s


def test_a_model_of_another_kind_is_taken_to_be_like_any(tmp_path: Path) -> None:
    found = timing(tmp_path, model={"num_experts_per_tok": 8}, engine_args={"block_size": 16})
    assert found == PROFILES["llama-3.1-8b-h100"].timing(16)


@pytest.fixture
def gpu_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_profile, "is_cpu_install", lambda: False)


@pytest.mark.usefixtures("gpu_install")
def test_gpus_have_their_own_constants(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    h100, h200, l4 = (timing(tmp_path, accelerators=[name]) for name in ("H100", "H200", "L4"))
    assert h100.prefill_token_s == h200.prefill_token_s < l4.prefill_token_s
    assert h200.step_base_s < h100.step_base_s < l4.step_base_s
    assert timing(tmp_path, accelerators=["H100", "L4", "no GPU of ours"]) == l4
    assert not caplog.records


@pytest.mark.usefixtures("gpu_install")
@pytest.mark.parametrize(
    ("accelerators", "named"), [([], "the engines' GPU"), (["RTX-PRO-6000"], "RTX-PRO-6000")]
)
def test_a_gpu_that_is_not_known(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, accelerators: list[str], named: str
) -> None:
    assert timing(tmp_path, accelerators=accelerators) == timing(tmp_path)
    (record,) = caplog.records
    assert f"How fast {named} is" in record.message
    assert "router.engine_profile" in record.message


@pytest.mark.parametrize(
    "reported",
    [
        "NVIDIA B200",
        "NVIDIA H200",
        "NVIDIA H100 80GB HBM3",
        "NVIDIA A100-SXM4-80GB",
        "NVIDIA L40S",
        "NVIDIA L4",
        "NVIDIA A10",
        "NVIDIA A10G",
    ],
)
def test_ray_calls_gpus_by_the_names_of_the_table(reported: str) -> None:
    from ray._private.accelerators.nvidia_gpu import NvidiaGPUAcceleratorManager

    assert NvidiaGPUAcceleratorManager._gpu_name_to_accelerator_type(reported) in GPUS


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "can't be read"),
        ("step_base_s: [", "can't be read"),
        ("step_base_s: 0.1", "must hold step_base_s, prefill_token_s"),
        (json.dumps({**asdict(MINE), "more": 1}), "must hold step_base_s"),
        (json.dumps({**asdict(MINE), "step_base_s": "slow"}), "must be seconds, 0 or more"),
        (json.dumps({**asdict(MINE), "step_base_s": -1}), "must be seconds, 0 or more"),
    ],
)
def test_a_file_that_is_none(tmp_path: Path, text: str | None, words: str) -> None:
    path = tmp_path / "mine.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=words):
        timing(tmp_path, router={"engine_profile": str(path)})


def test_the_nearest_name_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"did you mean 'llama-3\.1-8b-h100'"):
        timing(tmp_path, router={"engine_profile": "llama-3-8b-h100"})


def test_steps_compute_as_much_as_each_pools_engines_do(tmp_path: Path) -> None:
    found = times(
        tmp_path,
        engine_args={"max_num_batched_tokens": 2048},
        decode={"engine_args": {"max_num_batched_tokens": 512}},
    )
    assert found.prefill.max_step_tokens == 2048
    assert found.decode.max_step_tokens == 512


def test_pools_may_run_on_more_or_fewer_gpus(tmp_path: Path) -> None:
    one = times(tmp_path)
    four = times(tmp_path, prefill={"engine_args": {"tensor_parallel_size": 4}})
    assert one.prefill == one.decode == four.decode
    assert four.prefill.timing.prefill_token_s == one.prefill.timing.prefill_token_s / 4
    # A transfer is as fast as the slower of its ends.
    assert four.prefill.timing.transfer_block_s == one.prefill.timing.transfer_block_s


def test_a_pools_own_profile_goes_before(tmp_path: Path) -> None:
    found = times(
        tmp_path,
        router={"engine_profile": "llama-3.1-70b-h100x4"},
        prefill={"engine_profile": "llama-3.1-70b-h100x8"},
        engine_args={"block_size": 16},
    )
    own = PROFILES["llama-3.1-70b-h100x8"].timing(16)
    assert replace(found.prefill.timing, transfer_block_s=own.transfer_block_s) == own
    assert found.decode.timing == PROFILES["llama-3.1-70b-h100x4"].timing(16)


def test_a_pools_profile_that_is_none_is_told_by_its_setting() -> None:
    config = Config.model_validate({"decode": {"engine_profile": "llama-3-8b"}})
    with pytest.raises(ConfigError, match=r"decode\.engine_profile: there is no profile"):
        engine_profile.check(config)
