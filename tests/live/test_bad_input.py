"""Nonsense on every path and over both fronts: a clear error each, and a server that goes on.

What single fields may hold is `test_api_errors`' and `test_grpc`'s business.
"""

from __future__ import annotations

import json
import socket
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import grpc
import httpx
import psutil
import pytest
from openai import OpenAI

from protos.inference_pb2 import GenerateRequest, GenerateResponse, Sampling
from tests.live.cluster_process import BatonServe
from tests.live.conftest import MODEL
from tests.live.test_api import MESSAGES, PROMPT, complete, until
from tests.live.test_grpc import nothing_runs

COMPLETIONS, CHAT, RESPONSES = "/v1/completions", "/v1/chat/completions", "/v1/responses"
ANTHROPIC, COUNT = "/v1/messages", "/v1/messages/count_tokens"
LIMIT_S: Final = 120.0
BODY_LIMIT_BYTES: Final = 32 << 20
HUGE_BYTES: Final = 50 << 20
GENERATE: Final = "/baton.v1.Inference/Generate"
TOKENS: Final = 4

# By name: a path, and a body that is served, for each front and form of errors.
GOOD: Final[dict[str, tuple[str, dict[str, Any]]]] = {
    "completions": (COMPLETIONS, {"prompt": PROMPT, "max_tokens": TOKENS}),
    "completions, full": (COMPLETIONS, {"prompt": [PROMPT], "max_tokens": TOKENS}),
    "chat": (CHAT, {"messages": MESSAGES, "max_tokens": TOKENS}),
    "chat, full": (CHAT, {"messages": MESSAGES, "max_tokens": TOKENS, "n": 2}),
    "messages": (ANTHROPIC, {"messages": MESSAGES, "max_tokens": TOKENS}),
    "responses": (RESPONSES, {"input": PROMPT, "max_output_tokens": TOKENS}),
    "tokenize": ("/tokenize", {"prompt": PROMPT}),
    "detokenize": ("/detokenize", {"tokens": [300]}),
    "count_tokens": (COUNT, {"messages": MESSAGES}),
}
GENERATING: Final = [name for name in GOOD if "token" not in name]
REMOTE: Final = {"do_remote_prefill": True, "remote_block_ids": [1, 2], "remote_engine_id": "x"}


def post(cluster: BatonServe, path: str, body: Any, **headers: str) -> httpx.Response:
    content = body if isinstance(body, bytes) else json.dumps({"model": MODEL, **body}).encode()
    given = {"Content-Type": "application/json", **headers}
    return httpx.post(cluster.url + path, content=content, headers=given, timeout=LIMIT_S)


