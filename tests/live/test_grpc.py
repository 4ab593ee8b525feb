"""The gRPC API on the live cluster: the same answers as over HTTP, whole ends, told errors."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import jsonschema
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from openai import OpenAI
from openai.types import Completion

from protos.inference_pb2 import (
    FINISH_REASON_LENGTH,
    FINISH_REASON_STOP,
    GenerateRequest,
    GenerateResponse,
    Sampling,
    TokenIds,
)
from protos.inference_pb2_grpc import InferenceStub
from tests.live.cluster_process import BatonServe
from tests.live.conftest import MODEL
from tests.live.test_api import PROMPT, SCHEMA, TOKENS, complete, token_ids, until
from tests.live.test_boundary import heavy_packages

EXAMPLE = Path(__file__).parents[2] / "docs/examples/grpc_client.py"
LIMIT_S = 60.0


@pytest.fixture(scope="module")
def channel(cluster: BatonServe) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(f"127.0.0.1:{cluster.grpc_port}") as channel:
        yield channel


@pytest.fixture(scope="module")
def stub(channel: grpc.Channel) -> InferenceStub:
    return InferenceStub(channel)


def request(prompt: str | list[int] = PROMPT, model: str = "", **sampling: Any) -> GenerateRequest:
    options = Sampling(**{"max_tokens": TOKENS, "temperature": 0.0, **sampling})
    if isinstance(prompt, str):
        return GenerateRequest(model=model, text=prompt, sampling=options)
    return GenerateRequest(model=model, token_ids=TokenIds(ids=prompt), sampling=options)


def generate(stub: InferenceStub, asked: GenerateRequest) -> GenerateResponse:
    """All messages of a stream as one."""
    whole = GenerateResponse()
    text = ""
    for message in stub.Generate(asked, timeout=LIMIT_S):
        text += message.text
        whole.MergeFrom(message)
    whole.text = text
    return whole


def over_http(client: OpenAI, prompt: str | list[int] = PROMPT, **options: Any) -> Completion:
    extra = {"return_token_ids": True, **options.pop("extra_body", {})}
    return complete(client, prompt, extra_body=extra, **options)


def refused(stub: InferenceStub, asked: GenerateRequest) -> tuple[grpc.StatusCode, str, Any]:
    """Status, message and the call itself."""
    call = stub.Generate(asked, timeout=LIMIT_S)
    with pytest.raises(grpc.RpcError):
        list(call)
    return call.code(), call.details(), call


# The same as over HTTP


def test_text_and_token_ids_give_what_http_gives(
    cluster: BatonServe, client: OpenAI, stub: InferenceStub
) -> None:
    answer = over_http(client)
    (choice,) = answer.choices
    ids = token_ids(cluster, prompt=PROMPT)
    for asked in (request(), request(ids), request(model=MODEL)):
        got = generate(stub, asked)
        assert got.text == choice.text
        assert list(got.token_ids) == (choice.model_extra or {})["token_ids"]
        assert got.finish_reason == FINISH_REASON_LENGTH
        assert answer.usage is not None
        assert got.usage.prompt_tokens == answer.usage.prompt_tokens == len(ids)
        assert got.usage.completion_tokens == answer.usage.completion_tokens == TOKENS


SAMPLING: dict[str, dict[str, Any]] = {
    "a seed": {"temperature": 1.0, "seed": 7},
    "narrow": {"temperature": 0.9, "top_p": 0.7, "top_k": 20, "min_p": 0.05, "seed": 3},
    "penalties": {
        "presence_penalty": 1.5,
        "frequency_penalty": 0.75,
        "repetition_penalty": 1.3,
    },
    "min_tokens": {"min_tokens": TOKENS, "stop_token_ids": list(range(300, 2000))},
    "stop_token_ids": {"stop_token_ids": list(range(300, 2000))},
    "ignore_eos": {"ignore_eos": True, "max_tokens": 60},
}
STANDARD = {"temperature", "seed", "top_p", "presence_penalty", "frequency_penalty", "max_tokens"}


@pytest.mark.parametrize("kind", SAMPLING)
def test_a_sampling_parameter_does_what_it_does_over_http(
    kind: str, client: OpenAI, stub: InferenceStub
) -> None:
    values = SAMPLING[kind]
    options = {name: value for name, value in values.items() if name in STANDARD}
    extra = {name: value for name, value in values.items() if name not in STANDARD}
    (choice,) = over_http(client, **options, extra_body=extra).choices
    got = generate(stub, request(**values))
    assert (got.text, list(got.token_ids)) == (
        choice.text,
        (choice.model_extra or {})["token_ids"],
    )


def test_a_bias_takes_a_token_out(stub: InferenceStub) -> None:
    first = generate(stub, request()).token_ids[0]
    other = generate(stub, request(logit_bias={first: -100.0}))
    assert first not in other.token_ids


def test_a_stop_string_ends_the_text_before_itself(
    cluster: BatonServe, stub: InferenceStub
) -> None:
    text = generate(stub, request()).text
    stop = text[len(text) // 2 :][:5]
    got = generate(stub, request(stop=["never to be seen", stop]))
    assert (got.text, got.finish_reason) == (text[: text.index(stop)], FINISH_REASON_STOP)
    # To an engine it is an abort, like a client's that leaves; the edge saw that it was none.
    until(lambda: ended(cluster, got.request_id)["end"] == "complete", "its record says so")


def test_logprobs_are_those_of_http(client: OpenAI, stub: InferenceStub) -> None:
    extra = {"return_tokens_as_token_ids": True}
    http = over_http(client, logprobs=3, extra_body=extra).choices[0].logprobs
    assert http is not None
    assert http.token_logprobs
    assert http.top_logprobs
    got = generate(stub, request(logprobs=3))
    assert len(got.logprobs) == len(got.token_ids) == TOKENS
    for index, token in enumerate(got.logprobs):
        assert token.logprob == pytest.approx(http.token_logprobs[index], abs=1e-3)
        top = {f"token_id:{other.token_id}": other.logprob for other in token.top}
        assert top == pytest.approx(http.top_logprobs[index], abs=1e-3)
        # Greedy: the likeliest was taken.
        assert (token.top[0].token_id, token.top[0].logprob) == (
            got.token_ids[index],
            token.logprob,
        )
        values = [other.logprob for other in token.top]
        assert values == sorted(values, reverse=True)
    alone = generate(stub, request(logprobs=0))
    assert [token.logprob for token in alone.logprobs] == pytest.approx(
        [token.logprob for token in got.logprobs], abs=1e-3
    )
    assert not any(token.top for token in alone.logprobs)
    assert not generate(stub, request()).logprobs


def test_a_json_schema_is_kept(stub: InferenceStub) -> None:
    found = set()
    for index in range(4):
        asked = request(f"Describe {index}.", max_tokens=120, json_schema=json.dumps(SCHEMA))
        got = generate(stub, asked)
        jsonschema.validate(json.loads(got.text), SCHEMA)
        assert got.finish_reason == FINISH_REASON_STOP
        found.add(got.text)
    assert len(found) > 1


def test_tokens_that_were_found_in_a_cache_are_told(client: OpenAI, stub: InferenceStub) -> None:
    prompt = random.Random(186).choices(range(300, 1300), k=500)  # Nobody else's.
    assert generate(stub, request(prompt)).usage.cached_tokens == 0
    cached = generate(stub, request(prompt)).usage.cached_tokens
    assert 0 < cached < len(prompt)
    usage = over_http(client, prompt).usage
    assert usage is not None
    assert usage.prompt_tokens_details is not None
    assert usage.prompt_tokens_details.cached_tokens == cached


def test_many_streams_over_one_connection_are_each_exact(stub: InferenceStub) -> None:
    prompts = [[300 + 7 * index, *range(400, 440 + index)] for index in range(32)]

    def ids(prompt: list[int]) -> list[int]:
        return list(generate(stub, request(prompt)).token_ids)

    with ThreadPoolExecutor(len(prompts)) as pool:
        together = list(pool.map(ids, prompts))
    assert together == [ids(prompt) for prompt in prompts]


# Ends


def test_the_first_token_comes_while_the_rest_is_generated(
    cluster: BatonServe, stub: InferenceStub
) -> None:
    call = stub.Generate(request(max_tokens=1500, ignore_eos=True), timeout=LIMIT_S)
    request_id = dict(call.initial_metadata())["x-request-id"]
    next(call)
    (record,) = cluster.get(f"/cluster/requests/{request_id}")["requests"]
    assert record["end"] is None
    *_, last = list(call)
    assert last.request_id == request_id


def test_cancelling_frees_what_the_call_uses(cluster: BatonServe, stub: InferenceStub) -> None:
    call = stub.Generate(request(max_tokens=4000, ignore_eos=True), timeout=LIMIT_S)
    request_id = dict(call.initial_metadata())["x-request-id"]
    next(call)
    call.cancel()
    until(lambda: ended(cluster, request_id)["end"] == "cancelled", "its record says so")
    until(lambda: nothing_runs(cluster), "no worker holds KV blocks or requests")


def test_a_deadline_ends_the_call_and_frees_what_it_uses(
    cluster: BatonServe, stub: InferenceStub
) -> None:
    began_s = time.monotonic()
    call = stub.Generate(request(max_tokens=4000, ignore_eos=True), timeout=1)
    with pytest.raises(grpc.RpcError):
        list(call)
    assert call.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert time.monotonic() - began_s < 3
    until(lambda: nothing_runs(cluster), "no worker holds KV blocks or requests")


def ended(cluster: BatonServe, request_id: str) -> dict[str, Any]:
    (record,) = cluster.get(f"/cluster/requests/{request_id}")["requests"]
    found: dict[str, Any] = record
    return found


def nothing_runs(cluster: BatonServe) -> bool:
    loads = [worker["load"] for worker in cluster.workers()]
    return all(load["kv_blocks_used"] == load["running"] == load["waiting"] == 0 for load in loads)


# Errors


def test_an_unknown_model_is_not_found(stub: InferenceStub) -> None:
    code, details, _ = refused(stub, request(model="gpt-none"))
    assert code is grpc.StatusCode.NOT_FOUND
    assert "gpt-none" in details


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        (request([]), "prompt"),
        (request([500] * 9000), "8192"),
        (request(max_tokens=0), "max_tokens"),
        (request(temperature=3.0), "temperature"),
        (request(logprobs=21), "20"),
        (request(logit_bias={99_999: 1.0}), "99999"),
        (request([5000]), "5000"),
    ],
)
def test_what_cannot_be_served_is_an_invalid_argument(
    stub: InferenceStub, asked: GenerateRequest, says: str
) -> None:
    code, details, _ = refused(stub, asked)
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert says in details


def test_what_an_engine_refuses_is_told_with_its_reason(
    cluster: BatonServe, stub: InferenceStub
) -> None:
    code, details, call = refused(stub, request(json_schema='{"type": "nonsense"}'))
    record = ended(cluster, dict(call.initial_metadata())["x-request-id"])
    assert record["end"] == "failed"
    assert details == record["error"]
    assert code in (grpc.StatusCode.INTERNAL, grpc.StatusCode.INVALID_ARGUMENT)
    assert generate(stub, request()).finish_reason == FINISH_REASON_LENGTH


# Around it


def test_health_says_that_it_serves(channel: grpc.Channel) -> None:
    health = health_pb2_grpc.HealthStub(channel)
    for service in ("", "baton.v1.Inference"):
        answer = health.Check(health_pb2.HealthCheckRequest(service=service), timeout=10)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING


def test_the_url_is_shown(cluster: BatonServe) -> None:
    assert f"gRPC API    127.0.0.1:{cluster.grpc_port}\n" in cluster.log


def test_its_process_is_small_and_has_loaded_neither_vllm_torch_nor_ray(
    cluster: BatonServe, stub: InferenceStub
) -> None:
    (front,) = [p for p in cluster.processes() if "router.unit.grpc_front.process" in p.cmdline()]
    assert heavy_packages(front.pid) == set()
    memory_bytes = psutil.Process(front.pid).memory_info().rss
    print(f"\nthe gRPC front takes {memory_bytes >> 20} MiB")
    assert memory_bytes < 120 << 20


def test_the_example_of_the_documentation_works_as_written(
    cluster: BatonServe, client: OpenAI
) -> None:
    target = f"127.0.0.1:{cluster.grpc_port}"
    ran = subprocess.run(
        [sys.executable, EXAMPLE, PROMPT, "--target", target, "--max-tokens", str(TOKENS)],
        capture_output=True,
        text=True,
        check=False,
        timeout=LIMIT_S,
    )
    assert ran.returncode == 0, ran.stderr
    text, ending, usage = ran.stdout[:-1].rsplit("\n", 2)
    answer = complete(client)
    assert text == answer.choices[0].text
    assert ending.startswith("FINISH_REASON_LENGTH, log probability -")
    assert answer.usage is not None
    assert usage.startswith(f"{answer.usage.prompt_tokens} + {TOKENS} tokens")


def test_the_example_tells_an_error(cluster: BatonServe) -> None:
    target = f"127.0.0.1:{cluster.grpc_port}"
    ran = subprocess.run(
        [sys.executable, EXAMPLE, "", "--target", target],
        capture_output=True,
        text=True,
        check=False,
        timeout=LIMIT_S,
    )
    assert ran.returncode == 1
    assert ran.stderr.startswith("\nINVALID_ARGUMENT: ")
