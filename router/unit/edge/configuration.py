"""HAProxy's configuration: which path goes where, limits, and errors in the clients' form.

Boundary: settings in, text out. Whether a request may go on, and to which front, `ticket.lua`
finds out; when HAProxy runs is the anchor's.

How each request that got a ticket ended goes to the router over `UnitPaths.edge_log_socket`, a
line each, its fields parted by tabs. While no router listens they are kept, and are sent later (a
datagram is lost where more than ten wait, which is Linux's default); lost are the first ones after
a router's death, since HAProxy learns of it by writing to it:
`v1 ticket=T status=N front=F end=XY request_bytes=N response_bytes=N first_byte_ms=N total_ms=N`.
`F` is the front that it went to, `fast` or `full`. `XY` are the first two characters of HAProxy's
session state. `--`: an orderly end. First `C` or `c`: the client left, or took nothing any more.
First `S` or `s`: the front died, or said nothing for an hour. First `P` or `L`: the edge answered
itself. A time is -1 if it never came to that. What is no HTTP at all is logged too, with `-` as its
ticket.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from router.settings import UnitPaths, UnitSettings
from router.unit.edge import errors
from router.unit.edge.errors import quoted, refusal
from router.unit.fronts import launch as fronts
from router.unit.fronts.requests import RESPONSES_PATH

CHOSEN_PATHS: Final = ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize")
"""Served by the fast front unless the body asks for more than it can do."""
ANTHROPIC_PATHS: Final = ("/v1/messages", "/v1/messages/count_tokens")
MODEL_PATHS: Final = ("/v1/models",)
ROUTER_PATHS: Final = ("/health", "/metrics")
OPERATOR_PATHS: Final = ("/cluster", "/dashboard")
"""Also everything below them."""

_BUFFER_BYTES: Final = 64 * 1024
"""A prompt of 4,096 tokens fits, as text or as numbers; a larger body goes to the full front."""
_SURELY_SEEN_BYTES: Final = _BUFFER_BYTES // 2
"""Below this the buffer can't have been full."""
_HEADER_BYTES: Final = 16 * 1024

_SEND_BUFFER_BYTES: Final = 128 * 1024
"""Half a thousand events. Left alone, the system keeps 4 MiB for a client that reads nothing."""

_REQUEST_S: Final = 10
"""For a request's head, and once more for the part of its body that the edge reads."""

TICKET_IDLE_S: Final = 60
"""How long a connection to the router is kept for the next question."""
_LINE_BYTES: Final = 2048
_KEPT_LOG_BYTES: Final = 4 * 1024 * 1024

_MAX_THREADS: Final = 4
"""One thread passes thousands of requests a second; a core each would only take memory."""
_MAX_DESCRIPTORS: Final = 65_536
_OTHER_DESCRIPTORS: Final = 1_000
"""Beside two for each client: listeners, checks, connections to the router, idle ones."""
_SPARE_CONNECTIONS: Final = 256
"""To tell further clients that there are too many."""


def configuration(settings: UnitSettings, paths: UnitPaths, listen_fd: int) -> str:
    """The text of haproxy.cfg, for a listening socket that HAProxy inherits."""
    threads = min(_MAX_THREADS, len(os.sched_getaffinity(0)))
    clients = _most_clients(settings)
    return f"""\
global
    nbthread {threads}
    fd-hard-limit {_MAX_DESCRIPTORS}
    maxconn {clients + _SPARE_CONNECTIONS}
    noreuseport
    tune.bufsize {_BUFFER_BYTES}
    tune.sndbuf.client {_SEND_BUFFER_BYTES}
    lua-load-per-thread {_script(settings, paths)}
    log ring@router len {_LINE_BYTES} format raw local0

ring router
    format raw
    maxlen {_LINE_BYTES}
    size {_KEPT_LOG_BYTES}
    timeout connect 1s
    timeout server 1h
    server router {_unix(paths.edge_log_socket)} log-proto legacy

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
    # On a connection used before, HAProxy takes a front's death for the end of a keep-alive: no
    # answer, no line in the log.
    option http-server-close
    timeout connect 5s
    timeout http-request {_REQUEST_S}s
    timeout http-keep-alive 75s
    # The client's runs only while it must send or take something; the server's between two events.
    timeout client {round(settings.silent_client_s * 1000)}ms
    timeout server 1h
    timeout tunnel 1h

{_frontend(settings, paths, listen_fd, clients)}

{_backends(settings, paths)}
"""


