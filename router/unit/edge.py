"""HAProxy's configuration: which path goes where, limits, and errors in OpenAI's form.

Boundary: settings in, text out. Whether a request may go on is the router's decision, asked for by
`ticket.lua`; when HAProxy runs is the anchor's.

How each request ended goes to the router's datagram socket (`UnitPaths.edge_log_socket`), one
datagram per request that asked for a ticket, its fields parted by tabs:
`v1 ticket=T status=N end=XY request_bytes=N response_bytes=N first_byte_ms=N total_ms=N`. `T` is
`-` if none was given; `XY` are the first two characters of HAProxy's session state, `--` after an
orderly end, `C.` if the client left, `S.` if the front did; a time is -1 if it never came to that.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from router.settings import UnitPaths, UnitSettings

TICKET_PATHS: Final = ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize")
MODEL_PATHS: Final = ("/v1/models",)
ROUTER_PATHS: Final = ("/health", "/metrics")
OPERATOR_PATHS: Final = ("/cluster", "/dashboard")
"""Also everything below them."""

FRONTS_BODY_BYTES: Final = 32 * 1024 * 1024
"""What `vllm-rs` takes at most; it has no setting for it."""
_TOO_LARGE: Final = "body_too_large"

_MAX_THREADS: Final = 4
"""One thread passes thousands of requests a second; a core each would only take memory."""
_MAX_DESCRIPTORS: Final = 65_536
"""A stream takes two, so about 32,000 at once; the system's own limit may be lower."""

_ERRORS: Final = {
    400: (
        "invalid_request_error",
        "The request is no valid HTTP, has too long headers, or did not come whole in time.",
    ),
    403: ("permission_error", "The request is not allowed."),
    408: ("invalid_request_error", "The request did not arrive in time."),
    500: ("server_error", "The edge failed on this request."),
    502: ("server_error", "The process that served this request ended; try again."),
    503: ("server_error", "The process that serves this path is starting; try again."),
    504: ("server_error", "The process that serves this path did not answer in time."),
}


def configuration(settings: UnitSettings, paths: UnitPaths, listen_fd: int) -> str:
    """The text of haproxy.cfg, for a listening socket that HAProxy inherits."""
    script = Path(__file__).with_name("ticket.lua")
    threads = min(_MAX_THREADS, len(os.sched_getaffinity(0)))
    return f"""\
global
    nbthread {threads}
    fd-hard-limit {_MAX_DESCRIPTORS}
    noreuseport
    lua-load-per-thread {_quoted(script)} {_quoted(paths.ticket_socket)}
    log {_quoted(paths.edge_log_socket)} len 2048 format raw local0

defaults
    mode http
    # An event must leave as it comes; the kernel would wait for more.
    option http-no-delay
    # A client that leaves before the answer began must reach the engine as an abort.
    option abortonclose
    option dontlognull
    retries 3
    # Nothing that a front may have begun to serve is sent to it twice.
    retry-on conn-failure
    timeout connect 5s
    timeout http-request 10s
    timeout http-keep-alive 75s
    # The client's runs only while it must send or take something; the server's between two events.
    timeout client 60s
    timeout server 1h
    timeout tunnel 1h
{_default_errors()}

frontend edge
    bind fd@{listen_fd}
    log global
    log-format {_log_format()}

    acl asks_ticket path {" ".join(TICKET_PATHS)}
    acl asks_models path {" ".join(MODEL_PATHS)}
    acl asks_router path {" ".join(ROUTER_PATHS)}
    acl asks_operator path {" ".join(OPERATOR_PATHS)}
    acl asks_operator path_beg {" ".join(f"{path}/" for path in OPERATOR_PATHS)}

    http-request set-log-level silent if !asks_ticket
{_refusals(settings.max_body_bytes)}

    # What only Baton may tell a front.
    http-request del-header X-Vllm- -m beg
    http-request del-header X-Data-Parallel-Rank
    http-request del-header X-Session-Id
    http-request del-header X-Request-Id
    http-request lua.ticket if asks_ticket
    http-request set-header X-Request-Id %[var(txn.ticket)] if asks_ticket
    http-after-response set-header X-Request-Id %[var(txn.ticket)] if {{ var(txn.ticket) -m found }}

    # The router knows its workers, the edge its front; a request can be served with both.
    http-request deny deny_status 503 if {{ path /health }} {{ nbsrv(front) lt 1 }}

    use_backend router if asks_router
    use_backend operator if asks_operator
    default_backend front

backend front
    http-reuse always
    option httpchk GET /health
    timeout check 5s
    # A chunked body shows its size to the front alone, which has a limit of its own.
    http-response wait-for-body time 1s if {{ status 400 }}
    http-response return status 413 content-type application/json string '{_FRONTS_LIMIT}' if \
{{ status 400 }} {{ res.body -m sub "length limit exceeded" }}
    server front-0 {_unix(paths.front_socket(0, "http"))} check inter 500ms fall 3 rise 1

backend router
    server router {_unix(paths.router_socket)}

backend operator
    server operator {settings.admin_address}
"""


