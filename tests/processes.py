"""What tests and benchmarks ask of processes."""

from __future__ import annotations

import ctypes
import os
import signal
from typing import Final

import psutil

_PR_SET_PDEATHSIG: Final = 1
_prctl: Final = ctypes.CDLL(None, use_errno=True).prctl
_US: Final = os.getpid()


def ends_with_us() -> None:
    """`preexec_fn` of what shall get SIGTERM when the thread that starts it ends, however it ends.

    A server that outlived a test or benchmark that was killed would slow down all that follow.
    """
    _prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != _US:  # Ours ended before the line above took effect.
        os._exit(1)


def command(process: psutil.Process) -> list[str]:
    """Its command line; empty while it begins or ends."""
    try:
        words: list[str] = process.cmdline()
    except psutil.Error:
        return []
    return words
