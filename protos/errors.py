"""The errors that cross a boundary. Each message says what is wrong and what to do about it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class BatonError(Exception):
    """Base of what Baton raises on purpose; anything else is a defect."""


class ConfigError(BatonError):
    """Configuration that can't be used: names the key, what is wrong, and a valid value."""


class ProtocolError(BatonError):
    """A peer sent what this version does not speak."""


class EngineError(BatonError):
    """An engine failed to start or died."""


def nearest(name: str, known: Iterable[str]) -> str:
    """What was probably meant, for a message."""
    return difflib.get_close_matches(name, list(known), 1, cutoff=0.0)[0]
