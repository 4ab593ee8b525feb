"""Calls handlers when sockets have something to say: the anchor's one place that waits.

Boundary: ZMQ sockets and descriptors in, calls out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import zmq

# As plain numbers: arithmetic with the enum's members costs more than the calls that it guards.
_READABLE: Final = int(zmq.POLLIN)
_WRITABLE: Final = int(zmq.POLLOUT)

Handler = Callable[[], None]


class Reactor:
    """At most one handler each for reading and for writing."""

    def __init__(self) -> None:
        self._poller = zmq.Poller()
        self._readers: dict[Any, Handler] = {}
        self._writers: dict[Any, Handler] = {}

    def on_readable(self, end: Any, handler: Handler) -> None:
        self._readers[end] = handler
        self._register(end)

    def on_writable(self, end: Any, handler: Handler | None) -> None:
        """None: there is nothing to write any more."""
        if handler is not None:
            self._writers[end] = handler
        elif self._writers.pop(end, None) is None:
            return
        self._register(end)

    def forget(self, end: Any) -> None:
        """No calls from now on; to be said before `end` is closed."""
        self._readers.pop(end, None)
        self._writers.pop(end, None)
        self._register(end)

    def _register(self, end: Any) -> None:
        events = (_READABLE if end in self._readers else 0) | (
            _WRITABLE if end in self._writers else 0
        )
        # The poller itself drops what has no events.
        self._poller.register(end, events)

    def turn(self, timeout_s: float) -> None:
        """Wait for the first event, then handle all there are."""
        for end, events in self._poller.poll(max(0, round(timeout_s * 1000))):
            # A handler before this one may have made it forgotten.
            if events & ~_WRITABLE and (reader := self._readers.get(end)):
                reader()
            if events & _WRITABLE and (writer := self._writers.get(end)):
                writer()
