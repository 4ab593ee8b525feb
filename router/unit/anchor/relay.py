"""What each front asked for and was given: the anchor's memory, without its sockets.

Boundary: messages in, messages out. It knows neither sockets, processes nor time, and nothing of
what a request asks; it counts positions and forwards bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Final

from protos import anchor_link, enginecore

SNAPSHOT_BYTES: Final = 16 * 1024 * 1024
"""A part of the snapshot is closed once its requests make up this much."""


@dataclass(slots=True)
class _Request:
    payload: bytes
    given_tokens: int = 0


@dataclass(slots=True)
class Given:
    """What one `Deliver` comes to: outputs for its front, and requests that were ended by it."""

    payloads: list[bytes] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    """Ended with an error, because tokens before theirs never came: a defect of the router."""


class Relay:
    """The requests under way, per front.

    Invariant: the tokens that a front was given for a request are those of positions
    0..given_tokens - 1, each once and in order; a request whose end was given is forgotten.
    """

    def __init__(self) -> None:
        self._fronts: dict[int, dict[str, _Request]] = {}
        self._incarnation = 0

    def admits(self, router_incarnation: int) -> bool:
        """Whether to listen to this router; if so, every earlier incarnation is over."""
        if router_incarnation < self._incarnation:
            return False
        self._incarnation = router_incarnation
        return True

    def snapshot(self) -> Iterator[anchor_link.Snapshot]:
        """Everything under way, oldest first within a front, in parts."""
        part: list[anchor_link.Underway] = []
        size_bytes = 0
        for front, requests in self._fronts.items():
            for request_id, request in requests.items():
                if size_bytes >= SNAPSHOT_BYTES:
                    yield anchor_link.Snapshot(part, more=True)
                    part, size_bytes = [], 0
                part.append(
                    anchor_link.Underway(front, request_id, request.payload, request.given_tokens)
                )
                size_bytes += len(request.payload)
        yield anchor_link.Snapshot(part)

    def add(self, front: int, payload: bytes) -> anchor_link.Add:
        """A front's new request. Raises msgspec.DecodeError for what is none."""
        request_id = enginecore.decode_request_id(payload)
        self._fronts.setdefault(front, {})[request_id] = _Request(payload)
        return anchor_link.Add(front, request_id, payload)

    def abort(self, front: int, payload: bytes) -> anchor_link.Abort | None:
        """A front's abort; None if all that it names have ended already."""
        requests = self._fronts.get(front, {})
        known = [
            request_id
            for request_id in enginecore.decode_ids(payload)
            if requests.pop(request_id, None) is not None
        ]
        return anchor_link.Abort(front, known) if known else None

    def deliver(self, front: int, deliveries: Iterable[anchor_link.Delivery]) -> Given:
        """The outputs that a front must be given now, in order."""
        given = Given()
        requests = self._fronts.get(front, {})
        for delivery in deliveries:
            request = requests.get(delivery.request_id)
            if request is None:
                continue
            missing = delivery.first_position - request.given_tokens
            payload = delivery.payload if missing == 0 else _rest(delivery, -missing)
            if payload is None:
                del requests[delivery.request_id]
                given.broken.append(delivery.request_id)
                given.payloads.append(enginecore.error_output(delivery.request_id))
            elif payload:
                request.given_tokens = delivery.first_position + delivery.token_count
                given.payloads.append(payload)
                if delivery.finished:
                    del requests[delivery.request_id]
        return given

    def front_gone(self, front: int) -> anchor_link.FrontGone:
        """Forget what a front asked for."""
        self._fronts.pop(front, None)
        return anchor_link.FrontGone(front)

    def end_all(self) -> dict[int, list[bytes]]:
        """End everything under way with an error: the outputs for each front."""
        errors = {
            front: [enginecore.error_output(request_id) for request_id in requests]
            for front, requests in self._fronts.items()
            if requests
        }
        self._fronts.clear()
        return errors


def _rest(delivery: anchor_link.Delivery, given_of_it: int) -> bytes | None:
    """What is new in an output whose first `given_of_it` tokens were given before.

    Empty if nothing is; None if tokens before it are missing, or if it can't be cut. Engines send
    an output again as it was, so a cut is needed only where an end was added to it.
    """
    if given_of_it < 0:
        return None
    left = delivery.token_count - given_of_it
    if left < 0 or (left == 0 and not delivery.finished):
        return b""
    output = enginecore.decode_output(delivery.payload)
    if left and output.new_logprobs != _NIL:
        return None
    output.new_token_ids = output.new_token_ids[given_of_it:]
    output.new_logprobs = _NIL
    return enginecore.encode(output)


_NIL = enginecore.EngineOutput("", []).new_logprobs
