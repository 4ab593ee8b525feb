"""What the worker's process tells the engine process to run: a small JSON file between them."""

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


def save(path: Path, launch: Launch) -> None:
    """Write the file that `process.main` reads."""
    path.write_bytes(msgspec.json.encode(launch))


def load(path: Path) -> Launch:
    """Read it back. Raises msgspec.ValidationError for any other file."""
    return msgspec.json.decode(path.read_bytes(), type=Launch)
