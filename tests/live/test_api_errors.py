"""What the API refuses: each with its status and a message that helps; the server goes on."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI

from tests.live.cluster_process import BatonServe
from tests.live.conftest import MODEL
from tests.live.test_api import PROMPT, complete, until

CONTEXT_TOKENS = 8192
VOCABULARY_TOKENS = 2048
COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
JSON = {"Content-Type": "application/json"}
MESSAGES = [{"role": "user", "content": "Hello"}]


@dataclass(frozen=True)
class Refusal:
    """A request, the status that it gets and what its message must hold."""

    status: int
    says: str
    path: str = COMPLETIONS
    method: str = "POST"
    body: bytes = b""

    def send(self, url: str) -> httpx.Response:
        return httpx.request(
            self.method, url + self.path, content=self.body, headers=JSON, timeout=30
        )


def completion(**body: Any) -> bytes:
    return json.dumps({"model": MODEL, "prompt": "Hello", "max_tokens": 4, **body}).encode()


def chat(**body: Any) -> bytes:
    return json.dumps({"model": MODEL, "messages": MESSAGES, "max_tokens": 4, **body}).encode()


def guided(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "thing", "schema": schema}}


BOTH_NUMBERS = rf"\b{CONTEXT_TOKENS}\b.*\b9000\b"
REFUSALS = {
    "unknown model": Refusal(404, "`gpt-none`", body=completion(model="gpt-none")),
    "unknown model in a chat": Refusal(404, "`gpt-none`", CHAT, body=chat(model="gpt-none")),
    "malformed JSON": Refusal(400, "JSON", body=b'{"model": "tiny", "prompt":'),
    "malformed JSON in a chat": Refusal(400, "JSON", CHAT, body=b"{'model': 'tiny'}"),
    "missing body": Refusal(400, "JSON"),
    "missing body in a chat": Refusal(400, "JSON", CHAT),
    "missing prompt": Refusal(400, "`prompt`", body=json.dumps({"model": MODEL}).encode()),
    "missing messages": Refusal(
        400, "`messages`", CHAT, body=json.dumps({"model": MODEL}).encode()
    ),
    "empty prompt": Refusal(400, "empty prompt|prompt.*empty", body=completion(prompt="")),
    "no token ids": Refusal(400, "at least one prompt token", body=completion(prompt=[])),
    "no messages": Refusal(400, "at least one message", CHAT, body=chat(messages=[])),
    "prompt over the context": Refusal(400, BOTH_NUMBERS, body=completion(prompt=[500] * 9000)),
    "text over the context": Refusal(
        400, rf"\b{CONTEXT_TOKENS}\b.*\b\d{{5}}\b", body=completion(prompt="9" * 10_000)
    ),
    "chat over the context": Refusal(
        400,
        rf"\b{CONTEXT_TOKENS}\b.*\b\d{{5}}\b",
        CHAT,
        body=chat(messages=[{"role": "user", "content": "9" * 10_000}]),
    ),
    "prompt that fills the context": Refusal(
        400, rf"{CONTEXT_TOKENS}.*{CONTEXT_TOKENS}", body=completion(prompt=[500] * CONTEXT_TOKENS)
    ),
    "max_tokens 0": Refusal(400, "max_tokens", body=completion(max_tokens=0)),
    "max_tokens negative": Refusal(400, "max_tokens.*-1", body=completion(max_tokens=-1)),
    "max_tokens 0 in a chat": Refusal(400, "max_.*tokens", CHAT, body=chat(max_tokens=0)),
    "max_tokens text": Refusal(400, "max_tokens", body=completion(max_tokens="many")),
    "temperature high": Refusal(400, "temperature.*3", body=completion(temperature=3)),
    "temperature negative": Refusal(400, "temperature.*-1", CHAT, body=chat(temperature=-1)),
    "top_p out of range": Refusal(400, "top_p.*2", body=completion(top_p=2)),
    "too many logprobs": Refusal(400, "21.*20", body=completion(logprobs=21)),
    "logit_bias of no token": Refusal(400, "99999", body=completion(logit_bias={"99999": 1})),
    "token id far out of the vocabulary": Refusal(400, "5000", body=completion(prompt=[5000])),
    "tool that is not listed": Refusal(
        400,
        "`missing`",
        CHAT,
        body=chat(
            tools=[{"type": "function", "function": {"name": "present"}}],
            tool_choice={"type": "function", "function": {"name": "missing"}},
        ),
    ),
    "unlisted path": Refusal(404, "/v1/nothing", "/v1/nothing"),
    "unlisted path below an API": Refusal(404, "pause", "/pause"),
    "wrong method on completions": Refusal(405, "POST", method="GET"),
    "wrong method on chat": Refusal(405, "POST", CHAT, "DELETE"),
    "wrong method on models": Refusal(405, "GET", "/v1/models"),
    "wrong method on the operator API": Refusal(405, "GET", "/cluster/workers"),
    "unlisted operator path": Refusal(404, "/cluster/nothing", "/cluster/nothing", "GET"),
}

# What the fast front lets through and workers or engines refuse.
FAILURES = {
    "token id of no embedding": Refusal(
        400, "token id 2048 .*2048 tokens", body=completion(prompt=[300, VOCABULARY_TOKENS])
    ),
    "only token ids of no embedding allowed": Refusal(
        400,
        "token id 2049 .*2048 tokens",
        body=completion(allowed_token_ids=[VOCABULARY_TOKENS + 1]),
    ),
    "a schema that is none": Refusal(
        400,
        "schema can't be used",
        body=completion(response_format=guided({"type": "nonsense"})),
    ),
}


@pytest.mark.parametrize("kind", REFUSALS)
def test_a_bad_request_gets_its_status_and_a_clear_message(kind: str, cluster: BatonServe) -> None:
    refusal = REFUSALS[kind]
    answer = refusal.send(cluster.url)
    assert answer.status_code == refusal.status, answer.text
    assert answer.headers["content-type"].startswith("application/json")
    error = answer.json()["error"]
    assert re.search(refusal.says, error["message"], re.DOTALL), error["message"]
    assert {"type", "param", "code"} <= set(error)


@pytest.mark.parametrize("method", ["PUT", "GET", "PATCH"])
def test_a_wrong_method_is_told_the_right_one(method: str, cluster: BatonServe) -> None:
    answer = httpx.request(method, cluster.url + CHAT)
    assert (answer.status_code, answer.headers["allow"]) == (405, "POST")


CLIENT_ERRORS: dict[str, tuple[type[openai.APIStatusError], str, Callable[[OpenAI], object]]] = {
    "model": (
        openai.NotFoundError,
        "gpt-none",
        lambda client: client.completions.create(model="gpt-none", prompt=PROMPT),
    ),
    "context": (
        openai.BadRequestError,
        BOTH_NUMBERS,
        lambda client: complete(client, [500] * 9000),
    ),
    "context of a stream": (
        openai.BadRequestError,
        BOTH_NUMBERS,
        lambda client: complete(client, [500] * 9000, stream=True),
    ),
    "empty": (openai.BadRequestError, "empty", lambda client: complete(client, "")),
    "temperature": (
        openai.BadRequestError,
        "temperature",
        lambda client: complete(client, temperature=2.5),
    ),
    "path": (openai.NotFoundError, "/v1/embeddings", lambda client: embeddings(client)),
}


def embeddings(client: OpenAI) -> object:
    return client.embeddings.create(model=MODEL, input="Hello")


@pytest.mark.parametrize("kind", CLIENT_ERRORS)
def test_the_client_raises_what_the_status_stands_for(kind: str, client: OpenAI) -> None:
    error, says, call = CLIENT_ERRORS[kind]
    with pytest.raises(error) as raised:
        call(client)
    assert isinstance(raised.value.body, dict)
    assert re.search(says, raised.value.body["message"])


@pytest.mark.parametrize("kind", FAILURES)
def test_what_an_engine_refuses_fails_alone_and_its_record_says_so(
    kind: str, cluster: BatonServe
) -> None:
    workers = incarnations(cluster)
    failure = FAILURES[kind]
    answer = failure.send(cluster.url)
    assert answer.status_code == failure.status
    assert re.search(failure.says, answer.json()["error"]["message"])
    record = cluster.get(f"/cluster/requests/{answer.headers['x-request-id']}")
    (request,) = record["requests"]
    assert request["end"] == "failed"
    assert request["error"]
    assert re.search(failure.says, request["error"])
    assert incarnations(cluster) == workers


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_an_engines_own_fields_are_refused(path: str, cluster: BatonServe) -> None:
    body = completion if path == COMPLETIONS else chat
    remote = {"do_remote_prefill": True, "remote_block_ids": [1, 2], "remote_engine_id": "x"}
    for field in (
        {"kv_transfer_params": remote},
        {"vllm_xargs": {"kv_transfer_params": "x"}},
        {"priority": -1},
        {"data_parallel_rank": 0},
    ):
        (name,) = field
        refusal = Refusal(400, "is not the client's to set", path, body=body(**field))
        answer = refusal.send(cluster.url)
        assert (answer.status_code, name) == (refusal.status, name)
        assert re.search(refusal.says, answer.json()["error"]["message"])


def test_after_all_errors_at_once_the_server_serves_as_before(
    cluster: BatonServe, client: OpenAI
) -> None:
    before = complete(client).choices[0].text
    workers = incarnations(cluster)
    refusals = [*REFUSALS.values(), *FAILURES.values()] * 2
    with ThreadPoolExecutor(16) as pool:
        statuses = list(pool.map(lambda refusal: refusal.send(cluster.url).status_code, refusals))
    assert statuses == [refusal.status for refusal in refusals]
    assert complete(client).choices[0].text == before
    assert incarnations(cluster) == workers

    def all_free() -> bool:
        loads = [worker["load"] for worker in cluster.workers()]
        return all(
            load["kv_blocks_used"] == load["running"] == load["waiting"] == 0 for load in loads
        )

    until(all_free, "no worker holds KV blocks or requests")
    assert cluster.metric("baton_requests_under_way") == 0


def incarnations(cluster: BatonServe) -> dict[str, tuple[int, int]]:
    """Which engines run: changes with every restart."""
    return {w["id"]: (w["incarnation"], w["restarts"]) for w in cluster.workers()}