def _log_format() -> str:
    fields = {
        "ticket": "%[var(txn.ticket)]",
        "status": "%ST",
        "end": "%ts",
        "request_bytes": "%U",
        "response_bytes": "%B",
        "first_byte_ms": "%Tr",
        "total_ms": "%Ta",
    }
    return '"' + "\\t".join(["v1", *(f"{name}={value}" for name, value in fields.items())]) + '"'


def _refusals(max_body_bytes: int) -> str:
    """What the edge answers by itself, in the order of the rules."""
    listed = "asks_ticket asks_models asks_router asks_operator"
    unlisted = " ".join(f"!{name}" for name in listed.split())
    method = "%[method] is not allowed on %[path,json(utf8s)]"
    rules = [
        _refusal(404, "not_found", "There is nothing at %[path,json(utf8s)].", unlisted),
        _refusal(
            405, "method_not_allowed", f"{method}; use POST.", "asks_ticket !METH_POST", "POST"
        ),
        _refusal(405, "method_not_allowed", f"{method}; use GET.", "asks_models !METH_GET", "GET"),
        _refusal(405, "method_not_allowed", f"{method}; use GET.", "asks_router !METH_GET", "GET"),
        _refusal(
            413,
            _TOO_LARGE,
            f"The body is larger than {max_body_bytes} bytes.",
            f"{{ req.hdr_val(content-length) gt {max_body_bytes} }}",
        ),
    ]
    return "\n".join(rules)


def _refusal(status: int, code: str, message: str, condition: str, allow: str | None = None) -> str:
    """`message` may hold HAProxy's own %[expressions]."""
    body = _error("invalid_request_error", message, code)
    allowed = "" if allow is None else f" hdr Allow {allow}"
    return (
        f"    http-request return status {status} content-type application/json "
        f"lf-string '{body}'{allowed} if {condition}"
    )


def _default_errors() -> str:
    """HAProxy's own errors; 503 is what a restart looks like, and it is short."""
    lines = []
    for status, (kind, message) in _ERRORS.items():
        retry = " hdr Retry-After 1" if status == 503 else ""
        body = _error(kind, message, status)
        lines.append(
            f"    http-error status {status} content-type application/json string '{body}'{retry}"
        )
    return "\n".join(lines)


def _error(kind: str, message: str, code: str | int) -> str:
    return json.dumps({"error": {"message": message, "type": kind, "param": None, "code": code}})


def _unix(path: Path) -> str:
    return f"unix@{_quoted(path)}"


def _quoted(path: Path) -> str:
    """A word of HAProxy's configuration; strong quotes keep all but a quote as it is."""
    return "'" + str(path).replace("'", "'\\''") + "'"


_FRONTS_LIMIT: Final = _error(
    "invalid_request_error", f"The body is larger than {FRONTS_BODY_BYTES} bytes.", _TOO_LARGE
)


def arguments(settings: UnitSettings, paths: UnitPaths) -> Sequence[str]:
    """The command line: in the foreground, one process."""
    return [settings.haproxy, "-db", "-f", str(paths.edge_config)]