def _most_clients(settings: UnitSettings) -> int:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = hard == resource.RLIM_INFINITY
    descriptors = _MAX_DESCRIPTORS if unlimited else min(hard, _MAX_DESCRIPTORS)
    possible = (descriptors - _OTHER_DESCRIPTORS) // 2 - _SPARE_CONNECTIONS
    return max(1, min(settings.max_connections, possible))


def _frontend(settings: UnitSettings, paths: UnitPaths, listen_fd: int, clients: int) -> str:
    default = "full" if settings.vllm_rs is None else "fast"
    return f"""\
frontend edge
    bind fd@{listen_fd}
    bind {_unix(paths.edge_socket)} mode 600
    log global
    log-format {_log_format()}
{errors.internal("openai")}

    acl asks_openai path {" ".join((*CHOSEN_PATHS, RESPONSES_PATH))}
    acl asks_responses path {RESPONSES_PATH}
    acl asks_anthropic path {" ".join(ANTHROPIC_PATHS)}
    acl asks_models path {" ".join(MODEL_PATHS)}
    acl asks_router path {" ".join(ROUTER_PATHS)}
    acl asks_operator path {" ".join(OPERATOR_PATHS)}
    acl asks_operator path_beg {" ".join(f"{path}/" for path in OPERATOR_PATHS)}

    http-request set-log-level silent
{_refusals(settings.max_body_bytes, clients)}

    # What only Baton may tell a front.
    http-request del-header X-Vllm- -m beg
    http-request del-header X-Session-Id
    http-request del-header X-Request-Id
{_admission("if asks_openai")}
    http-request set-header X-Session-Id %[var(txn.ticket)] if asks_responses
    http-after-response set-header X-Request-Id %[var(txn.ticket)] if {{ var(txn.ticket) -m found }}

    # The router knows its workers, the edge its fronts; a request can be served with both.
    http-request deny deny_status 503 if {{ path /health }} {{ nbsrv({default}) lt 1 }}

    use_backend router if asks_router
    use_backend operator if asks_operator
    use_backend anthropic if asks_anthropic
    use_backend full if {{ var(txn.front) -m str full }}
    default_backend {default}"""


def _admission(condition: str = "") -> str:
    """A ticket, or an answer: for the requests that make work."""
    got_ticket = "if { var(txn.ticket) -m found }"
    # HAProxy goes on after a script that it broke off, as it does on a machine without a core free.
    got_nothing = f"{condition or 'if'} !{{ var(txn.ticket) -m found }}"
    return f"""\
    http-request wait-for-body time {_REQUEST_S}s {condition}
    http-request lua.admit {condition}
    http-request deny deny_status 503 {got_nothing}
    http-request set-log-level info {got_ticket}
    http-request set-header X-Request-Id %[var(txn.ticket)] {got_ticket}"""


def _backends(settings: UnitSettings, paths: UnitPaths) -> str:
    full_server = f"{_unix(paths.front_socket(fronts.FULL, 'http'))} check inter 1s fall 3 rise 1"
    full_rules = """\
    option httpchk GET /health
    timeout check 2s"""
    backends = [
        _front("full", "openai", "full", full_rules, full_server),
        # Its own for the form of its errors.
        _front(
            "anthropic",
            "anthropic",
            "full",
            f"{errors.internal('anthropic')}\n{_admission()}",
            f"{_unix(paths.front_socket(fronts.FULL, 'http'))} track full/front",
        ),
        f"""\
backend router
    server router {_unix(paths.router_socket)}

backend operator
    server operator {settings.admin_address}""",
    ]
    if settings.vllm_rs is not None:
        fast_rules = """\
    option httpchk GET /health
    timeout check 5s"""
        socket = _unix(paths.front_socket(fronts.FAST, "http"))
        server = f"{socket} check inter 500ms fall 3 rise 1"
        backends.insert(0, _front("fast", "openai", "fast", fast_rules, server))
    return "\n\n".join(backends)


