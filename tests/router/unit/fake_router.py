"""Stands in for the router process and its engines: `python fake_router.py UNIT_DIR`.

Its output for a prompt is the prompt's own tokens, again and again. Taking over from a
predecessor it sends again from some tokens before what a front was given. While there is a file
`held` in UNIT_DIR it begins with none, while there is `failing` each ends with an error, and while
there is `unhealthy` it says so.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from protos import anchor_link, enginecore
from router.anchor_client import UTILITY_ANSWERS
from router.core import admission
from router.settings import UnitPaths

PACE_S = float(os.environ.get("FAKE_PACE_S", "0"))
SENT_AGAIN_TOKENS = 5
FAIL_AFTER_TOKENS = 3
CONTEXT_TOKENS = 512
READY = enginecore.encode(
    enginecore.ReadyResponse(
        max_model_len=CONTEXT_TOKENS,
        num_gpu_blocks=64,
        block_size=128,
        dp_stats_address=None,
        dtype="bfloat16",
        vllm_version="0.32.0",
        world_size=1,
        data_parallel_size=1,
        tensor_parallel_size=1,
        pipeline_parallel_size=1,
        decode_context_parallel_size=1,
        data_parallel_rank=0,
        max_num_seqs=256,
        max_num_batched_tokens=2048,
        instance_id="fake",
        supports_lora=False,
        max_loras=0,
    )
)


class FakeRouter:
    def __init__(self, paths: UnitPaths) -> None:
        self.paths = paths
        self.tasks: dict[str, asyncio.Task[None]] = {}
        self.tickets = 0

    async def run(self) -> None:
        for path in (self.paths.ticket_socket, self.paths.router_socket):
            path.unlink(missing_ok=True)
        await asyncio.start_unix_server(self.give_ticket, self.paths.ticket_socket)
        await asyncio.start_unix_server(self.answer_http, self.paths.router_socket)
        self.paths.edge_log_socket.unlink(missing_ok=True)
        await asyncio.start_unix_server(self.collect_edge_log, self.paths.edge_log_socket)
        reader, self.writer = await asyncio.open_unix_connection(self.paths.anchor_socket)
        self.send(anchor_link.Hello(time.monotonic_ns(), os.getpid()))
        self.send(anchor_link.Ready(READY))
        splitter = anchor_link.Splitter()
        while data := await reader.read(1 << 20):
            for body in splitter.feed(data):
                self.handle(anchor_link.from_anchor_decoder.decode(body))

    def send(self, message: anchor_link.FromRouter) -> None:
        self.writer.write(anchor_link.encode(message))

    def handle(self, message: anchor_link.FromAnchor) -> None:
        match message:
            case anchor_link.Snapshot():
                if (self.paths.directory / "doomed").exists():
                    os._exit(1)
                for request in message.underway:
                    start = max(0, request.given_tokens - SENT_AGAIN_TOKENS)
                    self.generate(request.front, request.payload, start)
            case anchor_link.Ping():
                if not (self.paths.directory / "deaf").exists():
                    self.send(anchor_link.Pong())
            case anchor_link.Add():
                self.generate(message.front, message.payload, 0)
            case anchor_link.Abort():
                for request_id in message.request_ids:
                    self.note("aborts", request_id)
                    self.tasks.pop(request_id).cancel()
            case anchor_link.Utility():
                call = enginecore.decode_utility(message.payload)
                reply = enginecore.utility_reply(call.call_id, UTILITY_ANSWERS.get(call.method))
                self.send(anchor_link.UtilityReply(message.front, reply))
            case anchor_link.FrontGone():
                self.note("fronts-gone", str(message.front))

    def generate(self, front: int, payload: bytes, start: int) -> None:
        request = enginecore.decode_request(payload)
        self.note("requests", json.dumps(noteworthy(request)))
        self.tasks[request.request_id] = asyncio.create_task(self.stream(front, request, start))

    async def stream(self, front: int, request: enginecore.EngineRequest, start: int) -> None:
        assert request.sampling_params is not None
        assert request.prompt_token_ids is not None
        prompt = request.prompt_token_ids
        length = request.sampling_params["max_tokens"]
        while (self.paths.directory / "held").exists():  # noqa: ASYNC110 -- another process makes it
            await asyncio.sleep(0.01)
        failing = (self.paths.directory / "failing").exists()
        if failing:
            length = min(length, FAIL_AFTER_TOKENS)
        for position in range(start, length):
            last = position == length - 1 and not failing
            output = enginecore.EngineOutput(
                request.request_id,
                [prompt[position % len(prompt)]],
                finish_reason=enginecore.FINISH_LENGTH if last else None,
            )
            delivery = anchor_link.Delivery(
                request.request_id, position, 1, last, enginecore.encode(output)
            )
            self.send(anchor_link.Deliver(front, [delivery]))
            if PACE_S:
                await asyncio.sleep(PACE_S)
        if failing:
            payload = enginecore.error_output(request.request_id)
            delivery = anchor_link.Delivery(request.request_id, length, 0, True, payload)
            self.send(anchor_link.Deliver(front, [delivery]))

    async def give_ticket(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        line = (await reader.readline()).decode()
        self.note("questions", line.rstrip("\n"))
        self.tickets += 1
        # A test says in this header what the answer shall be.
        _, wanted, answer = line.rstrip("\n").partition("idempotency-key=answer:")
        ticket = f"T{os.getpid()}-{self.tickets}"
        line = answer.partition("\t")[0].replace("|", "\t") if wanted else f"200\t{ticket}"
        writer.write(f"{line}\n".encode())
        await writer.drain()
        writer.close()

    async def answer_http(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        request = await reader.readuntil(b"\r\n\r\n")
        unhealthy = b"/health" in request and (self.paths.directory / "unhealthy").exists()
        status = b"503 Service Unavailable" if unhealthy else b"200 OK"
        writer.write(
            b"HTTP/1.1 " + status + b"\r\nContent-Length: 4\r\nConnection: close\r\n\r\nfine"
        )
        await writer.drain()
        writer.close()

    async def collect_edge_log(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        while line := await reader.readline():
            self.note("edge-log", line.decode().rstrip())
        writer.close()

    def note(self, kind: str, line: str) -> None:
        with (self.paths.directory / f"noted-{kind}").open("a") as file:
            file.write(line + "\n")


def noteworthy(request: enginecore.EngineRequest) -> dict[str, Any]:
    """What a test may ask of a request: its ids, and what is left of what its client set."""
    ids = [request.external_req_id, request.request_id, request.session_id]
    before = internals(request)
    admission.take_over(request)
    return {"ids": ids, "before": before, "after": internals(request)}


def internals(request: enginecore.EngineRequest) -> dict[str, Any]:
    extra_args = (request.sampling_params or {}).get("extra_args")
    return {
        "priority": request.priority,
        "data_parallel_rank": request.data_parallel_rank,
        "extra_args": extra_args,
    }


if __name__ == "__main__":
    if sys.argv[2:] == ["--standby"] and not os.read(0, 1):
        sys.exit()
    if (Path(sys.argv[1]) / "forbidden").exists():
        sys.exit("forbidden by the test")
    asyncio.run(FakeRouter(UnitPaths(Path(sys.argv[1]))).run())
