"""How responses ended at the edge: HAProxy's log, one datagram each, on UNIT_DIR/edge-log.sock.

A matched stop string and a client that left look alike to an engine; here they differ.
"""

from __future__ import annotations

import asyncio
import re
import socket
from collections.abc import Callable
from pathlib import Path

from protos.ids import TicketId
from router.core.events import EdgeEnded

LONGEST_LINE_BYTES = 64 * 1024
_FIELD = re.compile(r"(?:^|\s)(\w+)=(\S+)")


def parse(text: str) -> EdgeEnded | None:
    """None if the text names no ticket or no status."""
    fields: dict[str, str] = dict(_FIELD.findall(text))
    ticket, status = fields.get("ticket", "-"), fields.get("status")
    if ticket == "-" or status is None:
        return None
    return EdgeEnded(TicketId(ticket), status, fields.get("end", fields.get("term", "")))


class EdgeLog:
    """Feeds what it can parse, counts the rest."""

    def __init__(self, path: Path, feed: Callable[[EdgeEnded], None]) -> None:
        self._path = path
        self._feed = feed
        # uvloop has no datagram endpoint for Unix sockets.
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self.unread = 0

    def listen(self, loop: asyncio.AbstractEventLoop) -> None:
        """Take over the socket's name from the process before."""
        self._path.unlink(missing_ok=True)
        self._socket.bind(str(self._path))
        loop.add_reader(self._socket, self._receive)

    def _receive(self) -> None:
        while True:
            try:
                data = self._socket.recv(LONGEST_LINE_BYTES)
            except BlockingIOError:
                return
            ended = parse(data.decode(errors="replace"))
            if ended is None:
                self.unread += 1
            else:
                self._feed(ended)
