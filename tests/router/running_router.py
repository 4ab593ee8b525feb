"""A real router process between an anchor in the test and real workers with simulated engines.

The anchor's memory is the shipped one; only its sockets are the test's.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import msgspec

from engine.simulated.engine import SimulatedEngine
from engine.spec import SimulatedTiming, WorkerSpec
from protos import anchor_link, enginecore, membership
from protos.enginecore import EngineRequest
from router.settings import JointSettings, RouterSettings, SharePrefixes, UnitPaths, save
from router.ticket_mint import TicketMint
from router.unit.anchor.relay import Relay
from tests.processes import ends_with_us

ROOT = Path(__file__).parents[2]
TOKEN = "a token of the tests"
STEP_S = 0.004


@dataclass
class Stream:
    """What one request was given."""

    tokens: list[int] = field(default_factory=list)
    times_s: list[float] = field(default_factory=list)
    finish: int | None = None
    done: asyncio.Event = field(default_factory=asyncio.Event)

    async def whole(self) -> list[int]:
        await asyncio.wait_for(self.done.wait(), 20)
        return self.tokens

    async def begun(self, count: int = 1) -> None:
        await until(lambda: len(self.tokens) >= count)


class Anchor:
    """One front's requests, and whichever router connects."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._relay = Relay()
        self._writer: asyncio.StreamWriter | None = None
        self.streams: dict[str, Stream] = {}
        self.ready: list[enginecore.ReadyResponse] = []
        self.replies: list[bytes] = []
        self.hellos = 0

    async def listen(self) -> None:
        self._server = await asyncio.start_unix_server(self._serve, str(self._path))

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        splitter = anchor_link.Splitter()
        with contextlib.suppress(ConnectionError, asyncio.CancelledError):
            while data := await reader.read(65536):
                for body in splitter.feed(data):
                    self._take(anchor_link.from_router_decoder.decode(body), writer)
        if self._writer is writer:
            self._writer = None
        writer.close()

    def _take(self, message: anchor_link.FromRouter, writer: asyncio.StreamWriter) -> None:
        if isinstance(message, anchor_link.Hello):
            assert self._relay.admits(message.router_incarnation)
            self._writer = writer
            for part in self._relay.snapshot():
                self._send(part)
            self.hellos += 1
        elif isinstance(message, anchor_link.Ready):
            self.ready.append(enginecore.decode_ready(message.payload))
        elif isinstance(message, anchor_link.UtilityReply):
            self.replies.append(message.payload)
        else:
            given = self._relay.deliver(message.front, message.deliveries)
            assert not given.broken
            for payload in given.payloads:
                self._give(enginecore.decode_output(payload))

    def _give(self, output: enginecore.EngineOutput) -> None:
        stream = self.streams[output.request_id]
        stream.tokens += output.new_token_ids
        stream.times_s.append(time.monotonic())
        if output.finish_reason is not None:
            stream.finish = output.finish_reason
            stream.done.set()

    def _send(self, message: anchor_link.FromAnchor) -> None:
        if self._writer is not None:
            self._writer.write(anchor_link.encode(message))

    def ask(self, request: EngineRequest) -> Stream:
        stream = self.streams[request.request_id] = Stream()
        self._send(self._relay.add(0, enginecore.encode(request)))
        return stream

    def abort(self, request_id: str) -> None:
        message = self._relay.abort(0, enginecore.encode([request_id]))
        assert message is not None
        self._send(message)

    async def greeted(self, count: int) -> None:
        """So many routers have said Hello."""
        await until(lambda: self.hellos >= count)

    def utility(self, payload: bytes) -> None:
        self._send(anchor_link.Utility(0, payload))

    def close(self) -> None:
        self._server.close()
        if self._writer is not None:
            self._writer.close()


