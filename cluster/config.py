"""The configuration: one YAML file, environment overrides on top, command line flags above both.

Boundary: values and their validation. Nothing is started, loaded or downloaded here; messages name
the key, what is wrong with it and what would be right.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cluster.engine_arguments import check_engine_args
from engine.spec import EngineKind, Role, SimulatedTiming
from protos.errors import ConfigError
from router.settings import SharePrefixes

ENVIRONMENT_PREFIX = "BATON_"
INSTANCE_VARIABLE = "BATON_INSTANCE"
"""Marks the processes of one `baton serve`; not a setting."""

Port = Annotated[int, Field(ge=1, le=65535)]
Seconds = Annotated[float, Field(ge=0, le=3600)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class ModelSection(_Section):
    """Which model is served."""

    path: str | None = Field(
        default=None,
        min_length=1,
        description="Directory of a checkpoint, or its id on the Hugging Face hub. Without one, a "
        "tiny model is built to try it with; its text is no good.",
    )
    served_names: list[Annotated[str, Field(min_length=1)]] = Field(
        default=[],
        description="Names under which clients ask for it. Without any: the hub id, or the last "
        "part of the directory.",
    )
    tool_call_parser: str | None = Field(
        default=None,
        description="vLLM's parser for tool calls, e.g. `hermes`, which the tiny model gets; "
        "without one, no tools.",
    )
    reasoning_parser: str | None = Field(
        default=None, description="vLLM's parser for reasoning, e.g. `qwen3`."
    )


class HttpSection(_Section):
    """Where clients connect."""

    host: str = Field(
        default="127.0.0.1",
        min_length=1,
        description="Address to listen on; `0.0.0.0` for every one.",
    )
    port: Port = Field(default=8000, description="Port to listen on.")
    max_body_bytes: int = Field(
        default=32 * 1024 * 1024,
        ge=1024,
        description="A request whose body is larger gets status 413.",
    )


class GrpcSection(_Section):
    """Where clients of the gRPC API connect; docs/grpc.md describes it."""

    host: str = Field(
        default="127.0.0.1",
        min_length=1,
        description="Address to listen on; `0.0.0.0` for every one.",
    )
    port: Port | None = Field(
        default=8001, description="Port to listen on; `null`: there is no gRPC API."
    )


class _Pool(_Section):
    engine_args: dict[str, Any] = Field(
        default={},
        description="Engine arguments of this pool alone; they go before the common ones.",
    )
    environment: dict[str, str] = Field(
        default={}, description="Environment variables of this pool's engine processes."
    )
    engine_profile: str | None = Field(
        default=None,
        min_length=1,
        description="Step times of this pool's engines, where the pools' are not alike; it goes "
        "before `router.engine_profile`.",
    )


class PrefillSection(_Pool):
    """The workers that process prompts."""

    replicas: int = Field(
        default=1, ge=0, le=256, description="Number of workers; 0: decode workers do it all."
    )


class DecodeSection(_Pool):
    """The workers that generate tokens."""

    replicas: int = Field(default=1, ge=1, le=256, description="Number of workers.")


class RouterSection(_Section):
    """Where requests go."""

    policy: Literal["joint", "least_predicted_work"] = Field(
        default="joint",
        description="`joint` predicts times, and splits a request over a prefill and a decode "
        "worker where that costs less of both targets below; `least_predicted_work` splits by the "
        "prompt's length alone, predicts nothing and refuses nothing.",
    )
    ttft_slo_ms: float | None = Field(
        default=None,
        ge=1,
        description="Milliseconds within which a first token is promised: a request whose own "
        "would come later is refused with status 429, and `joint` weighs by it. Without one "
        "only a request that asks for it itself is promised a time, and `joint` weighs by 2000. "
        "docs/admission.md tells more.",
    )
    tpot_slo_ms: float | None = Field(
        default=None,
        ge=0.1,
        description="Milliseconds between later tokens that are promised at most; likewise. "
        "Without one `joint` weighs by 50.",
    )
    engine_profile: str | None = Field(
        default=None,
        min_length=1,
        description="Step times that `joint` starts from: a built-in profile, e.g. "
        "`llama-3.1-8b-h100`, or a YAML or JSON file with all keys of `simulated`, by their names "
        "alone. Without one, they follow from the model's constants and those of the GPU that Ray "
        "reports (of several, the slowest; one that is not known counts as an H100), and simulated "
        "engines' are known. What engines do corrects them.",
    )
    local_prefill_max_tokens: int = Field(
        default=32,
        ge=0,
        description="For `least_predicted_work`: prompts of at most this many tokens are computed "
        "on the decode worker, since moving their state would take longer.",
    )
    max_requests: int = Field(
        default=10_000,
        ge=1,
        description="So many requests under way per router, further ones get status 429.",
    )
    record_events: str | None = Field(
        default=None,
        min_length=1,
        description="Directory in which each router process records what it is told and what it "
        "decides, for `baton replay`: up to 1 GiB each, clients' prompts and outputs included "
        "(docs/explain.md). Without one nothing is recorded.",
    )


class KvSection(_Section):
    """State that moves between workers."""

    lease_s: float = Field(
        default=30.0,
        ge=1,
        le=3600,
        description="Seconds for which the blocks of a processed prompt are kept for the worker "
        "that goes on with it.",
    )
    share_prefixes: SharePrefixes = Field(
        default="cluster",
        description="Who may be served from a prompt's cached state. `cluster`: every client, as "
        "in vLLM; one with secrets gives a `cache_salt`. `tenant`: who shows the same API key, so "
        "that nobody can tell by the time to first token what others have asked.",
    )


class RaySection(_Section):
    """The Ray cluster below."""

    address: str | None = Field(
        default=None,
        min_length=1,
        description="HOST:PORT of a running Ray cluster to use, whose token is in RAY_AUTH_TOKEN. "
        "Without one, a cluster of its own is started, closed to others and ended with it.",
    )


class SimulatedSection(_Section):
    """Step times of the simulated engine."""

    step_base_s: Seconds = Field(default=SimulatedTiming().step_base_s, description="Each step.")
    prefill_token_s: Seconds = Field(
        default=SimulatedTiming().prefill_token_s, description="Added per prompt token in the step."
    )
    prefill_pair_s: Seconds = Field(
        default=SimulatedTiming().prefill_pair_s,
        description="Added per prompt token and token that it attends to.",
    )
    decode_request_s: Seconds = Field(
        default=SimulatedTiming().decode_request_s,
        description="Added per generating request in the step.",
    )
    decode_context_token_s: Seconds = Field(
        default=SimulatedTiming().decode_context_token_s,
        description="Added per token that a generating request attends to.",
    )
    transfer_block_s: Seconds = Field(
        default=SimulatedTiming().transfer_block_s, description="Fetching one block of state."
    )
    transfer_base_s: Seconds = Field(
        default=SimulatedTiming().transfer_base_s, description="Added to each fetch."
    )

    def timing(self) -> SimulatedTiming:
        """As the engine takes it."""
        return SimulatedTiming(**self.model_dump())


class Config(_Section):
    """Everything that `baton serve` can be told."""

    model: ModelSection = ModelSection()
    engine: EngineKind = Field(
        default="vllm",
        description="`simulated` runs no model: tokens are made up, at the times below.",
    )
    engine_args: dict[str, Any] = Field(
        default={},
        description="vLLM's engine arguments for both pools, by their Python names, e.g. "
        "`max_model_len`, `tensor_parallel_size`, `quantization`, `speculative_config`. On CPUs, "
        "unless said here, `enforce_eager: true` and `kv_cache_memory_bytes` of 1 GiB an engine.",
    )
    http: HttpSection = HttpSection()
    grpc: GrpcSection = GrpcSection()
    prefill: PrefillSection = PrefillSection()
    decode: DecodeSection = DecodeSection()
    router: RouterSection = RouterSection()
    kv: KvSection = KvSection()
    ray: RaySection = RaySection()
    run_directory: str | None = Field(
        default=None,
        min_length=1,
        max_length=60,
        description="Where sockets and logs go, in a directory per run; at most 60 characters, as "
        "paths of sockets are short. Without one: `/tmp/baton-UID`.",
    )
    simulated: SimulatedSection = SimulatedSection()

    def pool(self, role: Role) -> PrefillSection | DecodeSection:
        """The section of a role."""
        return self.prefill if role == "prefill" else self.decode

    def engine_args_of(self, role: Role) -> dict[str, Any]:
        """The common engine arguments, then the pool's own."""
        return {**self.engine_args, **self.pool(role).engine_args}


