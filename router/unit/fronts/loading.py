"""What a front answers while it loads: 503 with `Retry-After`, in the form of the path's API.

Boundary: a thread beside the loading, on the listening socket that the server takes over later.
Standard library only, and what `requests` needs.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from typing import Final

from router.unit.fronts.requests import Refusal, error_body

RETRY_AFTER_S: Final = 5
_LOADING: Final = Refusal(503, "The process that serves this path is starting; try again.")
_CLIENT_S: Final = 2.0
"""For a request's head, and for its client to take the answer and leave."""
_CLIENTS_FAULT: Final = (
    OSError,
    TimeoutError,
    ValueError,
    asyncio.IncompleteReadError,
    asyncio.LimitOverrunError,
)
"""It left, or sent no request."""
_BACKLOG: Final = 4096


class Loading:
    """Answers from its making until `close`."""

    def __init__(self, listener: socket.socket) -> None:
        # Its own descriptor of the same socket: asyncio closes what it serves on.
        self._listener = listener.dup()
        self._loop = asyncio.new_event_loop()
        self._over = asyncio.Event()
        self._thread = threading.Thread(
            target=self._loop.run_until_complete, args=(self._run(),), name="loading", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """Who connects from now on waits for the server; who did before has its answer."""
        self._loop.call_soon_threadsafe(self._over.set)
        self._thread.join()
        self._loop.close()

    async def _run(self) -> None:
        server = await asyncio.start_unix_server(self._serve, sock=self._listener, backlog=_BACKLOG)
        await self._over.wait()
        # Accept no more, but close the server last: closed, it drops what it has accepted and not
        # begun to serve without closing it, and that client would wait for ever. asyncio has a
        # task for each of those before there is one of `_serve`.
        self._loop.remove_reader(self._listener)
        while others := asyncio.all_tasks() - {asyncio.current_task()}:
            await asyncio.wait(others)
        server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(*_CLIENTS_FAULT):
            async with asyncio.timeout(_CLIENT_S):
                head = await reader.readuntil(b"\r\n\r\n")
                writer.write(_answer(head))
                writer.write_eof()
                # One that is closed on what it has not read breaks its client's connection.
                while await reader.read(65536):
                    pass
        writer.transport.abort()


def _answer(head: bytes) -> bytes:
    _, path, _ = head.split(b"\r\n", 1)[0].decode("latin-1").split(" ", 2)
    body = error_body(path.partition("?")[0], _LOADING)
    lines = (
        "HTTP/1.1 503 Service Unavailable",
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
        f"Retry-After: {RETRY_AFTER_S}",
        "Connection: close",
    )
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body
