"""The anchor's connections: one to each front, as its engine, and one to the newest router.

Boundary: bytes and their pace. Nothing here blocks; what the messages mean is `relay`'s business.
"""

from __future__ import annotations

import socket
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Final

import zmq
from zmq.utils.monitor import recv_monitor_message

from protos import anchor_link

_ENGINE_IDENTITY: Final = (0).to_bytes(2, "little")
_MESSAGES_A_TURN: Final = 256
_READ_BYTES: Final = 256 * 1024
_MAX_UNREAD_BYTES: Final = anchor_link.MAX_MESSAGE_BYTES
"""A peer that leaves more unread than this, beyond what it was told at its start, is cut off."""


class FrontLink:
    """What one front's process takes for its engine; made anew for each process.

    So nothing that was meant for a front's predecessor reaches it.
    """

    def __init__(self, context: zmq.Context[Any], input_socket: Path, output_socket: Path) -> None:
        self.requests: zmq.Socket[bytes] = context.socket(zmq.DEALER)
        self.requests.setsockopt(zmq.IDENTITY, _ENGINE_IDENTITY)
        self.outputs: zmq.Socket[bytes] = context.socket(zmq.PUSH)
        for end in (self.requests, self.outputs):
            end.setsockopt(zmq.LINGER, 0)
        self.monitor: zmq.Socket[bytes] = self.outputs.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        self.requests.connect(f"ipc://{input_socket}")
        self.outputs.connect(f"ipc://{output_socket}")
        self._waiting: deque[bytes] = deque()
        self._waiting_bytes = 0
        self._progress_s = 0.0

    def send_ready(self, payload: bytes) -> None:
        """The engine's first message. It waits in the queue until the front listens."""
        self.requests.send(payload, zmq.DONTWAIT)

    def received(self) -> Iterator[list[bytes]]:
        """The messages that have come: [type, payload, ...]."""
        for _ in range(_MESSAGES_A_TURN):
            try:
                yield self.requests.recv_multipart(zmq.DONTWAIT)
            except zmq.Again:
                return

    def dropped_us(self) -> bool:
        """Whether the front closed its end; a front does not recover from that."""
        dropped = False
        while self.monitor.poll(0):
            recv_monitor_message(self.monitor, zmq.DONTWAIT)
            dropped = True
        return dropped

    def send(self, message: bytes, now_s: float) -> None:
        if not self._waiting:
            self._progress_s = now_s
        self._waiting.append(message)
        self._waiting_bytes += len(message)
        self.flush(now_s)

    def flush(self, now_s: float) -> None:
        """Send what fits now."""
        while self._waiting:
            try:
                self.outputs.send(self._waiting[0], zmq.DONTWAIT)
            except zmq.Again:
                return
            self._waiting_bytes -= len(self._waiting.popleft())
            self._progress_s = now_s

    def waiting(self) -> bool:
        return bool(self._waiting)

    def stalled_for_s(self, now_s: float) -> float:
        """For how long the front has taken nothing of what waits for it."""
        return now_s - self._progress_s if self._waiting else 0.0

    def left_too_much(self) -> bool:
        """It takes less than it asks for, and too much has piled up."""
        return self._waiting_bytes > _MAX_UNREAD_BYTES

    def close(self) -> None:
        self.outputs.disable_monitor()
        for end in (self.monitor, self.requests, self.outputs):
            end.close(linger=0)


class RouterLink:
    """One connection of a router process."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        self._connection = connection
        self._splitter = anchor_link.Splitter()
        # Read into again and again: a new one each time would be mapped and unmapped.
        self._read = memoryview(bytearray(_READ_BYTES))
        self._waiting: deque[memoryview] = deque()
        self._waiting_bytes = 0
        self._allowed_bytes = _MAX_UNREAD_BYTES

    def fileno(self) -> int:
        return self._connection.fileno()

    def received(self) -> Iterator[anchor_link.FromRouter]:
        """The messages that have come.

        Raises OSError when the router is gone, ProtocolError or msgspec.DecodeError when
        it sends what is no message.
        """
        try:
            size_bytes = self._connection.recv_into(self._read)
        except BlockingIOError:
            return
        if not size_bytes:
            raise ConnectionResetError("it closed the connection")
        for body in self._splitter.feed(self._read[:size_bytes]):
            yield anchor_link.from_router_decoder.decode(body)

    def greet(self, parts: Iterable[anchor_link.Snapshot]) -> None:
        """Send it what is under way, however much that is. Raises OSError when it is gone."""
        for part in parts:
            data = anchor_link.encode(part)
            self._waiting.append(memoryview(data))
            self._waiting_bytes += len(data)
        self._allowed_bytes += self._waiting_bytes
        self.flush()

    def send(self, message: anchor_link.FromAnchor) -> None:
        """Raises OSError when the router is gone, or has left too much unread."""
        data = anchor_link.encode(message)
        self._waiting.append(memoryview(data))
        self._waiting_bytes += len(data)
        self.flush()
        if self._waiting_bytes > self._allowed_bytes:
            raise ConnectionAbortedError(f"it left {self._waiting_bytes} bytes unread")

    def flush(self) -> None:
        """Send what fits now. Raises OSError when the router is gone."""
        while self._waiting:
            try:
                sent = self._connection.send(self._waiting[0])
            except BlockingIOError:
                return
            self._waiting_bytes -= sent
            if sent == len(self._waiting[0]):
                self._waiting.popleft()
            else:
                self._waiting[0] = self._waiting[0][sent:]

    def waiting(self) -> bool:
        return bool(self._waiting)

    def close(self) -> None:
        self._connection.close()
