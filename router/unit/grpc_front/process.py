"""The gRPC front: `python -m router.unit.grpc_front.process UNIT_DIR`.

A server for `baton.v1.Inference` (`calls`), health, which follows the edge's /health, and
reflection. It reaches everything on the unit's Unix sockets and dies with its anchor.

Exit codes: 0 after SIGTERM, 2 unusable settings, 3 the port is taken.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import resource
import signal
import sys
from pathlib import Path
from typing import Final, NoReturn

import aiohttp
import grpc
import msgspec
import uvloop
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from router.settings import UnitPaths, UnitSettings, load_unit
from router.unit.grpc_front.calls import SERVICE, Inference

_log = logging.getLogger("grpc")

_HEALTH_EVERY_S: Final = 0.5
_HEALTH_LIMIT: Final = aiohttp.ClientTimeout(total=2.0)
_RECORD_LIMIT: Final = aiohttp.ClientTimeout(total=1.0)
_ANSWER_LIMIT: Final = aiohttp.ClientTimeout(total=None, sock_connect=5.0)
"""How long it may take is the client's deadline's business, and the router's."""
_KEEP_ALIVE_S: Final = 30.0
"""Under the edge's 75 s: it must not be the one that closes."""
_STOP_GRACE_S: Final = 0.5
_MOST_CALLS: Final = 8192
_DESCRIPTORS: Final = 4 * _MOST_CALLS

_OPTIONS: Final = (
    ("grpc.so_reuseport", 0),
    # Further calls wait in the client.
    ("grpc.max_concurrent_streams", 1024),
    ("grpc.server_handshake_timeout_ms", 10_000),
    # A client that is gone without a word is noticed after 80 s.
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.keepalive_permit_without_calls", 1),
    # One that asks more often than this whether we are here is sent away.
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
)


async def follow_health(edge: aiohttp.ClientSession, servicer: health.aio.HealthServicer) -> None:
    """Have the health service say what the edge's /health says, for ever."""
    known = None
    while True:
        serving = await _is_healthy(edge)
        if serving != known:
            await _set_health(servicer, serving)
            known = serving
        await asyncio.sleep(_HEALTH_EVERY_S)


async def _is_healthy(edge: aiohttp.ClientSession) -> bool:
    try:
        async with edge.get("/health", timeout=_HEALTH_LIMIT) as response:
            return bool(response.status == 200)
    except (aiohttp.ClientError, TimeoutError):
        return False


async def _set_health(servicer: health.aio.HealthServicer, serving: bool) -> None:
    status = health_pb2.HealthCheckResponse.ServingStatus
    for service in ("", SERVICE):
        await servicer.set(service, status.SERVING if serving else status.NOT_SERVING)


async def answer_probe(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Tell the anchor that this process lives: on the loop that serves all calls."""
    try:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
    except asyncio.IncompleteReadError:
        _log.info("a probe left before it had asked")
    writer.close()


async def run(paths: UnitPaths, settings: UnitSettings) -> int:
    """Serve until SIGTERM or SIGINT; returns the exit code."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    async with (
        _session("http://edge", paths.edge_socket, _ANSWER_LIMIT) as edge,
        _session("http://router", paths.router_socket, _RECORD_LIMIT) as router,
    ):
        servicer = health.aio.HealthServicer()
        await _set_health(servicer, False)
        server = _server(settings, Inference(edge, router, settings.max_body_bytes), servicer)
        if server is None:
            return 3
        await server.start()
        probed = await asyncio.start_unix_server(answer_probe, str(paths.grpc_socket))
        gc.collect()
        gc.freeze()
        follow = asyncio.create_task(follow_health(edge, servicer))
        stopped = asyncio.create_task(stop.wait())
        await asyncio.wait([follow, stopped], return_when=asyncio.FIRST_COMPLETED)
        follow.cancel()
        if not stop.is_set():
            follow.result()  # Raises what ended it.
        probed.close()
        await servicer.enter_graceful_shutdown()
        await server.stop(_STOP_GRACE_S)
    return 0


def _server(
    settings: UnitSettings, inference: Inference, servicer: health.aio.HealthServicer
) -> grpc.aio.Server | None:
    """All services, on the port; None if that can't be had."""
    options = (*_OPTIONS, ("grpc.max_receive_message_length", settings.max_body_bytes))
    server = grpc.aio.server(options=options, maximum_concurrent_rpcs=_MOST_CALLS)
    server.add_generic_rpc_handlers((inference.handler(),))
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    services = (SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME)
    reflection.enable_server_reflection(services, server)
    host, port = settings.grpc_host, settings.grpc_port
    try:
        server.add_insecure_port(f"[{host}]:{port}" if ":" in host else f"{host}:{port}")
    except RuntimeError:
        _log.error("can't listen on %s port %s: choose another grpc.host or grpc.port", host, port)
        return None
    return server


def _session(url: str, socket: Path, limit: aiohttp.ClientTimeout) -> aiohttp.ClientSession:
    return aiohttp.ClientSession(
        url,
        connector=aiohttp.UnixConnector(str(socket), limit=0, keepalive_timeout=_KEEP_ALIVE_S),
        headers={"Content-Type": "application/json"},
        cookie_jar=aiohttp.DummyCookieJar(),
        timeout=limit,
    )


def _allow_descriptors() -> None:
    """A call takes one, and the system may allow a thousand until asked."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _DESCRIPTORS if hard == resource.RLIM_INFINITY else min(_DESCRIPTORS, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def main() -> NoReturn:
    """Entry point."""
    logging.basicConfig(format="%(asctime)s %(name)s: %(message)s", level=logging.INFO)
    paths = UnitPaths(sys.argv[1])
    try:
        settings = load_unit(paths.unit_settings)
    except (OSError, msgspec.DecodeError) as error:
        _log.error("can't use %s: %s", paths.unit_settings, error)
        sys.exit(2)
    _allow_descriptors()
    sys.exit(uvloop.run(run(paths, settings)))


if __name__ == "__main__":
    main()
