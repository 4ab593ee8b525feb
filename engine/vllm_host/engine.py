"""vLLM behind the `Engine` interface: starts the engine process and speaks its protocol.

Imports no vLLM (540 MB, 20 s): to the engine process this looks like one of vLLM's own fronts.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import os
import re
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Awaitable
from pathlib import Path
from typing import Final, TypeVar

import msgspec
import zmq.asyncio
from zmq.constants import Flag, SocketOption, SocketType

from engine.base import EngineInfo, EngineLoad, EngineStep
from engine.process_end import has_ended
from engine.spec import WorkerSpec
from engine.vllm_host import launch
from engine.vllm_host.counters import step_counters
from engine.vllm_host.threads import cpu_times_s, is_stopped
from engine.vllm_host.warmup import warm_up
from engine.watch import EngineWatch
from protos import enginecore
from protos.block_events import BlockEvent, decode_block_events
from protos.enginecore import EngineOutputs, EngineRequest
from protos.errors import EngineError

_T = TypeVar("_T")

_IDENTITY: Final = (0).to_bytes(2, "little")
_DEAD: Final = b"ENGINE_CORE_DEAD"
_START_TIMEOUT_S: Final = 1800.0
_STOP_TIMEOUT_S: Final = 5.0
_IDLE_AFTER_S: Final = 0.5
"""A pause between steps that is longer is idling, not a slow step."""
_LOOK_S: Final = 0.5
"""How often to see whether the engine hangs."""
_LOG_TAIL_BYTES: Final = 8000
_ERROR_LINE: Final = re.compile(r"[\w.]+(Error|Exception|Exit)\b: ")


class VllmEngine:
    """One vLLM engine in a child process."""

    connector_module: str = launch.CONNECTOR
    connector_class: str = launch.CONNECTOR_CLASS

    def __init__(self, spec: WorkerSpec) -> None:
        self._spec = spec
        self._directory = Path(spec.run_directory)
        self._launch_path = self._directory / "engine-launch.json"
        self._log_path = self._directory / "engine.log"
        self._context = zmq.asyncio.Context()
        self._input: zmq.asyncio.Socket = self._context.socket(SocketType.ROUTER)
        self._output: zmq.asyncio.Socket = self._context.socket(SocketType.PULL)
        self._process: subprocess.Popen[bytes] | None = None
        self._ended: asyncio.Task[int] | None = None
        self._watch = EngineWatch(time.monotonic())
        self._hang = ""
        """Why it was killed, if it hung."""
        self._unfinished: set[str] = set()
        """Requests that wait for a step."""
        self._kv_blocks_total = 0
        self._load = EngineLoad()
        self._last_step_s = 0.0
        self._untold_events: list[BlockEvent] = []
        """Of the blocks that the warm-up left in the prefix cache."""

    @property
    def pid(self) -> int | None:
        """The engine process, once started."""
        return self._process.pid if self._process is not None else None

    async def start(self) -> EngineInfo:
        """Start the engine process, shake hands, warm up. Raises EngineError."""
        self._directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        handshake = self._context.socket(SocketType.ROUTER)
        try:
            self._bind(self._input, "input")
            self._bind(self._output, "output")
            self._spawn(self._bind(handshake, "handshake"))
            async with asyncio.timeout(_START_TIMEOUT_S):
                ready = await self._or_death(self._shake_hands(handshake))
                self._kv_blocks_total = ready.num_gpu_blocks
                self._untold_events = await warm_up(self)
                self._watch.warmed_up()
        except TimeoutError:
            raise EngineError(
                f"the engine was not ready within {_START_TIMEOUT_S:.0f} s; see {self._log_path}"
            ) from None
        finally:
            handshake.close(linger=0)
        model = launch.load_model(self._launch_path)
        return EngineInfo(
            engine_tag=enginecore.ENGINE_TAG,
            block_size_tokens=ready.block_size,
            kv_blocks_total=ready.num_gpu_blocks,
            max_model_len_tokens=ready.max_model_len,
            ready_payload=enginecore.encode(ready),
            weights=model.weights,
            vocabulary_tokens=model.vocabulary_tokens,
        )

    def add(self, request: EngineRequest) -> None:
        self._unfinished.add(request.request_id)
        self._send(enginecore.ADD, enginecore.encode(request))

    def abort(self, request_ids: list[str]) -> None:
        self._unfinished.difference_update(request_ids)
        self._send(enginecore.ABORT, enginecore.encode(request_ids))

    async def step(self) -> EngineStep:
        if self._ended is not None and self._ended.done():
            raise await self._death()
        frames = await self._or_death(self._output.recv_multipart())
        if frames[0] == _DEAD:
            raise await self._death()
        outputs = enginecore.decode_outputs(enginecore.only_frame(frames))
        self._watch.stepped()
        for output in outputs.outputs:
            if output.finish_reason is not None:
                self._unfinished.discard(output.request_id)
        self._note_load(outputs)
        return EngineStep(
            outputs.outputs, self._load, step_counters(outputs), self._block_events(outputs)
        )

    async def stop(self) -> None:
        process = self._process
        if process is not None and process.poll() is None:
            process.terminate()
            try:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(has_ended(process.pid), _STOP_TIMEOUT_S)
            finally:
                process.kill()  # Nothing happens to one that has ended.
                process.wait()
        if self._ended is not None:
            await asyncio.wait({self._ended})  # From here on a step is told of the end.
        self._context.destroy(linger=0)

    def _bind(self, zmq_socket: zmq.asyncio.Socket, name: str) -> str:
        path = self._directory / f"engine-{name}.sock"
        address = f"ipc://{path}"
        path.unlink(missing_ok=True)
        zmq_socket.setsockopt(SocketOption.SNDHWM, 0)
        zmq_socket.setsockopt(SocketOption.RCVHWM, 0)
        zmq_socket.bind(address)
        return address

    def _spawn(self, handshake_address: str) -> None:
        args = {"model": self._spec.model, **self._spec.engine_args}
        launch.save(
            self._launch_path,
            launch.Launch(
                handshake_address=handshake_address,
                engine_id=f"{self._spec.worker_id}-{uuid.uuid4().hex[:12]}",
                kv_lease_s=round(self._spec.kv_lease_s),
                engine_args=args,
                connector_module=self.connector_module,
                connector_class=self.connector_class,
            ),
        )
        with self._log_path.open("ab") as log:
            command = [sys.executable, "-m", "engine.vllm_host.process"]
            self._process = subprocess.Popen(
                [*command, str(self._launch_path), str(os.getpid())],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, **self._environment()},
            )
        self._ended = asyncio.create_task(self._watched_end(self._process))

    def _environment(self) -> dict[str, str]:
        return {
            # Block events name blocks by their whole hashes.
            "VLLM_KV_EVENTS_USE_INT_BLOCK_HASHES": "0",
            # Each of an engine's messages is one frame, whose parts stand by themselves.
            "VLLM_MSGPACK_ZERO_COPY_THRESHOLD": "1000000000",
            # The model runs in the engine process itself: one import of vLLM less, and no
            # messages between processes within a step.
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_NIXL_SIDE_CHANNEL_HOST": self._spec.listen_host,
            "VLLM_NIXL_SIDE_CHANNEL_PORT": str(_free_port(self._spec.listen_host)),
            "VLLM_NO_USAGE_STATS": "1",
            **_transport_devices(self._spec.listen_host),
            **self._spec.environment,
        }

    async def _shake_hands(self, handshake: zmq.asyncio.Socket) -> enginecore.ReadyResponse:
        """vLLM's start-up handshake (`EngineCoreProc.startup_handshake`), from the front's side."""
        identity, _hello = await handshake.recv_multipart()
        addresses = {
            name: [f"ipc://{self._directory / f'engine-{name[:-1]}.sock'}"]
            for name in ("inputs", "outputs")
        }
        init = msgspec.msgpack.encode({"addresses": addresses, "parallel_config": {}})
        await handshake.send_multipart([identity, init])
        await handshake.recv_multipart()  # READY
        _identity, payload = await self._input.recv_multipart()
        return enginecore.decode_ready(payload)

    def _send(self, kind: bytes, payload: bytes) -> None:
        # Without a limit on queued messages a send never waits, so the future is done already.
        self._input.send_multipart([_IDENTITY, kind, payload], flags=Flag.DONTWAIT)

    def _block_events(self, outputs: EngineOutputs) -> list[BlockEvent]:
        events, self._untold_events = self._untold_events, []
        payload = (outputs.scheduler_stats or {}).get("block_events")
        return [*events, *decode_block_events(payload)] if payload else events

    def _note_load(self, outputs: EngineOutputs) -> None:
        stats = outputs.scheduler_stats
        if stats is None:
            return
        now_s = time.monotonic()
        step_time_s = now_s - self._last_step_s
        self._last_step_s = now_s
        waiting = stats.get("num_waiting_reqs", 0) + stats.get("num_skipped_waiting_reqs", 0)
        self._load = EngineLoad(
            running=stats.get("num_running_reqs", 0),
            waiting=waiting,
            kv_blocks_used=round(stats.get("kv_cache_usage", 0.0) * self._kv_blocks_total),
            kv_blocks_total=self._kv_blocks_total,
            step_time_s=step_time_s if step_time_s < _IDLE_AFTER_S else 0.0,
        )

    async def _watched_end(self, process: subprocess.Popen[bytes]) -> int:
        """Its exit status, once it ends; one that hangs is killed."""
        ended = asyncio.ensure_future(has_ended(process.pid))
        while not ended.done():
            await asyncio.wait({ended}, timeout=_LOOK_S)
            verdict = self._watch.look(
                time.monotonic(),
                waits=bool(self._unfinished),
                stopped=is_stopped(process.pid),
                threads=lambda: cpu_times_s(process.pid),
            )
            if verdict is not None and not ended.done():
                self._hang = self._hang or verdict
                process.kill()  # Stopped, it would not even take a SIGTERM.
        ended.result()  # Raises what kept it from being watched; `wait` would block.
        return process.wait()

    async def _or_death(self, work: Awaitable[_T]) -> _T:
        """What `work` gives, or EngineError if the engine process ends first."""
        assert self._ended is not None
        task = asyncio.ensure_future(work)
        try:
            await asyncio.wait({task, self._ended}, return_when=asyncio.FIRST_COMPLETED)
            if task.done() and not task.cancelled():  # cancelled: `stop` closed the socket
                return task.result()
        finally:
            task.cancel()
        raise await self._death()

    async def _death(self) -> EngineError:
        assert self._ended is not None
        status = await self._ended
        if self._hang:
            return EngineError(
                f"the engine of {self._spec.worker_id} hung and was killed: {self._hang}"
            )
        with self._log_path.open("rb") as log:
            log.seek(max(0, self._log_path.stat().st_size - _LOG_TAIL_BYTES))
            tail = log.read().decode(errors="replace")
        return EngineError(
            f"the engine process of {self._spec.worker_id} ended with status {status}; "
            f"its last words: {last_words(tail)} (all of them: {self._log_path})"
        )


def last_words(log: str) -> str:
    """The lines of a log that say best why its process ended: its last error, or its last line."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = [index for index, line in enumerate(lines) if _ERROR_LINE.match(line)]
    start = errors[-1] if errors else len(lines) - 1
    return " ".join(lines[max(0, start) : start + 3]) or "none"


def _transport_devices(listen_host: str) -> dict[str, str]:
    # UCX, below NIXL, listens on every device unless told otherwise.
    loopback = ipaddress.ip_address(listen_host).is_loopback
    return {"UCX_NET_DEVICES": "lo"} if loopback else {}


def _free_port(host: str) -> int:
    with socket.socket() as probe:
        probe.bind((host, 0))
        port: int = probe.getsockname()[1]
        return port
