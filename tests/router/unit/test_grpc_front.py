"""The gRPC front behind a real edge and front, with a router that is a fake."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)
from running_unit import MODEL_NAME, Unit, build_model, eventually

from protos.inference_pb2 import (
    FINISH_REASON_LENGTH,
    GenerateRequest,
    GenerateResponse,
    Sampling,
    TokenIds,
)
from protos.inference_pb2_grpc import InferenceStub
from router.ticket_mint import LONGEST_DEADLINE_MS
from router.unit.anchor.probe import ASK_EVERY_S, HANGS_S
from tests.free_ports import free_port

ROOT = Path(__file__).parents[3]
PROMPT = "the quick brown fox. "
PACE_S = 0.01
METHOD = "/baton.v1.Inference/Generate"


def request(tokens: int = 20, **fields: Any) -> GenerateRequest:
    prompt = {} if "token_ids" in fields else {"text": PROMPT}
    sampling = Sampling(max_tokens=tokens)
    return GenerateRequest(**{**prompt, "sampling": sampling, **fields})


def echoed(tokens: int) -> str:
    return (PROMPT * tokens)[:tokens]


@pytest.fixture(scope="module")
def unit(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Unit]:
    """Shared; every test leaves it serving."""
    directory = tmp_path_factory.mktemp("grpc")
    model = build_model(directory / "model")
    unit = Unit(directory / "u", model, PACE_S, grpc_port=free_port())
    try:
        unit.wait_until_serving()
        yield unit
        assert "Traceback" not in (unit.paths.logs / "grpc.log").read_text()
    finally:
        unit.end()


@pytest.fixture
def channel(unit: Unit) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(f"127.0.0.1:{unit.settings.grpc_port}") as channel:
        grpc.channel_ready_future(channel).result(10)
        yield channel


@pytest.fixture
def stub(channel: grpc.Channel) -> InferenceStub:
    return InferenceStub(channel)


def whole(messages: list[GenerateResponse]) -> str:
    return "".join(message.text for message in messages)


def status_of(call: Any) -> tuple[grpc.StatusCode, str]:
    """The status that a call ends with that must not end well."""
    with pytest.raises(grpc.RpcError):
        list(call)
    return call.code(), call.details()


def test_a_stream_is_exact_and_its_last_message_tells_its_end(
    unit: Unit, stub: InferenceStub
) -> None:
    call = stub.Generate(request(50))
    *others, last = list(call)
    assert whole([*others, last]) == echoed(50)
    tokens = [token for message in [*others, last] for token in message.token_ids]
    assert len(tokens) == 50
    assert len(others) > 5, "tokens that come apart are told apart"
    assert not any(m.finish_reason or m.request_id or m.HasField("usage") for m in others)
    assert last.finish_reason == FINISH_REASON_LENGTH
    assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (len(PROMPT), 50)
    assert dict(call.initial_metadata()) == {"x-request-id": last.request_id}
    assert last.request_id.startswith("T")
    again = request(50, token_ids=TokenIds(ids=tokens[: len(PROMPT)]), model=MODEL_NAME)
    assert whole(list(stub.Generate(again))) == echoed(50)


def test_a_call_is_a_request_like_any_others(unit: Unit, stub: InferenceStub) -> None:
    metadata = (
        ("authorization", "Bearer secret"),
        ("x-api-key", "another"),
        ("x-baton-priority", "low"),
        ("x-baton-output-tokens", "7"),
        ("x-request-id", "mine"),
        ("x-vllm-priority", "1"),
    )
    list(stub.Generate(request(1), metadata=metadata, timeout=30))
    _, method, path, *fields = unit.noted("questions")[-1].split("\t")
    values = dict(field.split("=", 1) for field in fields)
    assert (method, path) == ("POST", "/v1/completions")
    assert 20_000 < int(values.pop("x-baton-deadline-ms")) < 30_100
    assert int(values.pop("content-length")) > 0
    assert values == {
        "authorization": "Bearer secret", "x-api-key": "another", "x-baton-priority": "low",
        "x-baton-output-tokens": "7",
    }  # fmt: skip
    list(stub.Generate(request(1), timeout=30 * 24 * 3600))
    longest = f"x-baton-deadline-ms={LONGEST_DEADLINE_MS}"
    assert longest in unit.noted("questions")[-1].split("\t")


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        ("401|-|Who are you?|-", grpc.StatusCode.UNAUTHENTICATED),
        ("403|-|Not for you.|-", grpc.StatusCode.PERMISSION_DENIED),
        ("429|7|Slow down.|abc", grpc.StatusCode.RESOURCE_EXHAUSTED),
        ("503|1|Nobody is there.|-", grpc.StatusCode.UNAVAILABLE),
        ("504|-|Too late.|-", grpc.StatusCode.DEADLINE_EXCEEDED),
    ],
)
def test_a_refused_ticket_is_the_status(
    stub: InferenceStub, answer: str, code: grpc.StatusCode
) -> None:
    call = stub.Generate(request(), metadata=(("idempotency-key", f"answer:{answer}"),))
    _, retry_after, message, ticket = answer.split("|")
    assert status_of(call) == (code, message)
    told = (("retry-after", retry_after), ("x-request-id", ticket))
    assert dict(call.trailing_metadata()) == {name: value for name, value in told if value != "-"}
    # Else a client whose policy is to try again would not.
    assert not call.initial_metadata()


@pytest.mark.parametrize(
    ("asked", "code", "says"),
    [
        (GenerateRequest(), grpc.StatusCode.INVALID_ARGUMENT, "no prompt"),
        (request(0), grpc.StatusCode.INVALID_ARGUMENT, "max_tokens"),
        (request(text="x" * 600), grpc.StatusCode.INVALID_ARGUMENT, "512"),
        (request(token_ids=TokenIds()), grpc.StatusCode.INVALID_ARGUMENT, "prompt"),
        (request(token_ids=TokenIds(ids=[2**32 - 1])), grpc.StatusCode.INVALID_ARGUMENT, ""),
        (request(model="other"), grpc.StatusCode.NOT_FOUND, "`other`"),
        (
            request(sampling=Sampling(temperature=-1)),
            grpc.StatusCode.INVALID_ARGUMENT,
            "temperature",
        ),
        (request(text="x" * 100_001), grpc.StatusCode.RESOURCE_EXHAUSTED, "larger than max"),
        (
            request(token_ids=TokenIds(ids=[200] * 40_000)),
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            "larger than 100000 bytes as JSON",
        ),
    ],
)
def test_a_bad_request_has_a_status_that_says_why(
    stub: InferenceStub, asked: GenerateRequest, code: grpc.StatusCode, says: str
) -> None:
    got, details = status_of(stub.Generate(asked))
    assert got is code, details
    assert says in details


def test_bytes_that_are_no_message_are_told_so(channel: grpc.Channel) -> None:
    code, details = status_of(channel.unary_stream(METHOD)(b"\xff\xff"))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert "GenerateRequest" in details


def test_cancelling_frees_what_the_call_uses(unit: Unit, stub: InferenceStub) -> None:
    aborts = len(unit.noted("aborts"))
    call = stub.Generate(request(500))
    next(call)
    request_id = dict(call.initial_metadata())["x-request-id"]
    call.cancel()
    eventually(lambda: len(unit.noted("aborts")) > aborts)
    assert request_id in unit.noted("aborts")[-1]


def test_a_client_that_dies_frees_what_its_calls_use(unit: Unit) -> None:
    aborts = len(unit.noted("aborts"))
    code = (
        "import sys, grpc\n"
        "channel = grpc.insecure_channel(sys.argv[1])\n"
        "method = channel.unary_stream(sys.argv[2])\n"
        "calls = [method(bytes.fromhex(sys.argv[3])) for _ in range(4)]\n"
        "[next(call) for call in calls]\n"
        "print('begun', flush=True)\n"
        "sys.stdin.read()\n"
    )
    target = f"127.0.0.1:{unit.settings.grpc_port}"
    words = [sys.executable, "-c", code, target, METHOD, request(500).SerializeToString().hex()]
    client = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert client.stdout is not None
    assert client.stdout.readline() == b"begun\n"
    client.kill()
    client.communicate()
    eventually(lambda: len(unit.noted("aborts")) == aborts + 4)


def test_a_deadline_ends_the_call_and_frees_what_it_uses(unit: Unit, stub: InferenceStub) -> None:
    aborts = len(unit.noted("aborts"))
    code, _ = status_of(stub.Generate(request(500), timeout=0.5))
    assert code is grpc.StatusCode.DEADLINE_EXCEEDED
    eventually(lambda: len(unit.noted("aborts")) > aborts)


def test_a_stream_outlives_the_router(unit: Unit, stub: InferenceStub) -> None:
    call = stub.Generate(request(100))
    messages = [next(call)]
    unit.kill("router")
    messages += list(call)
    assert whole(messages) == echoed(100)
    assert messages[-1].finish_reason == FINISH_REASON_LENGTH


def test_comments_that_keep_a_stream_alive_change_nothing(unit: Unit, stub: InferenceStub) -> None:
    held = unit.paths.directory / "held"
    held.touch()
    call = stub.Generate(request(5))
    assert call.initial_metadata()
    time.sleep(2.5 * unit.settings.stream_keep_alive_s)
    held.unlink()
    assert whole(list(call)) == echoed(5)


def test_a_stream_that_ends_with_an_error_is_told_so(unit: Unit, stub: InferenceStub) -> None:
    failing = unit.paths.directory / "failing"
    failing.touch()
    call = stub.Generate(request(20))
    got = status_of(call)
    failing.unlink()
    assert got == (grpc.StatusCode.INTERNAL, "Internal server error")


def test_a_stream_that_is_cut_is_told_so(unit: Unit, stub: InferenceStub) -> None:
    call = stub.Generate(request(500))
    next(call)
    unit.kill("edge")
    code, details = status_of(call)
    assert code is grpc.StatusCode.UNAVAILABLE
    assert "cut before its end" in details
    eventually(unit.serves)
    assert whole(list(stub.Generate(request(5)))) == echoed(5)


def test_it_does_not_serve_while_the_edge_says_so(unit: Unit, channel: grpc.Channel) -> None:
    assert unit.request("GET", "/health").status == 503
    answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=5)
    assert answer.status == health_pb2.HealthCheckResponse.NOT_SERVING


def test_reflection_tells_the_services_and_their_types(channel: grpc.Channel) -> None:
    database = ProtoReflectionDescriptorDatabase(channel)
    services = set(database.get_services())
    assert {"baton.v1.Inference", "grpc.health.v1.Health"} <= services
    file = database.FindFileContainingSymbol("baton.v1.Inference")
    (service,) = file.service
    assert [method.name for method in service.method] == ["Generate"]


def test_it_is_started_again_and_ends_with_its_anchor(tmp_path: Path, unit: Unit) -> None:
    port = free_port()
    other = Unit(tmp_path / "u", Path(unit.settings.model), PACE_S, grpc_port=port)
    try:
        other.wait_until_serving()
        pid = eventually(lambda: other.pid("grpc"))
        assert {c.laddr.ip for c in listening(pid)} == {"::ffff:127.0.0.1"}
        other.kill("grpc")
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            call = InferenceStub(channel).Generate(request(5), wait_for_ready=True, timeout=10)
            assert whole(list(call)) == echoed(5)
        process = psutil.Process(eventually(lambda: other.pid("grpc")))
    finally:
        other.end()
    assert process.wait(5) is None


@pytest.mark.slow
def test_a_stopped_one_is_ended_and_started_again(unit: Unit, channel: grpc.Channel) -> None:
    assert whole(list(InferenceStub(channel).Generate(request(5)))) == echoed(5)
    time.sleep(2 * ASK_EVERY_S)  # Nobody is judged before it answered once.
    stopped = unit.pid("grpc")
    assert stopped is not None
    os.kill(stopped, signal.SIGSTOP)
    eventually(lambda: unit.pid("grpc") not in (None, stopped), 3 * HANGS_S)
    call = InferenceStub(channel).Generate(request(5), wait_for_ready=True, timeout=30)
    assert whole(list(call)) == echoed(5)


def listening(pid: int) -> list[Any]:
    def find() -> list[Any]:
        connections = psutil.Process(pid).net_connections("tcp")
        return [c for c in connections if c.status == psutil.CONN_LISTEN]

    return eventually(find)
