"""Ports that tests tell others to listen on."""

from __future__ import annotations

import random
import socket
from typing import Final

_PORTS: Final = range(20_000, 32_000)
"""Below those that the system gives to whoever asks for any (from 32,768 on, on Linux): nobody is
given one of these before the one that it was meant for has taken it."""
_chance: Final = random.SystemRandom()


def free_port() -> int:
    """A port of loopback that was free a moment ago."""
    while True:
        port = _chance.choice(_PORTS)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