def load(path: Path | None, environment: Mapping[str, str], flags: Mapping[str, Any]) -> Config:
    """The effective configuration. `flags` maps dotted keys to values; None means not given.

    Raises ConfigError with one line per problem.
    """
    values = _read_file(path) if path is not None else {}
    for key, value in _from_environment(environment):
        _put(values, key, value)
    for dotted, value in flags.items():
        if value is not None:
            _put(values, dotted.split("."), value)
    try:
        config = Config.model_validate(values)
    except ValidationError as error:
        problems = [_explain(dict(problem)) for problem in error.errors()]
        raise ConfigError("\n".join(problems)) from None
    if config.http.port == config.grpc.port:
        raise ConfigError(f"http.port and grpc.port are both {config.grpc.port}: change one.")
    router = config.router
    if router.policy != "joint" and (router.ttft_slo_ms or router.tpot_slo_ms):
        raise ConfigError(
            f"router.policy {router.policy} predicts no times, so nothing can be promised: leave "
            "router.ttft_slo_ms and router.tpot_slo_ms out, or take the policy joint."
        )
    check_engine_args(
        config.engine,
        {
            "engine_args": config.engine_args,
            "prefill.engine_args": config.prefill.engine_args,
            "decode.engine_args": config.decode.engine_args,
        },
    )
    return config


