"""Writes docs/configuration.md from the configuration's models."""

from __future__ import annotations

import json
import types
import typing
from typing import Any

from annotated_types import Ge, Le
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from cluster.config import Config

_INTRODUCTION = """\
# Configuration

<!-- Written by `baton config --reference` from cluster/config.py: change it there. -->

`baton serve --config baton.yaml` reads one YAML file; every key has a default. The environment
goes before the file: `BATON_HTTP__PORT=9000` sets `http.port` (two underscores go one level down,
values are written as in YAML). Flags of `baton serve` go before both. `baton config` prints what
is in effect. An unknown key is an error that names the nearest valid one.

```yaml
model:
  path: /models/Llama-3.1-8B-Instruct
engine_args:
  max_model_len: 16384
prefill:
  replicas: 2
decode:
  replicas: 2
  engine_args:
    max_num_seqs: 256
```

Engine arguments are vLLM's (`EngineArgs`), checked by name before anything starts; those that
Baton sets itself are refused. The simulated engine takes `block_size`, `max_model_len`,
`max_num_seqs`, `max_num_batched_tokens` and `num_gpu_blocks_override`.
"""


def reference() -> str:
    """The page."""
    plain: list[tuple[str, FieldInfo]] = []
    sections: list[tuple[str, type[BaseModel]]] = []
    for name, field in Config.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            sections.append((name, kind))
        else:
            plain.append((name, field))
    page = [_INTRODUCTION, "## At the top\n", _table(plain)]
    for name, section in sections:
        page += [f"## {name}\n", f"{section.__doc__}\n"]
        page.append(_table([(f"{name}.{key}", f) for key, f in section.model_fields.items()]))
    return "\n".join(page)


def _table(fields: list[tuple[str, FieldInfo]]) -> str:
    rows = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for key, field in fields:
        default = "none" if field.default is None else f"`{json.dumps(field.default)}`"
        rows.append(f"| `{key}` | {_type(field)} | {default} | {field.description} |")
    return "\n".join(rows) + "\n"


def _type(field: FieldInfo) -> str:
    text = _type_name(field.annotation)
    bounds = [*field.metadata, *_bounds_within(field.annotation)]
    lower = next((item.ge for item in bounds if isinstance(item, Ge)), None)
    upper = next((item.le for item in bounds if isinstance(item, Le)), None)
    if lower is not None and upper is not None:
        return f"{text}, {lower} to {upper}"
    if lower is not None:
        return f"{text}, at least {lower}"
    return text


def _bounds_within(union: Any) -> list[Any]:
    """Of a kind that may also be none."""
    parts = [part for part in typing.get_args(union) if typing.get_origin(part) is typing.Annotated]
    infos = [item for part in parts for item in part.__metadata__ if isinstance(item, FieldInfo)]
    return [bound for info in infos for bound in info.metadata]


def _type_name(kind: Any) -> str:
    origin = typing.get_origin(kind)
    arguments = typing.get_args(kind)
    if origin is typing.Literal:
        return " or ".join(f"`{choice}`" for choice in arguments)
    if origin is typing.Annotated:
        return _type_name(arguments[0])
    if origin in (types.UnionType, typing.Union):
        return " or ".join(_type_name(part) for part in arguments if part is not type(None))
    if origin is list:
        return f"list of {_type_name(arguments[0])}s"
    if origin is dict:
        return "keys and values"
    return {str: "text", int: "whole number", float: "number"}[kind]
