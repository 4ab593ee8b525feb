"""What the edge answers by itself: refusals by path, method and size, and HAProxy's own errors.

Boundary: lines of HAProxy's configuration. Errors have OpenAI's form, and Anthropic's for its
clients.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, Final

FORMS: Final = ("openai", "anthropic")

_ANTHROPIC_TYPES: Final = {
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    503: "overloaded_error",
    504: "timeout_error",
}

_INTERNAL: Final = {
    400: "The request is no valid HTTP, or did not come whole in time.",
    403: "The request is not allowed.",
    408: "The request did not arrive in time.",
    500: "The edge failed on this request.",
    502: "The process that served this request ended; try again.",
    503: "The process that serves this path is starting; try again.",
    504: "The process that serves this path did not answer in time.",
}
"""HAProxy's own errors; 503 is what a restart looks like, and it is short."""


def _openai(status: int, message: str, code: str | int) -> dict[str, Any]:
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


def _anthropic(status: int, message: str, _: str | int) -> dict[str, Any]:
    default = "invalid_request_error" if status < 500 else "api_error"
    kind = _ANTHROPIC_TYPES.get(status, default)
    return {"type": "error", "error": {"type": kind, "message": message}}


_BODIES: Final[dict[str, Callable[[int, str, str | int], dict[str, Any]]]] = {
    "openai": _openai,
    "anthropic": _anthropic,
}
"""By form: an error's body for a status, a message and a code."""


def internal(form: str) -> str:
    """HAProxy's own errors, for a section of the configuration.

    What is no HTTP at all gets HAProxy's 400, whose body can't be changed.
    """
    lines = []
    for status, message in _INTERNAL.items():
        retry = " hdr Retry-After 1" if status == 503 else ""
        body = quoted(json.dumps(_BODIES[form](status, message, status)))
        lines.append(
            f"    http-error status {status} content-type application/json string {body}{retry}"
        )
    return "\n".join(lines)


def refusal(
    status: int, code: str, message: str, condition: str, headers: dict[str, str] | None = None
) -> str:
    """A rule in both forms. `message` may hold HAProxy's own %[expressions].

    It needs the ACL `asks_anthropic`.
    """
    extra = "".join(f" hdr {name} {value}" for name, value in (headers or {}).items())
    return "\n".join(
        f"    http-request return status {status} content-type application/json "
        f"lf-string {quoted(json.dumps(_BODIES[form](status, message, code)))}{extra} "
        f"if {condition} {'' if form == 'anthropic' else '!'}asks_anthropic"
        for form in FORMS
    )


def quoted(text: str) -> str:
    """A word of HAProxy's configuration; strong quotes keep all but a quote as it is."""
    return "'" + text.replace("'", "'\\''") + "'"