def valid_keys(section: type[BaseModel] = Config, prefix: str = "") -> Iterator[str]:
    """Every key of the configuration, dotted."""
    for name, field in section.model_fields.items():
        yield prefix + name
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from valid_keys(kind, f"{prefix}{name}.")


def nearest_key(key: str) -> str | None:
    """The valid key that was probably meant: one with the same last part, or a similar name."""
    keys = list(valid_keys())
    last = key.rpartition(".")[2]
    same = [valid for valid in keys if valid.rpartition(".")[2] == last]
    if same:
        return difflib.get_close_matches(key, same, 1, cutoff=0.0)[0]
    siblings = [valid for valid in keys if valid.rpartition(".")[0] == key.rpartition(".")[0]]
    for candidates in (siblings, keys):
        if matches := difflib.get_close_matches(key, candidates, 1, cutoff=0.6):
            return matches[0]
    by_last = {valid.rpartition(".")[2]: valid for valid in keys}
    matches = difflib.get_close_matches(last, by_last, 1, cutoff=0.6)
    return by_last[matches[0]] if matches else None


def _read_file(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the configuration file {path} can't be read: {error}") from None
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"the configuration file {path} is no YAML: {reason}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"the configuration file {path} must hold keys and values, e.g. `http:`")
    return content


def _from_environment(environment: Mapping[str, str]) -> Iterator[tuple[list[str], Any]]:
    """BATON_HTTP__PORT=8001 sets http.port; values are read as YAML, as in the file."""
    texts = {
        "model.path",
        "http.host",
        "grpc.host",
        "ray.address",
        "run_directory",
        "router.record_events",
    }
    for name, text in sorted(environment.items()):
        if not name.startswith(ENVIRONMENT_PREFIX) or name == INSTANCE_VARIABLE:
            continue
        key = name.removeprefix(ENVIRONMENT_PREFIX).lower().split("__")
        if len(key) > 2 and key[1] == "environment":
            key[2] = name.split("__", 2)[2]  # Names of environment variables keep their case.
            yield key, text
            continue
        try:
            yield key, text if ".".join(key) in texts else yaml.safe_load(text)
        except yaml.YAMLError:
            raise ConfigError(f"the environment variable {name} holds no YAML value") from None


def _put(values: dict[Any, Any], key: list[str], value: object) -> None:
    """Set a nested value; a section that is no mapping is replaced and left to the validation."""
    *sections, last = key
    for section in sections:
        if not isinstance(values.get(section), dict):
            values[section] = {}
        values = values[section]
    values[last] = value


_EXPECTED: dict[str, str] = {
    "int_type": "a whole number",
    "float_type": "a number",
    "string_type": "a text",
    "list_type": "a list",
    "dict_type": "keys and values",
    "model_type": "keys and values",
}


def _explain(problem: dict[str, Any]) -> str:
    """One sentence for one of pydantic's errors."""
    key = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        nearest = nearest_key(key)
        hint = f"did you mean {nearest}?" if nearest else "see docs/configuration.md."
        return f"unknown key {key}: {hint}"
    value = problem["input"]
    if expected := _EXPECTED.get(problem["type"]):
        return f"{key} must be {expected}, not {value!r}."
    rule = problem["msg"].partition(" should ")[2]
    return f"{key} must {rule}, not {value!r}."