def told(answer: httpx.Response, status: int) -> str:
    """The message of an error in the form of its path."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"].startswith("application/json")
    body = answer.json()
    if answer.request.url.path in (ANTHROPIC, COUNT):
        assert body["type"] == "error"
        kind = {400: "invalid_request_error", 413: "request_too_large"}[status]
        assert body["error"]["type"] == kind
    message: str = body["error"]["message"]
    assert message
    return message


@pytest.fixture(scope="module", autouse=True)
def as_well_as_before(cluster: BatonServe, client: OpenAI) -> Iterator[None]:
    """After all of this file: same text, same processes, nothing in use, nothing under way."""
    text = complete(client).choices[0].text
    processes = _processes(cluster)
    yield
    until(lambda: nothing_runs(cluster), "no worker holds KV blocks or requests", 30)
    assert complete(client).choices[0].text == text
    assert _processes(cluster) == processes
    assert cluster.metric("baton_orphans_total") == 0


def _processes(cluster: BatonServe) -> tuple[Any, ...]:
    (router,) = cluster.get("/cluster/routers")["routers"]
    parts = ("pid", "fronts", "edge", "anchor")
    return [w["incarnation"] for w in cluster.workers()], [router[part] for part in parts]


@pytest.mark.parametrize("kind", GOOD)
def test_the_good_bodies_are_served(kind: str, cluster: BatonServe) -> None:
    """Else what follows would prove nothing."""
    path, body = GOOD[kind]
    assert post(cluster, path, body).status_code == 200


# Bodies

NO_JSON: Final = {
    "nothing": b"",
    "invalid UTF-8": b'{"model": "tiny", "prompt": "\xff", "messages": "\xff", "tokens": "\xff"}',
    "invalid UTF-8, in a list": b'{"model": "tiny", "prompt": ["\xff"], "messages": ["\xff"]}',
    "half a surrogate": b'{"model": "tiny", "prompt": "\\ud800", "messages": "\\ud800"}',
    "cut": b'{"model": "tiny", "prompt": "Hell',
    "a control character": b'{"model": "tiny", "prompt": "\0", "messages": "\0"}',
    "very deep": b'{"a":' * 20_000,
    "no object": b"[]",
    "compressed": b"\x1f\x8b\x08\0\0",
}


@pytest.mark.parametrize("text", NO_JSON)
def test_what_is_no_json_object_is_a_400_on_every_path(text: str, cluster: BatonServe) -> None:
    for path in dict.fromkeys(path for path, _ in GOOD.values()):
        told(post(cluster, path, NO_JSON[text]), 400)


@pytest.mark.parametrize("kind", GENERATING)
@pytest.mark.parametrize("tokens", [0, -1, 8193, 10**9, 10**30])
def test_so_many_tokens_are_refused_with_a_sentence(
    kind: str, tokens: int, cluster: BatonServe
) -> None:
    path, body = GOOD[kind]
    name = "max_output_tokens" if path == RESPONSES else "max_tokens"
    assert "tokens" in told(post(cluster, path, {**body, name: tokens}), 400)


def test_too_many_completions_are_refused(cluster: BatonServe) -> None:
    for body in ({"prompt": PROMPT, "n": 2_000}, {"prompt": [PROMPT] * 700, "n": 2}):
        message = told(post(cluster, COMPLETIONS, {**body, "max_tokens": 1, "seed": 1}), 400)
        assert "completions in one request are too many" in message


INTERNAL: Final = {
    "kv_transfer_params": REMOTE,
    "ec_transfer_params": {"a": 1},
    "kv_hints": {"a": 1},
    "data_parallel_rank": 1,
    "priority": -1,
    "vllm_xargs": {"kv_transfer_params": "x"},
    "vllm_xargs of Baton": {"baton_output_token_ids": [300]},
}


@pytest.mark.parametrize("kind", GOOD)
@pytest.mark.parametrize("field", INTERNAL)
def test_fields_of_the_engines_are_refused(field: str, kind: str, cluster: BatonServe) -> None:
    path, body = GOOD[kind]
    name = field.split()[0]
    message = told(post(cluster, path, {**body, name: INTERNAL[field]}), 400)
    assert message.endswith("is not the client's to set; leave it out.")


@pytest.mark.parametrize("kind", GENERATING)
def test_fields_of_the_engines_are_refused_however_they_are_hidden(
    kind: str, cluster: BatonServe
) -> None:
    path, body = GOOD[kind]
    good = json.dumps({"model": MODEL, **body})[1:-1]
    remote = json.dumps(REMOTE)
    for hidden in (
        # Beyond what the edge sees; spelt otherwise; the second of two; deep in a list.
        f'{{{good}, "user": "{"u" * 70_000}", "kv_transfer_params": {remote}}}',
        f'{{{good}, "kv_transfer_p\\u0061rams": {remote}}}',
        f'{{"kv_transfer_params": null, {good}, "kv_transfer_params": {remote}}}',
        f'{{{good}, "vllm_xargs": {{"a": [1], "kv_transfer_p\\u0061rams": 1}}}}',
        f'{{\n\t{good},\r\n "vllm_xargs" :{{ "a":"}}", "baton_x":1}} }}',
    ):
        message = told(post(cluster, path, hidden.encode()), 400)
        assert message.endswith("is not the client's to set; leave it out.")


@pytest.mark.parametrize("header", ["X-Vllm-Priority", "X-Data-Parallel-Rank"])
def test_a_clients_own_priority_or_rank_is_refused(header: str, cluster: BatonServe) -> None:
    for path, body in GOOD.values():
        message = told(post(cluster, path, body, **{header.lower(): "1"}), 400)
        assert message == f"{header} is not the client's to set; leave it out."


def test_what_is_not_listed_is_a_404(cluster: BatonServe) -> None:
    for path in (
        "/v1/embeddings",
        "/v1/messages/batches",
        "/v1/responses/resp_1",
        "/inference/v1/generate",
        "/sleep",
        "/server_info",
        "/openapi.json",
        "/v1/load_lora_adapter",
        "/collective_rpc",
        "//v1/completions",
    ):
        for method in ("GET", "POST"):
            answer = httpx.request(method, cluster.url + path, content=b"{}", timeout=LIMIT_S)
            assert answer.status_code == 404, path
            assert path in answer.json()["error"]["message"]


# Large bodies


@pytest.mark.parametrize("kind", ["completions", "messages", "responses", "tokenize"])
def test_a_huge_body_is_a_413(kind: str, cluster: BatonServe) -> None:
    path, _ = GOOD[kind]
    whole = post(cluster, path, b'{"prompt": "' + b"a" * HUGE_BYTES + b'"}')
    assert str(BODY_LIMIT_BYTES) in told(whole, 413)
    chunked = httpx.post(cluster.url + path, content=_chunks(), timeout=LIMIT_S)
    assert str(BODY_LIMIT_BYTES) in told(chunked, 413)


def _chunks() -> Iterator[bytes]:
    for _ in range(HUGE_BYTES >> 20):
        yield b" " * (1 << 20)


@pytest.mark.parametrize("chunked", [False, True], ids=["whole", "chunked"])
def test_curl_is_told_of_a_huge_body(
    chunked: bool, cluster: BatonServe, curl: str, tmp_path: Path
) -> None:
    body = tmp_path / "body.json"
    body.write_bytes(b" " * HUGE_BYTES)
    headers = ["-H", "Transfer-Encoding: chunked"] if chunked else []
    given = ["--data-binary", f"@{body}", "-w", "\n%{http_code}", *headers]
    ran = subprocess.run(
        [curl, "-sS", *given, cluster.url + COMPLETIONS],
        capture_output=True,
        text=True,
        check=False,
        timeout=LIMIT_S,
    )
    answer, status = ran.stdout.rsplit("\n", 1)
    assert status == "413", ran.stderr
    assert str(BODY_LIMIT_BYTES) in json.loads(answer)["error"]["message"]


# Slow clients


class Raw:
    """A connection whose other side is watched byte for byte."""

    def __init__(self, cluster: BatonServe, receive_bytes: int | None = None) -> None:
        self._socket = socket.socket()
        if receive_bytes is not None:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        self._socket.connect(("127.0.0.1", cluster.port))

    @property
    def port(self) -> int:
        return int(self._socket.getsockname()[1])

    def send(self, path: str, body: bytes, length: int | None = None) -> None:
        head = (
            f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body) if length is None else length}\r\n\r\n"
        )
        self.send_bytes(head.encode() + body)

    def send_bytes(self, data: bytes) -> None:
        self._socket.sendall(data)

    def receive(self) -> bytes:
        """What is there, and what comes until something does; nothing at the end."""
        self._socket.settimeout(LIMIT_S)
        try:
            return self._socket.recv(65536)
        except ConnectionResetError:
            return b""

    def rest(self) -> tuple[bytes, float]:
        """All until the other side ends the connection, and after how many seconds it did."""
        began_s, parts = time.monotonic(), []
        while part := self.receive():
            parts.append(part)
        return b"".join(parts), time.monotonic() - began_s

    def is_ended(self) -> bool:
        """Whether the other side has reset it, or closed it with nothing left to read."""
        self._socket.setblocking(False)
        try:
            return self._socket.recv(1, socket.MSG_PEEK) == b""
        except BlockingIOError:
            return False
        except ConnectionResetError:
            return True

    def close(self) -> None:
        self._socket.close()


def test_half_a_request_and_then_silence_is_ended(cluster: BatonServe) -> None:
    halves = []
    for kind in ("completions", "messages", "responses"):
        path, body = GOOD[kind]
        text = json.dumps({"model": MODEL, **body}).encode()
        raw = Raw(cluster)
        raw.send(path, text[: len(text) // 2], len(text))
        halves.append(raw)
    head = Raw(cluster)
    head.send_bytes(b"POST /v1/completions HTTP/1.1\r\nHost: local")
    with ThreadPoolExecutor(4) as pool:
        *answers, (of_head, took_s) = pool.map(Raw.rest, [*halves, head])
    assert took_s < 25
    assert of_head.startswith(b"HTTP/1.1 408 ")
    for answer, took_s in answers:
        assert took_s < 25
        assert answer.startswith((b"HTTP/1.1 408 ", b"HTTP/1.1 400 "))
        message = json.loads(answer.split(b"\r\n\r\n", 1)[1])["error"]["message"]
        assert "time" in message or "length" in message


def endless(kind: str) -> tuple[str, bytes]:
    """A stream that outlasts everything here."""
    path, body = GOOD[kind]
    long = {"max_tokens": 8000, "stream": True, "ignore_eos": True, "logprobs": None}
    return path, json.dumps({"model": MODEL, **body, **long}).encode()


def test_readers_that_stop_hold_up_nobody(cluster: BatonServe, client: OpenAI) -> None:
    text = complete(client, max_tokens=64).choices[0].text
    stopped = []
    for kind in ("completions", "completions, full", "chat"):
        raw = Raw(cluster, receive_bytes=4096)
        raw.send(*endless(kind))
        assert b" 200 " in raw.receive()
        stopped.append(raw)
    with ThreadPoolExecutor(8) as pool:
        others = [pool.submit(complete, client, max_tokens=64) for _ in range(24)]
        assert [other.result().choices[0].text for other in others] == [text] * 24
    assert not any(raw.is_ended() for raw in stopped)
    for raw in stopped:
        raw.close()
    until(lambda: nothing_runs(cluster), "no worker holds KV blocks or requests", 30)


@pytest.mark.slow
def test_a_reader_that_stops_is_given_up(cluster: BatonServe) -> None:
    stopped = []
    for kind in ("completions", "completions, full"):
        raw = Raw(cluster, receive_bytes=4096)
        raw.send(*endless(kind))
        assert b" 200 " in raw.receive()
        stopped.append(raw)
    (router,) = cluster.get("/cluster/routers")["routers"]
    edge = psutil.Process(router["edge"])

    def held() -> set[int]:
        return {c.raddr.port for c in edge.net_connections("tcp") if c.raddr}

    ports = {raw.port for raw in stopped}
    assert ports <= held()
    # `silent_client_s` is 30.
    until(lambda: not ports & held(), "the edge closes their connections", 90)
    until(lambda: nothing_runs(cluster), "no worker holds KV blocks or requests", 30)
    for raw in stopped:
        answer, _ = raw.rest()
        assert b"[DONE]" not in answer
        raw.close()


@pytest.mark.slow
def test_a_large_body_that_stops_midway_is_ended(cluster: BatonServe) -> None:
    raw = Raw(cluster)
    raw.send(COMPLETIONS, b" " * 200_000, 400_000)
    _, took_s = raw.rest()
    assert took_s < 60


# gRPC


@pytest.fixture(scope="module")
def channel(cluster: BatonServe) -> Iterator[grpc.Channel]:
    unlimited = [("grpc.max_send_message_length", -1)]
    target = f"127.0.0.1:{cluster.grpc_port}"
    with grpc.insecure_channel(target, options=unlimited) as channel:
        yield channel


def call(channel: grpc.Channel, message: bytes, **metadata: str) -> list[GenerateResponse]:
    """Bytes as a request; raises the status that it ends with."""
    method = channel.unary_stream(
        GENERATE,
        request_serializer=bytes,
        response_deserializer=GenerateResponse.FromString,
    )
    given = [(name.replace("_", "-"), value) for name, value in metadata.items()]
    return list(method(message, metadata=given, timeout=LIMIT_S))


def wanted(**sampling: Any) -> GenerateRequest:
    options = Sampling(**{"max_tokens": TOKENS, "temperature": 0.0, **sampling})
    return GenerateRequest(text=PROMPT, sampling=options)


def status(channel: grpc.Channel, message: bytes, **metadata: str) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as raised:
        call(channel, message, **metadata)
    return raised.value.code(), raised.value.details()


def _unknown(number: int, content: bytes) -> bytes:
    """A field of protobuf's wire format, of bytes."""
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 127:
        encoded.append(value & 127 | 128)
        value >>= 7
    return bytes([*encoded, value])


