"""Whether a process still answers HTTP: asks it again and again, and never waits.

Boundary: finds out; what follows is the anchor's. Only one that has given the answer that proves it
is judged: one that loads may take its time.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Final

from router.unit.anchor.pulse import Pulse
from router.unit.anchor.reactor import Reactor

ASK_EVERY_S: Final = 2.0
HANGS_S: Final = 15.0
"""A silence in which it computed nothing."""
MOST_SILENCES: Final = 8
"""In a row, if it computes: a front that works through a large body or grammar answers nobody."""
_BUSY_SHARE: Final = 0.02
"""Of a core, is computing."""
_ANSWER_BYTES: Final = 4096


class Probe:
    """Of one process; `close` it when the process has ended."""

    def __init__(
        self,
        reactor: Reactor,
        http_socket: Path,
        path: str,
        status: int,
        cpu_s: Callable[[], float],
    ) -> None:
        """`status` is what `path` is answered with once it serves; `cpu_s` tells the CPU time that
        the process has used so far."""
        self._reactor = reactor
        self._http_socket = http_socket
        self._question = f"GET {path} HTTP/1.1\r\nHost: probe\r\nConnection: close\r\n\r\n".encode()
        self._proof = f" {status} ".encode()
        self._cpu_s = cpu_s
        self._pulse = Pulse(ASK_EVERY_S, HANGS_S)
        self._connection: socket.socket | None = None
        self._asks_again = False
        self._served = False
        self._silences = 0
        self._cpu_before_s = 0.0

    def hangs(self, now_s: float) -> bool:
        """Whether it is to be ended. Call it often: it also asks."""
        if self._pulse.due(now_s):
            self._silences = 0
            self._cpu_before_s = self._cpu_s()
            self._ask()
        elif self._asks_again:
            self._ask()
        if not self._served or not self._pulse.stopped(now_s):
            return False
        self._silences += 1
        cpu_s, before_s = self._cpu_s(), self._cpu_before_s
        if cpu_s - before_s < _BUSY_SHARE * HANGS_S or self._silences >= MOST_SILENCES:
            return True
        # It computes: the question stands, and its time begins anew.
        self._cpu_before_s = cpu_s
        self._pulse = Pulse(ASK_EVERY_S, HANGS_S)
        self._pulse.due(now_s)
        return False

    def close(self) -> None:
        """No question from now on."""
        if self._connection is not None:
            self._reactor.forget(self._connection.fileno())
            self._connection.close()
            self._connection = None

    def _ask(self) -> None:
        # So many wait for it that there is no room, or descriptors are short, or the socket's name
        # is gone: it is asked again, and stays unanswered until that succeeds.
        self._asks_again = True
        try:
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        except OSError:
            return
        connection.setblocking(False)
        try:
            connection.connect(str(self._http_socket))
            connection.send(self._question)
        except OSError:
            connection.close()
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
        self._served |= self._proof in answer.partition(b"\r\n")[0]
        self._pulse.answered()
        self.close()
