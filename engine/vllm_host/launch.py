"""What the worker's process and the engine process tell each other at the start: small JSON files.

One says what to run, the other what the model turned out to be.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

CONNECTOR = "kvstore.connector"
CONNECTOR_CLASS = "BatonConnector"


class Launch(Struct, frozen=True, kw_only=True):
    """An engine process: vLLM's arguments and where to shake hands."""

    handshake_address: str
    engine_id: str
    """Names this engine to those that fetch from it; new with every start."""
    kv_lease_s: int
    engine_args: dict[str, Any]
    connector_module: str = CONNECTOR
    connector_class: str = CONNECTOR_CLASS


class Model(Struct, frozen=True, kw_only=True):
    """What the engine process finds in the model's configuration and its READY does not say."""

    vocabulary_tokens: int
    weights: str
    """Their digest (`engine.weights`)."""


def save(path: Path, launch: Launch) -> None:
    """Write the file that `process.main` reads."""
    path.write_bytes(msgspec.json.encode(launch))


def save_model(launch_path: Path, model: Model) -> None:
    """Answer the launch file; done before READY is sent."""
    _model_path(launch_path).write_bytes(msgspec.json.encode(model))


def load_model(launch_path: Path) -> Model:
    """Read the answer back."""
    return msgspec.json.decode(_model_path(launch_path).read_bytes(), type=Model)


def _model_path(launch_path: Path) -> Path:
    return launch_path.with_name("engine-model.json")


def load(path: Path) -> Launch:
    """Read it back. Raises msgspec.ValidationError for any other file."""
    return msgspec.json.decode(path.read_bytes(), type=Launch)