def test_fields_that_grpcs_api_has_not_change_nothing(channel: grpc.Channel) -> None:
    good = wanted()
    text = "".join(message.text for message in call(channel, good.SerializeToString()))
    extra = _unknown(1000, json.dumps({"kv_transfer_params": REMOTE}).encode())
    odd_sampling = Sampling.FromString(good.sampling.SerializeToString() + extra)
    odd = GenerateRequest(text=PROMPT, sampling=odd_sampling).SerializeToString() + extra
    assert len(odd) > len(good.SerializeToString()) + 2 * len(extra) - 4
    assert "".join(message.text for message in call(channel, odd)) == text


@pytest.mark.parametrize("tokens", [0, 8193, 2**31 - 1])
def test_so_many_tokens_are_an_invalid_argument(tokens: int, channel: grpc.Channel) -> None:
    code, details = status(channel, wanted(max_tokens=tokens).SerializeToString())
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert "max_tokens" in details


def test_a_clients_own_priority_or_rank_changes_nothing(channel: grpc.Channel) -> None:
    good = wanted().SerializeToString()
    theirs = {"x_vllm_priority": "-9", "x_data_parallel_rank": "7", "x_request_id": "mine"}
    (*_, plain), (*_, asked) = call(channel, good), call(channel, good, **theirs)
    assert asked.request_id not in ("mine", plain.request_id)
    assert asked.usage == plain.usage


