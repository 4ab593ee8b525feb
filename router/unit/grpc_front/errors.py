"""How a call of the gRPC API ends if not well: HTTP errors, error events and records as statuses.

Pure.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import msgspec
from grpc import StatusCode
from msgspec import Struct

from router.core.events import End, Fault
from router.tickets import FAULT_STATUS

_LONGEST_MESSAGE_BYTES: Final = 1500
"""A status travels in a header, where each byte may take three, and clients take 8 KiB of them."""

_STATUSES: Final = {
    400: StatusCode.INVALID_ARGUMENT,
    401: StatusCode.UNAUTHENTICATED,
    403: StatusCode.PERMISSION_DENIED,
    404: StatusCode.NOT_FOUND,
    408: StatusCode.UNAVAILABLE,
    409: StatusCode.ABORTED,
    413: StatusCode.RESOURCE_EXHAUSTED,
    422: StatusCode.INVALID_ARGUMENT,
    429: StatusCode.RESOURCE_EXHAUSTED,
    499: StatusCode.CANCELLED,
    502: StatusCode.UNAVAILABLE,
    503: StatusCode.UNAVAILABLE,
    504: StatusCode.DEADLINE_EXCEEDED,
}


class Failure(Exception):
    """How a call ends if not well."""

    def __init__(
        self,
        code: StatusCode,
        message: str,
        retry_after_s: str | None = None,
        request_id: str | None = None,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.message = message.encode()[:_LONGEST_MESSAGE_BYTES].decode(errors="ignore")
        self.retry_after_s = retry_after_s
        self.request_id = request_id

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What goes out with the status."""
        named = (("retry-after", self.retry_after_s), ("x-request-id", self.request_id))
        return tuple((name, value) for name, value in named if value is not None)


class ErrorEvent(Failure):
    """The stream told that the request failed; why, the router may have on record."""


class ApiError(Struct):
    """The API's own form of an error; `code` may be an HTTP status."""

    message: str
    code: int | str | None = None


class _ErrorBody(Struct):
    error: ApiError


class _Request(Struct):
    end: str | None = None
    error: str = ""
    fault: str | None = None


class _Story(Struct):
    requests: list[_Request]


def http_failure(status: int, body: bytes, headers: Mapping[str, str]) -> Failure:
    """What an answer stands for whose status is not 200."""
    try:
        message = msgspec.json.decode(body, type=_ErrorBody).error.message
    except msgspec.DecodeError:
        message = f"The edge answered with HTTP status {status}."
    return Failure(_code(status), message, headers.get("Retry-After"), headers.get("X-Request-Id"))


def recorded_failure(story: bytes) -> Failure | None:
    """The reason that the router has on record, which an error event does not tell."""
    try:
        requests = msgspec.json.decode(story, type=_Story).requests
    except msgspec.DecodeError:
        return None
    for request in requests:
        if request.end == End.FAILED and request.fault is not None:
            status, wait_s = FAULT_STATUS[Fault(request.fault)]
            return Failure(_code(status), request.error, None if wait_s is None else str(wait_s))
    return None


def event_failure(error: ApiError) -> ErrorEvent:
    """What an event stands for that tells an error."""
    code = _code(error.code) if isinstance(error.code, int) else StatusCode.INTERNAL
    return ErrorEvent(code, error.message)


def _code(status: int) -> StatusCode:
    if status in _STATUSES:
        return _STATUSES[status]
    return StatusCode.INVALID_ARGUMENT if 400 <= status < 500 else StatusCode.INTERNAL