def _front(name: str, form: str, front: str, rules: str, server: str) -> str:
    failed = "if { status ge 500 } { var(txn.ticket) -m found }"
    return f"""\
backend {name}
{rules}
    http-response set-header X-Baton-Front {front}
    http-response wait-for-body time 1s {failed}
    http-response lua.explain {form} {failed}
    server front {server}"""


def _log_format() -> str:
    fields = {
        "ticket": "%[var(txn.ticket)]",
        "status": "%ST",
        "front": "%[var(txn.front)]",
        "end": "%ts",
        "request_bytes": "%U",
        "response_bytes": "%B",
        "first_byte_ms": "%Tr",
        "total_ms": "%Ta",
    }
    return '"' + "\\t".join(["v1", *(f"{name}={value}" for name, value in fields.items())]) + '"'


def _refusals(max_body_bytes: int, clients: int) -> str:
    """What the edge answers before it reads a body, in the order of the rules."""
    listed = "asks_openai asks_anthropic asks_models asks_router asks_operator"
    unlisted = " ".join(f"!{name}" for name in listed.split())
    method = "%[method] is not allowed on %[path,json(utf8s)]"
    post, get = {"Allow": "POST"}, {"Allow": "GET"}
    not_theirs = "is not the client's to set; leave it out."
    rules = [
        refusal(
            503,
            "too_many_connections",
            f"The server has {clients} connections, its limit; try again.",
            f"!asks_router !asks_operator {{ fe_conn gt {clients} }}",
            {"Retry-After": "1", "Connection": "close"},
        ),
        refusal(404, "not_found", "There is nothing at %[path,json(utf8s)].", unlisted),
        refusal(405, "method_not_allowed", f"{method}; use POST.", "asks_openai !METH_POST", post),
        refusal(
            405, "method_not_allowed", f"{method}; use POST.", "asks_anthropic !METH_POST", post
        ),
        refusal(405, "method_not_allowed", f"{method}; use GET.", "asks_models !METH_GET", get),
        refusal(405, "method_not_allowed", f"{method}; use GET.", "asks_router !METH_GET", get),
        refusal(
            413,
            "body_too_large",
            f"The body is larger than {max_body_bytes} bytes.",
            f"{{ req.hdr_val(content-length) gt {max_body_bytes} }}",
        ),
        refusal(
            431,
            "headers_too_large",
            f"The headers are larger than {_HEADER_BYTES} bytes.",
            f"{{ req.hdrs,length gt {_HEADER_BYTES} }}",
        ),
        *(
            refusal(
                400, "internal_header", f"{name} {not_theirs}", f"{{ req.hdr({name}) -m found }}"
            )
            for name in ("X-Vllm-Priority", "X-Data-Parallel-Rank")
        ),
    ]
    return "\n".join(rules)


def _script(settings: UnitSettings, paths: UnitPaths) -> str:
    here = Path(__file__)
    words = [
        quoted(str(here.with_name("ticket.lua"))),
        quoted(str(paths.ticket_socket)),
        quoted(str(here.with_name("request_body.lua"))),
        str(settings.max_model_len_tokens),
        str(_SURELY_SEEN_BYTES),
        "full" if settings.vllm_rs is None else "fast",
        str(TICKET_IDLE_S),
    ]
    return " ".join(words)


def _unix(path: Path) -> str:
    return f"unix@{quoted(str(path))}"


def arguments(settings: UnitSettings, paths: UnitPaths) -> Sequence[str]:
    """The command line: in the foreground, one process."""
    return [settings.haproxy, "-db", "-f", str(paths.edge_config)]