def test_a_call_that_is_not_read_holds_up_nobody(
    cluster: BatonServe, channel: grpc.Channel
) -> None:
    method = channel.unary_stream(
        GENERATE,
        request_serializer=GenerateRequest.SerializeToString,
        response_deserializer=GenerateResponse.FromString,
    )
    stopped = method(wanted(max_tokens=8000, ignore_eos=True), timeout=LIMIT_S)
    next(stopped)
    good = wanted(max_tokens=32).SerializeToString()
    texts = {"".join(message.text for message in call(channel, good)) for _ in range(8)}
    assert len(texts) == 1
    assert stopped.is_active()
    stopped.cancel()
    until(lambda: nothing_runs(cluster), "no worker holds KV blocks or requests", 30)


@pytest.mark.parametrize("message", [b"\xff" * 20, _unknown(2, b"\xff\xfe"), b"\x0a"])
def test_bytes_that_are_no_message_are_an_error(message: bytes, channel: grpc.Channel) -> None:
    code, details = status(channel, message)
    assert code in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.INTERNAL)
    assert details


def test_a_huge_message_is_too_much(channel: grpc.Channel) -> None:
    message = GenerateRequest(text="a" * HUGE_BYTES, sampling=Sampling(max_tokens=1))
    code, details = status(channel, message.SerializeToString())
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert details


def test_a_method_that_is_not_there_is_unimplemented(channel: grpc.Channel) -> None:
    with pytest.raises(grpc.RpcError) as raised:
        channel.unary_unary("/baton.v1.Inference/Nothing")(b"", timeout=LIMIT_S)
    assert raised.value.code() is grpc.StatusCode.UNIMPLEMENTED
