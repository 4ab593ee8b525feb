"""The configuration: what goes before what, and what its errors say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cluster import config
from cluster.config_reference import reference
from cluster.engine_arguments import vllm_arguments
from protos.errors import ConfigError

_DOCUMENT = Path(__file__).parents[2] / "docs" / "configuration.md"


def load(
    tmp_path: Path, text: str = "", environment: dict[str, str] | None = None, **flags: Any
) -> config.Config:
    path = tmp_path / "baton.yaml"
    path.write_text(text)
    return config.load(path, environment or {}, {k.replace("__", "."): v for k, v in flags.items()})


def problem(tmp_path: Path, text: str, environment: dict[str, str] | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text, environment)
    return str(caught.value)


def test_everything_has_a_default() -> None:
    found = config.load(None, {}, {})
    assert (found.http.host, found.http.port, found.engine) == ("127.0.0.1", 8000, "vllm")
    assert (found.grpc.host, found.grpc.port) == ("127.0.0.1", 8001)
    assert (found.prefill.replicas, found.decode.replicas) == (1, 1)


def test_flags_go_before_the_environment_before_the_file(tmp_path: Path) -> None:
    text = "http: {port: 1001, host: 127.0.0.2}\ndecode: {replicas: 2}\n"
    environment = {"BATON_HTTP__PORT": "1002", "BATON_DECODE__REPLICAS": "3", "HOME": "/x"}
    found = load(tmp_path, text, environment, http__port=1003, http__host=None)
    assert (found.http.port, found.http.host, found.decode.replicas) == (1003, "127.0.0.2", 3)


def test_the_environment_reaches_engine_arguments_and_variables(tmp_path: Path) -> None:
    environment = {
        "BATON_ENGINE_ARGS__MAX_MODEL_LEN": "4096",
        "BATON_DECODE__ENGINE_ARGS__MAX_NUM_SEQS": "8",
        "BATON_DECODE__ENVIRONMENT__OMP_NUM_THREADS": "1",
        "BATON_INSTANCE": "not a setting",
    }
    found = load(tmp_path, "", environment)
    assert found.engine_args_of("decode") == {"max_model_len": 4096, "max_num_seqs": 8}
    assert found.engine_args_of("prefill") == {"max_model_len": 4096}
    assert found.decode.environment == {"OMP_NUM_THREADS": "1"}


def test_a_pools_arguments_go_before_the_common_ones(tmp_path: Path) -> None:
    text = "engine_args: {max_num_seqs: 4, seed: 1}\nprefill: {engine_args: {max_num_seqs: 2}}\n"
    assert load(tmp_path, text).engine_args_of("prefill") == {"max_num_seqs": 2, "seed": 1}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("http: {prot: 1}", "unknown key http.prot: did you mean http.port?"),
        ("port: 1", "unknown key port: did you mean http.port?"),
        ("prefil: {replicas: 1}", "unknown key prefil: did you mean prefill?"),
        ("router: {lease_s: 3}", "unknown key router.lease_s: did you mean kv.lease_s?"),
        ("xyzzy: 3", "unknown key xyzzy: see docs/configuration.md."),
        ("http: {port: many}", "http.port must be a whole number, not 'many'."),
        ("http: {port: '80'}", "http.port must be a whole number, not '80'."),
        ("http: {port: 70000}", "http.port must be less than or equal to 65535, not 70000."),
        ("engine: vlm", "engine must be 'vllm' or 'simulated', not 'vlm'."),
        ("decode: {replicas: 0}", "decode.replicas must be greater than or equal to 1, not 0."),
        ("model: {path: ''}", "model.path must have at least 1 character, not ''."),
        ("grpc: {port: 0}", "grpc.port must be greater than or equal to 1, not 0."),
        ("http: 3", "http must be keys and values, not 3."),
        ("decode: {replicas: true}", "decode.replicas must be a whole number, not True."),
    ],
)
def test_problems_name_the_key_and_what_is_right(tmp_path: Path, text: str, message: str) -> None:
    assert problem(tmp_path, text) == message


def test_http_and_grpc_need_ports_of_their_own(tmp_path: Path) -> None:
    message = problem(tmp_path, "http: {port: 8001}")
    assert message == "http.port and grpc.port are both 8001: change one."
    assert load(tmp_path, "http: {port: 8001}\ngrpc: {port: null}").grpc.port is None


def test_each_problem_has_a_line(tmp_path: Path) -> None:
    assert len(problem(tmp_path, "http: {prot: 1}\nkv: {lease_s: no}").splitlines()) == 2


def test_files_that_are_none(tmp_path: Path) -> None:
    assert "is no YAML" in problem(tmp_path, "http: [")
    assert "must hold keys and values" in problem(tmp_path, "- http")
    with pytest.raises(ConfigError, match=r"gone.yaml can't be read"):
        config.load(tmp_path / "gone.yaml", {}, {})


def test_unknown_variables_are_errors(tmp_path: Path) -> None:
    message = problem(tmp_path, "", {"BATON_HTPP__PORT": "1"})
    assert message == "unknown key htpp: did you mean http?"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            "max_model_lenn: 5",
            "unknown engine argument decode.engine_args.max_model_lenn: "
            "did you mean decode.engine_args.max_model_len?",
        ),
        ("model: x", "decode.engine_args.model can't be set: set model.path."),
        ("scheduler_cls: x", "can't be set"),
        ("kv_transfer_config: {}", "can't be set"),
        ("max_num_seqs: many", "must be a whole number or null, not 'many'."),
        ("max_num_seqs: true", "must be a whole number or null, not True."),
        ("enforce_eager: 1", "must be true or false, not 1."),
    ],
)
def test_engine_arguments_are_checked(tmp_path: Path, arguments: str, message: str) -> None:
    assert message in problem(tmp_path, f"decode: {{engine_args: {{{arguments}}}}}")


def test_arguments_that_people_need_are_passed_on(tmp_path: Path) -> None:
    text = """
engine_args:
  quantization: fp8
  tensor_parallel_size: 2
  max_model_len: 4096
  gpu_memory_utilization: 0.9
  speculative_config: {method: ngram, num_speculative_tokens: 3}
"""
    assert load(tmp_path, text).engine_args["tensor_parallel_size"] == 2


def test_the_simulated_engine_takes_its_own(tmp_path: Path) -> None:
    text = "engine: simulated\nengine_args: {block_size: 16}"
    assert load(tmp_path, text).engine_args == {"block_size": 16}
    message = problem(tmp_path, "engine: simulated\nengine_args: {quantization: fp8}")
    assert "the simulated engine takes block_size" in message


def test_vllms_arguments_are_read_without_importing_it() -> None:
    assert vllm_arguments()["max_num_seqs"] == "int | None"
    assert len(vllm_arguments()) > 100


def test_every_key_is_documented_and_the_page_is_up_to_date() -> None:
    page = reference()
    for key in config.valid_keys():
        assert f"`{key}`" in page or f"## {key}\n" in page
    assert _DOCUMENT.read_text(encoding="utf-8") == page, (
        "run `baton config --reference > docs/configuration.md`"
    )


def test_who_predicts_nothing_can_promise_nothing(tmp_path: Path) -> None:
    text = "router: {policy: least_predicted_work, ttft_slo_ms: 1000}"
    with pytest.raises(ConfigError, match="predicts no times, so nothing can be promised"):
        load(tmp_path, text)
