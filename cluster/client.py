"""Asks the operator API of a running Baton, for the commands."""

from __future__ import annotations

import json
import urllib.error
from typing import Any, Final

from cluster.ports import fetch
from protos.errors import BatonError

_LIMIT_S: Final = 5.0


def ask(address: str, path: str) -> Any:
    """What it answers. Raises BatonError, with its own words or because nobody answers."""
    try:
        return fetch(address.rstrip("/") + path, _LIMIT_S)
    except urllib.error.HTTPError as error:
        raise BatonError(_message_of(error, f"{address}{path}")) from None
    except (OSError, ValueError):
        raise BatonError(
            f"no Baton answers at {address}: start one with `baton serve`, or name another "
            "address with --url."
        ) from None


def _message_of(error: urllib.error.HTTPError, where: str) -> str:
    try:
        message: str = json.loads(error.read())["error"]["message"]
    except (OSError, ValueError, KeyError, TypeError):
        return f"{where} answered with status {error.code}."
    return message
