"""The full front: vLLM's Python API server, with the anchor as its engine.

    python -m router.unit.fronts.full_front UNIT_DIR HTTP_FD

Boundary: it starts vLLM's own server, unpatched, on an inherited listening socket. What is answered
on it until then is `loading`'s business, what is checked of requests and responses around it
`middleware`'s.
"""

from __future__ import annotations

import asyncio
import http.client
import socket
import sys
import time
from argparse import Namespace
from pathlib import Path
from typing import Any, Final

from router.settings import UnitPaths, UnitSettings, load_unit
from router.unit.fronts import launch as fronts
from router.unit.fronts.loading import Loading
from router.unit.fronts.middleware import FrontMiddleware

_ASK_EVERY_S: Final = 0.25


def main() -> None:
    """Run the full front of the unit that the command line names."""
    if len(sys.argv) != 3:
        sys.exit("usage: python -m router.unit.fronts.full_front UNIT_DIR HTTP_FD")
    paths = UnitPaths(sys.argv[1])
    settings = load_unit(paths.unit_settings)
    listener = socket.socket(fileno=int(sys.argv[2]))
    loading = Loading(listener)
    if settings.vllm_rs is not None:
        # Loading vLLM takes the cores that the engines need to start; the fast front is up first.
        _wait_until_healthy(paths.router_socket)
    import uvloop

    uvloop.run(_serve(settings, paths, listener, loading))


def _wait_until_healthy(router_socket: Path) -> None:
    """Until the router says that a request can be served."""
    while not _is_healthy(router_socket):
        time.sleep(_ASK_EVERY_S)


def _is_healthy(router_socket: Path) -> bool:
    connection = http.client.HTTPConnection("router", timeout=5)
    connection.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.sock.connect(str(router_socket))
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


async def _serve(
    settings: UnitSettings, paths: UnitPaths, listener: socket.socket, loading: Loading
) -> None:
    """Until SIGTERM; raises what keeps vLLM from starting."""
    import zmq
    from vllm.entrypoints.launchers.api_server.app_state import init_app_state
    from vllm.entrypoints.launchers.api_server.entry import build_async_engine_client
    from vllm.entrypoints.launchers.app import build_app
    from vllm.entrypoints.launchers.launcher import serve_http

    arguments = _arguments(settings)
    addresses = {
        "input_address": f"ipc://{paths.front_socket(fronts.FULL, 'input')}",
        "output_address": f"ipc://{paths.front_socket(fronts.FULL, 'output')}",
        "client_count": 1,
        "client_index": 0,
    }
    async with build_async_engine_client(arguments, client_config=addresses) as engine:
        # An engine that connects again under its name is served, the connection before is over.
        engine.engine_core.input_socket.setsockopt(zmq.ROUTER_HANDOVER, 1)
        tasks = await engine.get_supported_tasks()
        # As vLLM's own `build_and_serve`, which leaves no place for a middleware with settings.
        app = build_app(arguments, tasks, engine.model_config)
        # Outermost, so that it also sees the errors that no handler of vLLM's takes.
        app.middleware_stack = FrontMiddleware(
            app.middleware_stack or app.build_middleware_stack(),
            max_body_bytes=settings.max_body_bytes,
            keep_alive_s=settings.stream_keep_alive_s,
        )
        await init_app_state(engine, app.state, arguments, tasks)
        await asyncio.to_thread(loading.close)
        ended = await serve_http(
            app,
            sock=listener,
            enable_ssl_refresh=False,
            port=0,
            log_level="warning",
            access_log=False,
            timeout_keep_alive=fronts.KEEP_ALIVE_S,
        )
    await ended


def _arguments(settings: UnitSettings) -> Namespace:
    """What vLLM's command line would make of the settings."""
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    arguments: Namespace = make_arg_parser(FlexibleArgumentParser()).parse_args([])
    wanted: dict[str, Any] = {
        **fronts.common_arguments(settings),
        "max_model_len": settings.max_model_len_tokens,
    }
    for name, value in wanted.items():
        assert hasattr(arguments, name), f"vLLM has no argument {name}"
        setattr(arguments, name, value)
    validate_parsed_serve_args(arguments)
    return arguments


if __name__ == "__main__":
    main()
