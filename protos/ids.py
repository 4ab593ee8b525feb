"""Identifiers, each a type of its own so that one is never taken for another."""

from __future__ import annotations

from typing import NewType

WorkerId = NewType("WorkerId", str)
"""Names a worker for as long as its pool slot lives; a replaced worker gets a new one."""

RouterId = NewType("RouterId", str)
"""Names a router unit; the same over restarts of its router process."""

Incarnation = NewType("Incarnation", int)
"""Start of a process in nanoseconds since the epoch: a later start fences an earlier one."""

TicketId = NewType("TicketId", str)
"""What a client knows its request by: X-Request-Id of the response, and part of its `id`."""

RequestKey = NewType("RequestKey", str)
"""One engine request within a router: `FRONT:REQUEST_ID`. A ticket may cover several."""

Attempt = NewType("Attempt", int)
"""Counts the submissions of one request to workers; a larger one fences the smaller ones."""


def request_key(front: int, request_id: str) -> RequestKey:
    """The key of what front number `front` calls `request_id`."""
    return RequestKey(f"{front}:{request_id}")


def split_request_key(key: RequestKey) -> tuple[int, str]:
    """The front number and its request id; the inverse of `request_key`."""
    front, _, request_id = key.partition(":")
    return int(front), request_id
