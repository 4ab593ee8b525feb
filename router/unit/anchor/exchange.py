"""Moves messages between fronts and router: the anchor's sockets around its memory.

Boundary: it knows connections and their failures. What was given to whom is `relay`'s knowledge;
processes are the anchor's: it says when a front's process starts and ends, and ends those that
`Exchange` names.
"""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Iterable
from typing import Any, Final

import msgspec
import zmq

from protos import anchor_link, enginecore
from protos.errors import ProtocolError
from router.settings import UnitPaths
from router.unit.anchor.links import FrontLink, RouterLink
from router.unit.anchor.pulse import Pulse
from router.unit.anchor.reactor import Reactor
from router.unit.anchor.relay import Relay

_log = logging.getLogger("anchor")

ROUTER_AWAY_S: Final = 10.0
"""Without a router that works for this long, the requests under way end with an error."""
ROUTER_SETTLED_S: Final = 2.0
"""A router works once it has delivered something, or has lived for this long: one whose defect is
tied to a request under way dies at once, and so do all that follow."""
PING_EVERY_S: Final = 1.0
ROUTER_GREETS_S: Final = 10.0
"""For a router that was started, or lost its connection, to say hello; one may have been stopped
while it stood by. Longer than it takes to load."""
ROUTER_HANGS_S: Final = 5.0
"""A router that leaves a ping unanswered for this long is to be ended."""
FRONT_STALLED_S: Final = 5.0
"""A front that takes nothing of what waits for it for this long is to be ended."""


