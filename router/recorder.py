"""Writes a recording of a router's events while it serves: off the loop, bounded, mode 0600.

What is taken is encoded at once and written by a thread. A file that can't be written and a disk
that is too slow end the recording, never the router.
"""

from __future__ import annotations

import logging
import os
import threading
from pathlib import Path
from queue import SimpleQueue
from typing import Final

import msgspec

from protos.anchor_link import LENGTH
from router.core.events import Command, Event
from router.live_core import Origin
from router.recording import FORMAT, Head

_log = logging.getLogger("router")

LIMIT_BYTES: Final = 1024**3
_CHUNK_BYTES: Final = 256 * 1024
_WAITING_CHUNKS: Final = 256
"""More than that in memory, and the disk is too slow."""
_CLOSE_S: Final = 5.0
"""A disk that takes nothing any more does not keep a router from ending."""


class Recorder:
    """Writes a new file until it is closed or full. Raises OSError if it can't be created."""

    def __init__(
        self, path: Path, router_id: str, origin: Origin, limit_bytes: int = LIMIT_BYTES
    ) -> None:
        self._path = path
        self._left_bytes = limit_bytes
        self._encoder = msgspec.msgpack.Encoder()
        self._buffer = bytearray()
        self._chunks: SimpleQueue[bytearray | None] = SimpleQueue()
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        descriptor = os.open(path, flags, 0o600)
        self._recording = True
        self._thread = threading.Thread(target=self._write, args=(descriptor,), daemon=True)
        self._thread.start()
        self._append(Head(FORMAT, router_id, origin))

    def record(self, now_s: float, event: Event, commands: list[Command] | None) -> None:
        """Take one event and its answer; `commands` is None if the core raised an error."""
        if self._recording:
            answer = None if commands is None else [(type(c).__name__, c) for c in commands]
            self._append((now_s, type(event).__name__, event, answer))
            if len(self._buffer) >= _CHUNK_BYTES:
                self.flush()

    def flush(self) -> None:
        """Have written what was taken so far."""
        if not self._recording:
            return
        chunk, self._buffer = self._buffer, bytearray()
        self._left_bytes -= len(chunk)
        if self._left_bytes < 0:
            self._stop("it is as long as it may get")
        elif self._chunks.qsize() >= _WAITING_CHUNKS:
            self._stop("the disk is too slow")
        else:
            self._chunks.put(chunk)

    def close(self) -> None:
        """Write what was taken so far, and no more. Blocks until it is written."""
        self.flush()
        self._recording = False
        self._chunks.put(None)
        self._thread.join(_CLOSE_S)

    def _stop(self, why: str) -> None:
        _log.warning("no more events are recorded in %s: %s", self._path, why)
        self._recording = False
        self._chunks.put(None)

    def _append(self, message: object) -> None:
        start = len(self._buffer)
        self._buffer += bytes(LENGTH.size)
        self._encoder.encode_into(message, self._buffer, -1)
        LENGTH.pack_into(self._buffer, start, len(self._buffer) - start - LENGTH.size)

    def _write(self, descriptor: int) -> None:
        try:
            while (chunk := self._chunks.get()) is not None:
                rest = memoryview(chunk)
                while rest:
                    rest = rest[os.write(descriptor, rest) :]
        except OSError as error:
            self._stop(str(error))
        finally:
            os.close(descriptor)
