"""A link that can be cut: relays TCP between a router and one worker, until it is told not to."""

from __future__ import annotations

import asyncio
import contextlib


class CutLink:
    """Listens in a worker's place."""

    def __init__(self, worker_port: int = 0) -> None:
        self.worker_port = worker_port
        self.connections = 0
        """That routers opened so far."""
        self._passes = asyncio.Event()
        self._passes.set()
        self._open: set[asyncio.StreamWriter] = set()

    async def listen(self) -> int:
        """Returns the port."""
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        port: int = self._server.sockets[0].getsockname()[1]
        return port

    def cut(self) -> None:
        """Let nothing through; what is sent arrives late, as TCP has it."""
        self._passes.clear()

    def mend(self) -> None:
        self._passes.set()

    def reset(self) -> None:
        """Break all connections; new ones may be opened."""
        for writer in self._open:
            writer.transport.abort()

    def close(self) -> None:
        self.reset()
        self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        with contextlib.suppress(ConnectionError, asyncio.CancelledError):
            onward = await asyncio.open_connection("127.0.0.1", self.worker_port)
            self._open |= {writer, onward[1]}
            await asyncio.gather(self._pass(reader, onward[1]), self._pass(onward[0], writer))

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(65536):
                await self._passes.wait()
                writer.write(data)
                await writer.drain()
        finally:
            writer.close()
            self._open.discard(writer)