class Unit:
    """The directory, the anchor, the router process and the workers."""

    def __init__(
        self, directory: Path, local_prefill_max_tokens: int = 0,
        record_events: Path | None = None, joint: JointSettings | None = None,
        share_prefixes: SharePrefixes = "cluster", router_id: str = "unit",
    ) -> None:  # fmt: skip
        self.paths = UnitPaths(directory)
        settings = RouterSettings(
            router_id=router_id,
            link_token=TOKEN,
            expect_prefill=True,
            joint=joint,
            local_prefill_max_tokens=local_prefill_max_tokens,
            served_model_names=["tiny"],
            index_block_tokens=128,
            share_prefixes=share_prefixes,
            record_events=None if record_events is None else str(record_events),
        )
        save(self.paths.router_settings, settings)
        self.anchor = Anchor(self.paths.anchor_socket)
        self.workers: dict[str, subprocess.Popen[str]] = {}
        self._members: dict[str, membership.Member] = {}
        self._gone: list[membership.Gone] = []
        self._mint = TicketMint(TOKEN, 60.0)
        self._asked = 0
        self.router: subprocess.Popen[bytes] | None = None

    async def start(self, *workers: str, step_s: float = STEP_S) -> None:
        """Workers named p... and d..., and a router that sees them."""
        for worker in workers:
            self.start_worker(worker, step_s)
        await self._start_router()

    async def start_beside(self, other: Unit) -> None:
        """A router that sees another unit's workers."""
        self._members = dict(other._members)
        await self._start_router()

    async def _start_router(self) -> None:
        await self.anchor.listen()
        self.start_router()
        self.tell_members()
        await until(lambda: self.anchor.ready)
        await self.healthy()

    def start_router(self) -> None:
        command = [sys.executable, "-m", "router.process", str(self.paths.directory)]
        self.router = subprocess.Popen(command, cwd=ROOT, preexec_fn=ends_with_us)

    def start_worker(self, name: str, step_s: float = STEP_S, model: str = "none") -> None:
        role = "prefill" if name.startswith("p") else "decode"
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "tests.router.worker_process"),
                *(name, role, TOKEN, str(step_s), model),
            ],
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            preexec_fn=ends_with_us,
        )
        assert process.stdout is not None
        port, incarnation, weights = process.stdout.readline().split()
        self.workers[name] = process
        self._members[name] = membership.Member(
            name, int(incarnation), role, f"127.0.0.1:{port}", "here", process.pid, weights
        )

    def move_worker(self, name: str, port: int) -> int:
        """Let routers reach it through this port; returns its own."""
        member = self._members[name]
        host, _, own = member.address.rpartition(":")
        self._members[name] = msgspec.structs.replace(member, address=f"{host}:{port}")
        return int(own)

    def tell_members(self) -> None:
        told = membership.Membership(time.time_ns(), list(self._members.values()), self._gone)
        membership.save(self.paths.membership, told)

    def bury_worker(self, name: str, why: str) -> None:
        """It lives, but is no member any more."""
        member = self._members.pop(name)
        self._gone.append(membership.Gone(name, member.incarnation, why))
        self.tell_members()

    def kill_worker(self, name: str) -> None:
        self.workers[name].kill()
        self.workers.pop(name).wait()

    def kill_router(self, number: int = signal.SIGKILL) -> int:
        assert self.router is not None
        self.router.send_signal(number)
        return self.router.wait(10)

    def request(
        self, prompt_tokens: int, ticket: str | None = None, **params: Any
    ) -> EngineRequest:
        self._asked += 1
        ticket = ticket or self._mint.issue(time.time())
        prompt = [(self._asked * 7 + i) % 1000 for i in range(prompt_tokens)]
        sampling = {"max_tokens": 16, **params}
        return EngineRequest(
            f"cmpl-{ticket}-{self._asked}", prompt, None, sampling, None, 0.0, None, None, None,
            external_req_id=f"cmpl-{ticket}",
        )  # fmt: skip

    async def get(self, path: str) -> tuple[int, Any]:
        connector = aiohttp.UnixConnector(str(self.paths.router_socket))
        async with (
            aiohttp.ClientSession(connector=connector) as session,
            session.get(f"http://router{path}") as response,
        ):
            if response.content_type == "application/json":
                return response.status, await response.json()
            return response.status, await response.text()

    async def healthy(self) -> None:
        async with asyncio.timeout(10):
            while True:
                try:
                    if (await self.get("/health"))[0] == 200:
                        return
                except aiohttp.ClientError:
                    pass
                await asyncio.sleep(0.02)

    async def sees(self, count: int) -> None:
        """The router is attached to so many workers."""
        async with asyncio.timeout(10):
            while len((await self.get("/workers"))[1]["workers"]) != count:  # noqa: ASYNC110
                await asyncio.sleep(0.02)

    async def idle(self) -> None:
        """No worker runs anything or keeps a block."""
        async with asyncio.timeout(10):
            while True:
                _, answer = await self.get("/workers")
                loads = [worker["load"] for worker in answer["workers"]]
                if all(load["running"] == load["kv_blocks_used"] == 0 for load in loads):
                    return
                await asyncio.sleep(0.05)

    def close(self) -> None:
        self.anchor.close()
        for process in (self.router, *self.workers.values()):
            if process is not None:
                process.kill()
                process.wait()
        for process in self.workers.values():
            if process.stdout is not None:
                process.stdout.close()


async def until(condition: Callable[[], object], limit_s: float = 10.0) -> None:
    async with asyncio.timeout(limit_s):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.002)


async def expected(request: EngineRequest) -> list[int]:
    """What one engine alone makes of it."""
    spec = WorkerSpec(
        "reference", "decode", "simulated", "none", "/nonexistent", "",  # type: ignore[arg-type]
        engine_args={"num_gpu_blocks_override": 512, "max_model_len": 2048},
        simulated=SimulatedTiming(
            step_base_s=0.0, prefill_token_s=0.0, decode_request_s=0.0, transfer_block_s=0.0
        ),
    )  # fmt: skip
    engine = SimulatedEngine(spec)
    await engine.start()
    engine.add(enginecore.decode_request(enginecore.encode(request)))
    tokens: list[int] = []
    while True:
        for output in (await engine.step()).outputs:
            tokens += output.new_token_ids
            if output.finish_reason is not None:
                return tokens


def loaded_libraries(pid: int) -> set[str]:
    """Top-level packages that the process has mapped shared objects of."""
    maps = Path(f"/proc/{pid}/maps").read_text()
    paths = {line.split()[-1] for line in maps.splitlines() if "site-packages/" in line}
    return {path.split("site-packages/")[1].split(os.sep)[0] for path in paths}
