"""The gRPC front as a process alone: behind an edge that the test plays, or none."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from running_unit import ROOT

from protos.inference_pb2 import GenerateRequest
from protos.inference_pb2_grpc import InferenceStub
from router.settings import UnitPaths, UnitSettings, save
from router.unit.grpc_front import calls as grpc_calls
from router.unit.grpc_front import launch as grpc_launch
from tests.free_ports import free_port
from tests.processes import ends_with_us

METHOD = "/baton.v1.Inference/Generate"
REQUEST = GenerateRequest(text="Hello")
EVENT = b'data: {"choices":[{"text":"hello","token_ids":[5]}]}\n\n'
FAILED = b'data: {"error":{"message":"Internal server error","code":"server_error"}}\n\n'
Answer = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class Front:
    """The process alone, in a directory of its own."""

    def __init__(self, directory: Path, port: int) -> None:
        self.paths = UnitPaths(directory)
        self.port = port
        self.healthy = True
        self.settings = UnitSettings(
            router_id="test",
            listen_host="127.0.0.1",
            listen_port=1,
            model="m",
            served_model_names=["m"],
            vllm_rs="",
            haproxy="",
            admin_address="",
            router_command=[],
            max_model_len_tokens=1,
            grpc_port=port,
            environment={"PYTHONPATH": str(ROOT)},
        )
        directory.mkdir()
        save(self.paths.unit_settings, self.settings)
        command = grpc_launch.command(self.settings, self.paths)
        with (directory / "grpc.log").open("wb") as log:
            self.process = subprocess.Popen(
                command.arguments,
                env=dict(command.environment),
                stderr=log,
                preexec_fn=ends_with_us,
            )

    @property
    def log(self) -> str:
        return (self.paths.directory / "grpc.log").read_text()

    async def play_edge(self, answer: Answer) -> None:
        async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            head = await reader.readuntil(b"\r\n\r\n")
            if head.startswith(b"GET /health"):
                status = b"200 OK" if self.healthy else b"503 Service Unavailable"
                writer.write(b"HTTP/1.1 " + status + b"\r\nContent-Length: 0\r\n\r\n")
            else:
                writer.write(b"HTTP/1.1 200 OK\r\nX-Request-Id: id\r\n")
                writer.write(b"Transfer-Encoding: chunked\r\n\r\n")
                await answer(reader, writer)
            writer.close()

        await asyncio.start_unix_server(handle, self.paths.edge_socket)

    def end(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(5)


@pytest.fixture
async def front(tmp_path: Path) -> AsyncIterator[Front]:
    front = Front(tmp_path / "f", free_port())
    yield front
    if front.process.poll() is None:
        front.process.kill()
        front.process.wait()


async def answer_nothing(_: asyncio.StreamReader, __: asyncio.StreamWriter) -> None:
    pass


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


async def drain(call: Any) -> None:
    while await call.read() is not grpc.aio.EOF:
        pass


def stub_of(channel: grpc.aio.Channel) -> Any:
    return InferenceStub(channel)


async def test_without_an_edge_it_says_so(front: Front) -> None:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{front.port}") as channel:
        call = stub_of(channel).Generate(REQUEST, wait_for_ready=True)
        assert await call.code() is grpc.StatusCode.UNAVAILABLE
        assert await call.details() == "The edge can't be reached; try again."
        health = health_pb2_grpc.HealthStub(channel)
        answer = await health.Check(health_pb2.HealthCheckRequest())
        assert answer.status == health_pb2.HealthCheckResponse.NOT_SERVING
    assert front.end() == 0


async def test_health_follows_the_edges(front: Front) -> None:
    status = health_pb2.HealthCheckResponse
    async with grpc.aio.insecure_channel(f"127.0.0.1:{front.port}") as channel:
        health = health_pb2_grpc.HealthStub(channel)
        watches = [
            health.Watch(health_pb2.HealthCheckRequest(service=service), wait_for_ready=True)
            for service in ("", "baton.v1.Inference")
        ]

        async def told() -> set[int]:
            return {(await asyncio.wait_for(watch.read(), 10)).status for watch in watches}

        assert await told() == {status.NOT_SERVING}
        await front.play_edge(answer_nothing)
        assert await told() == {status.SERVING}
        front.healthy = False
        assert await told() == {status.NOT_SERVING}
        front.healthy = True
        assert await told() == {status.SERVING}
        unknown = health.Watch(health_pb2.HealthCheckRequest(service="other"))
        assert (await unknown.read()).status == status.SERVICE_UNKNOWN


async def test_an_error_event_tells_what_the_router_has_on_record(front: Front) -> None:
    async def fail(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(chunk(EVENT + FAILED + b"data: [DONE]\n\n") + chunk(b""))

    async def tell(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"GET /requests/id HTTP/1.1")
        record = {"end": "failed", "error": "decode-0 died", "fault": "worker_lost"}
        body = json.dumps({"requests": [record]}).encode()
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        writer.close()

    await front.play_edge(fail)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{front.port}") as channel:
        call = stub_of(channel).Generate(REQUEST, wait_for_ready=True)
        assert (await call.read()).text == "hello"
        assert (await call.code(), await call.details()) == (
            grpc.StatusCode.INTERNAL,
            "Internal server error",
        )
        await asyncio.start_unix_server(tell, front.paths.router_socket)
        call = stub_of(channel).Generate(REQUEST)
        assert (await call.read()).text == "hello"
        assert (await call.code(), await call.details()) == (
            grpc.StatusCode.UNAVAILABLE,
            "decode-0 died",
        )


async def test_a_client_that_does_not_read_is_not_read_for(front: Front) -> None:
    """And costs others nothing."""
    sent = 0
    left = asyncio.Event()

    async def pour(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        try:
            while not reader.at_eof():
                writer.write(chunk(EVENT * 1000))
                await writer.drain()
                sent += 1000
        except ConnectionError:
            left.set()

    async def settled() -> int:
        while True:
            before = sent
            await asyncio.sleep(1)
            if before == sent:
                return sent

    await front.play_edge(pour)
    rss = psutil.Process(front.process.pid).memory_info
    async with (
        grpc.aio.insecure_channel(f"127.0.0.1:{front.port}") as channel,
        grpc.aio.insecure_channel(
            f"127.0.0.1:{front.port}", options=[("grpc.use_local_subchannel_pool", 1)]
        ) as others,
    ):
        idle = stub_of(channel).Generate(REQUEST, wait_for_ready=True)
        await idle.read()
        begun = rss().rss
        stopped_at = await asyncio.wait_for(settled(), 30)
        assert rss().rss - begun < 64 << 20
        # It waits for its reader for as long as it takes, while another's stream goes on.
        quick = stub_of(others).Generate(REQUEST)
        got = 0
        while got < 2 * stopped_at:
            got += len((await quick.read()).token_ids)
        quick.cancel()
        await asyncio.wait_for(left.wait(), 5)
        left.clear()
        assert (await idle.read()).token_ids
        idle.cancel()
        await asyncio.wait_for(left.wait(), 5)


async def test_when_it_ends_its_streams_do_not_look_complete(front: Front) -> None:
    async def pour(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while not writer.is_closing():
            writer.write(chunk(EVENT))
            await asyncio.sleep(0.01)

    await front.play_edge(pour)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{front.port}") as channel:
        call = stub_of(channel).Generate(REQUEST, wait_for_ready=True)
        await call.read()
        front.process.send_signal(signal.SIGTERM)
        with pytest.raises(grpc.aio.AioRpcError):
            await drain(call)
        assert await call.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
    assert await asyncio.to_thread(front.process.wait, 5) == 0
    assert "Traceback" not in front.log


async def test_a_request_that_does_not_come_is_not_waited_for_for_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(grpc_calls, "_REQUEST_LIMIT_S", 0.2)
    async with aiohttp.ClientSession() as nobody:
        server = grpc.aio.server()
        server.add_generic_rpc_handlers((grpc_calls.Inference(nobody, nobody, 1).handler(),))
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            call = channel.stream_stream(METHOD)()
            assert await call.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            assert "did not come within" in await call.details()
        await server.stop(None)


async def test_a_port_that_is_taken_is_one_sentence(front: Front, tmp_path: Path) -> None:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{front.port}") as channel:
        await asyncio.wait_for(channel.channel_ready(), 10)
    second = Front(tmp_path / "second", front.port)
    assert await asyncio.to_thread(second.process.wait, 10) == 3
    assert f"can't listen on 127.0.0.1 port {front.port}" in second.log
    assert "Traceback" not in second.log


def test_settings_that_cannot_be_read_are_one_sentence(tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "router.unit.grpc_front.process", str(tmp_path)],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        check=False,
        timeout=30,
    )
    assert ended.returncode == 2
    (line,) = ended.stderr.decode().splitlines()
    assert "can't use" in line


def loaded(module: str) -> set[str]:
    """The packages that importing it brings."""
    code = f"import json, sys, {module}; print(json.dumps([*sys.modules]))"
    names = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, check=True, timeout=60
    ).stdout
    return {name.partition(".")[0] for name in json.loads(names)}


def test_it_loads_what_it_needs_and_its_anchor_none_of_it() -> None:
    front = loaded("router.unit.grpc_front.process")
    assert {"grpc", "aiohttp"} <= front
    assert not front & {"vllm", "torch", "ray", "transformers"}
    anchor = loaded("router.unit.anchor.process, router.unit.grpc_front.launch")
    assert not anchor & {"grpc", "aiohttp", "google"}