class Exchange:
    """The links to fronts and router, and what goes over them. Nothing here blocks."""

    def __init__(self, paths: UnitPaths, reactor: Reactor, listener: socket.socket) -> None:
        self._paths = paths
        self._reactor = reactor
        self._listener = listener
        self._context: zmq.Context[Any] = zmq.Context()
        self._relay = Relay()
        self._fronts: dict[int, FrontLink] = {}
        self._broken_fronts: set[int] = set()
        self._connections: set[RouterLink] = set()
        self._router: RouterLink | None = None
        self._router_worked_s = self._router_came_s = time.monotonic()
        self._ready: bytes | None = None
        self._given: dict[int, list[bytes]] = {}
        """Outputs for each front of what was read at once: they go out in one message."""
        self._pulse = Pulse(PING_EVERY_S, ROUTER_HANGS_S)
        self._greeting = Pulse(PING_EVERY_S, ROUTER_GREETS_S)
        self._front_request_bytes = self._front_response_bytes = 0
        reactor.on_readable(listener.fileno(), self._accept)

    # Told by the anchor

    def front_started(self, front: int) -> None:
        """A new process listens, or soon will, on the front's sockets."""
        link = FrontLink(
            self._context,
            self._paths.front_socket(front, "input"),
            self._paths.front_socket(front, "output"),
        )
        self._fronts[front] = link
        self._reactor.on_readable(link.requests, lambda: self._from_front(front, link))
        self._reactor.on_readable(link.monitor, lambda: self._dropped_by_front(front, link))
        if self._ready is not None:
            link.send_ready(self._ready)

    def front_ended(self, front: int) -> None:
        """The process is gone, and with it its clients."""
        self._broken_fronts.discard(front)
        link = self._fronts.pop(front)
        for end in (link.requests, link.outputs, link.monitor):
            self._reactor.forget(end)
        link.close()
        self._to_router(self._relay.front_gone(front))

    def fronts_to_end(self, now_s: float) -> list[int]:
        """Fronts that can't go on: they dropped their engine, or take nothing."""
        for front, link in self._fronts.items():
            if link.stalled_for_s(now_s) > FRONT_STALLED_S or link.left_too_much():
                _log.error("front %d takes no output; it is ended", front)
                self._broken_fronts.add(front)
        broken, self._broken_fronts = list(self._broken_fronts), set()
        return broken

    def end_orphans(self, now_s: float) -> None:
        """End what is under way once there has been no router that works for too long."""
        if self._router is not None:
            if now_s - self._router_came_s >= ROUTER_SETTLED_S:
                self._router_worked_s = now_s
            return
        if now_s - self._router_worked_s < ROUTER_AWAY_S:
            return
        for front, payloads in self._relay.end_all().items():
            _log.error("no router: %d requests of front %d end in error", len(payloads), front)
            self._to_front(front, enginecore.relay_outputs(payloads, time.monotonic()))

    def router_started(self) -> None:
        """A process that is to connect."""
        self._greeting = Pulse(PING_EVERY_S, ROUTER_GREETS_S)

    def router_hangs(self, now_s: float) -> bool:
        """Whether the router is to be ended: it does not connect, or answers no ping."""
        if self._router is None:
            self._greeting.due(now_s)
            return self._greeting.stopped(now_s)
        if self._pulse.due(now_s):
            self._to_router(anchor_link.Ping(self._front_request_bytes, self._front_response_bytes))
        return self._pulse.stopped(now_s)

    # Fronts

    def _from_front(self, front: int, link: FrontLink) -> None:
        try:
            for kind, payload, *_ in link.received():
                self._handle_front(front, kind, payload)
        except (ValueError, msgspec.DecodeError) as error:
            _log.error("front %d sent what is no message (%s); it is ended", front, error)
            self._broken_fronts.add(front)

    def _handle_front(self, front: int, kind: bytes, payload: bytes) -> None:
        self._front_request_bytes += len(payload)
        if kind == enginecore.ADD:
            self._to_router(self._relay.add(front, payload))
        elif kind == enginecore.ABORT:
            if abort := self._relay.abort(front, payload):
                self._to_router(abort)
        elif kind == enginecore.UTILITY:
            self._utility(front, payload)
        else:
            raise ValueError(f"kind {kind!r}")

    def _utility(self, front: int, payload: bytes) -> None:
        if self._router is not None:
            self._to_router(anchor_link.Utility(front, payload))
            return
        # Such calls are not kept for the next router, so their caller must not wait for it.
        call_id = enginecore.decode_utility(payload).call_id
        self._to_front(front, enginecore.utility_reply(call_id, None, "the router is starting"))

    def _dropped_by_front(self, front: int, link: FrontLink) -> None:
        if link.dropped_us():
            _log.error("front %d closed its engine's connection; it is ended", front)
            self._broken_fronts.add(front)

    def _to_front(self, front: int, message: bytes) -> None:
        if link := self._fronts.get(front):
            self._front_response_bytes += len(message)
            link.send(message, time.monotonic())
            self._watch_front(link)

    def _flush_front(self, link: FrontLink) -> None:
        link.flush(time.monotonic())
        self._watch_front(link)

    def _watch_front(self, link: FrontLink) -> None:
        handler = (lambda: self._flush_front(link)) if link.waiting() else None
        self._reactor.on_writable(link.outputs, handler)

    # Router

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError as error:
            _log.warning("a router's connection was not accepted: %s", error)
            return
        link = RouterLink(connection)
        self._connections.add(link)
        self._reactor.on_readable(link.fileno(), lambda: self._from_router(link))

    def _from_router(self, link: RouterLink) -> None:
        try:
            for message in link.received():
                self._handle(link, message)
        except (OSError, ProtocolError, msgspec.DecodeError) as error:
            self._drop(link, f"{error}")
        for front, payloads in self._given.items():
            self._to_front(front, enginecore.relay_outputs(payloads, time.monotonic()))
        self._given.clear()

    def _handle(self, link: RouterLink, message: anchor_link.FromRouter) -> None:
        if isinstance(message, anchor_link.Hello):
            self._adopt(link, message)
        elif link is not self._router:
            raise ProtocolError("it did not say hello, or a newer router did")
        elif isinstance(message, anchor_link.Deliver):
            self._deliver(message.front, message.deliveries)
        elif isinstance(message, anchor_link.Pong):
            self._pulse.answered()
        elif isinstance(message, anchor_link.Ready):
            self._ready = message.payload
            for front in self._fronts.values():
                front.send_ready(message.payload)
        else:
            self._to_front(message.front, message.payload)

    def _adopt(self, link: RouterLink, hello: anchor_link.Hello) -> None:
        if not self._relay.admits(hello.router_incarnation):
            raise ProtocolError(f"its incarnation {hello.router_incarnation} is over")
        for other in self._connections - {link}:
            self._drop(other, "a newer router said hello")
        self._router = link
        self._router_came_s = time.monotonic()
        self._pulse = Pulse(PING_EVERY_S, ROUTER_HANGS_S)
        _log.info("router %d connected, pid %d", hello.router_incarnation, hello.pid)
        try:
            link.greet(self._relay.snapshot())
        except OSError as error:
            self._drop(link, f"{error}")
        else:
            self._watch_router(link)

    def _deliver(self, front: int, deliveries: Iterable[anchor_link.Delivery]) -> None:
        given = self._relay.deliver(front, deliveries)
        if given.payloads:
            self._router_worked_s = time.monotonic()
            self._given.setdefault(front, []).extend(given.payloads)
        if given.broken:
            _log.error("tokens are missing before those that came for %s", given.broken)
            self._to_router(anchor_link.Abort(front, given.broken))

    def _to_router(self, message: anchor_link.FromAnchor) -> None:
        """Without a router nothing is sent: the next one's snapshot holds it."""
        link = self._router
        if link is None:
            return
        try:
            link.send(message)
        except OSError as error:
            self._drop(link, f"{error}")
        else:
            self._watch_router(link)

    def _flush_router(self, link: RouterLink) -> None:
        try:
            link.flush()
        except OSError as error:
            self._drop(link, f"{error}")
        else:
            self._watch_router(link)

    def _watch_router(self, link: RouterLink) -> None:
        handler = (lambda: self._flush_router(link)) if link.waiting() else None
        self._reactor.on_writable(link.fileno(), handler)

    def _drop(self, link: RouterLink, reason: str) -> None:
        if link not in self._connections:
            return
        _log.warning("a router's connection is closed: %s", reason)
        self._connections.remove(link)
        self._reactor.forget(link.fileno())
        link.close()
        if link is self._router:
            self._router = None
            self.router_started()
