"""How responses ended at the edge: lines of HAProxy's log on UNIT_DIR/edge-log.sock.

A matched stop string and a client that left look alike to an engine; here they differ. What a line
holds is said in `router/unit/edge/configuration.py`. The edge keeps lines while no router takes
them.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from protos.ids import TicketId
from router.core.events import EdgeEnded
from router.metrics import LinkBytes

_LINK: Final = "client-edge"
LONGEST_LINE_BYTES: Final = 64 * 1024
_FIELD = re.compile(r"(?:^|\s)(\w+)=(\S+)")


def fields_of(line: str) -> dict[str, str]:
    """By their names."""
    return dict(_FIELD.findall(line))


def ended_of(fields: Mapping[str, str]) -> EdgeEnded | None:
    """None if they name no ticket or no status."""
    ticket, status = fields.get("ticket", "-"), fields.get("status")
    if ticket == "-" or status is None:
        return None
    return EdgeEnded(TicketId(ticket), status, fields.get("end", ""))


class EdgeLog:
    """Feeds what it can parse, counts the rest."""

    def __init__(
        self, path: Path, feed: Callable[[EdgeEnded], None], link_bytes: LinkBytes
    ) -> None:
        self._path = path
        self._feed = feed
        self._bytes = link_bytes
        self._server: asyncio.AbstractServer | None = None
        """Kept from being collected."""
        self.unread = 0

    async def listen(self) -> None:
        """Take over the socket's name from the process before."""
        self._path.unlink(missing_ok=True)
        loop = asyncio.get_running_loop()
        self._server = await loop.create_unix_server(lambda: _Lines(self._take), str(self._path))

    def _take(self, line: bytes) -> None:
        fields = fields_of(line.decode(errors="replace"))
        ended = ended_of(fields)
        if ended is None:
            self.unread += 1
            return
        self._bytes.requests[_LINK] += _count(fields, "request_bytes")
        self._bytes.responses[_LINK] += _count(fields, "response_bytes")
        self._feed(ended)


def _count(fields: Mapping[str, str], name: str) -> int:
    value = fields.get(name, "")
    return int(value) if value.isdecimal() else 0


class _Lines(asyncio.Protocol):
    """One connection of an edge."""

    def __init__(self, take: Callable[[bytes], None]) -> None:
        self._take = take
        self._rest = b""

    def data_received(self, data: bytes) -> None:
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            self._take(line)
        # What has no end is no line.
        self._rest = self._rest[:LONGEST_LINE_BYTES]
