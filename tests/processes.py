"""What tests ask of processes."""

from __future__ import annotations

import psutil


def command(process: psutil.Process) -> list[str]:
    """Its command line; empty while it begins or ends."""
    try:
        words: list[str] = process.cmdline()
    except psutil.Error:
        return []
    return words
