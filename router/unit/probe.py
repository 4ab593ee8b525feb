"""Whether a front still answers: asks its /health again and again, and never waits.

Boundary: finds out; what follows is the anchor's. Only a front that has been healthy is judged: one
that loads may take its time.
"""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Final

from router.unit.pulse import Pulse
from router.unit.reactor import Reactor

ASK_EVERY_S: Final = 2.0
FRONT_HANGS_S: Final = 15.0
"""A front that works through a large body on a busy machine is silent for some seconds."""
_QUESTION: Final = b"GET /health HTTP/1.1\r\nHost: front\r\nConnection: close\r\n\r\n"
_ANSWER_BYTES: Final = 4096


class FrontProbe:
    """Of one front's process; `close` it when the process has ended."""

    def __init__(self, http_socket: Path, reactor: Reactor) -> None:
        self._http_socket = http_socket
        self._reactor = reactor
        self._pulse = Pulse(ASK_EVERY_S, FRONT_HANGS_S)
        self._connection: socket.socket | None = None
        self._asks_again = False
        self._was_healthy = False

    def hangs(self, now_s: float) -> bool:
        """Whether it is to be ended. Call it often: it also asks."""
        if self._pulse.due(now_s) or self._asks_again:
            self._ask()
        return self._was_healthy and self._pulse.stopped(now_s)

    def close(self) -> None:
        """No question from now on."""
        if self._connection is not None:
            self._reactor.forget(self._connection.fileno())
            self._connection.close()
            self._connection = None

    def _ask(self) -> None:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.setblocking(False)
        try:
            connection.connect(str(self._http_socket))
            connection.send(_QUESTION)
        except BlockingIOError:  # So many wait for it that there is no room.
            connection.close()
            self._asks_again = True
            return
        self._asks_again = False
        self._connection = connection
        self._reactor.on_readable(connection.fileno(), self._read)

    def _read(self) -> None:
        assert self._connection is not None
        try:
            answer = self._connection.recv(_ANSWER_BYTES)
        except OSError:
            answer = b""  # It left the question; its death, if it is one, the anchor sees itself.
        self._was_healthy |= b" 200 " in answer.partition(b"\r\n")[0]
        self._pulse.answered()
        self.close()
