"""The OpenAI API as its own client sees it, and what the operator API tells of the same requests.

Greedy unless a test is about sampling. Every request of the suite is handed over.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import psutil
import pytest
from openai import OpenAI
from openai.types import Completion, CompletionUsage
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from tests.live.cluster_process import BatonServe, once_settled
from tests.live.conftest import MODEL

PROMPT = "Return a copy of the sequence in which every item that is None"
MESSAGES: list[Any] = [{"role": "user", "content": "What does the yield expression do?"}]
TOKENS = 24
STREAMS = 32
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 8},
        "tags": {"type": "array", "items": {"enum": ["red", "green"]}, "maxItems": 2},
        "ok": {"type": "boolean"},
    },
    "required": ["name", "tags", "ok"],
    "additionalProperties": False,
}
ARGUMENTS: dict[str, dict[str, Any]] = {
    "set_light": {
        "type": "object",
        "properties": {"room": {"enum": ["hall", "attic"]}, "on": {"type": "boolean"}},
        "required": ["room", "on"],
        "additionalProperties": False,
    },
    "open_door": {
        "type": "object",
        "properties": {"door": {"enum": ["front", "back"]}},
        "required": ["door"],
        "additionalProperties": False,
    },
}
TOOLS: list[Any] = [
    # Without `strict`, arguments may be anything: so in OpenAI's own API.
    {"type": "function", "function": {"name": name, "parameters": schema, "strict": True}}
    for name, schema in ARGUMENTS.items()
]
NAMED_TOOL: Any = {"type": "function", "function": {"name": "open_door"}}
TOOL_CHOICES: dict[str, Any] = {"required": "required", "named": NAMED_TOOL}


def complete(client: OpenAI, prompt: Any = PROMPT, **options: Any) -> Completion:
    given = {"max_tokens": TOKENS, "temperature": 0, **options}
    completion: Completion = client.completions.create(model=MODEL, prompt=prompt, **given)
    return completion


def chat(client: OpenAI, messages: list[Any] = MESSAGES, **options: Any) -> ChatCompletion:
    given = {"max_tokens": TOKENS, "temperature": 0, **options}
    answer: ChatCompletion = client.chat.completions.create(model=MODEL, messages=messages, **given)
    return answer


def stream_completion(client: OpenAI, prompt: Any = PROMPT, **options: Any) -> list[Completion]:
    given = {"max_tokens": TOKENS, "temperature": 0, **options}
    return list(client.completions.create(model=MODEL, prompt=prompt, stream=True, **given))


def stream_chat(
    client: OpenAI, messages: list[Any] = MESSAGES, **options: Any
) -> list[ChatCompletionChunk]:
    given = {"max_tokens": TOKENS, "temperature": 0, **options}
    return list(
        client.chat.completions.create(model=MODEL, messages=messages, stream=True, **given)
    )


def streamed_text(chunks: Iterable[Completion]) -> str:
    return "".join(choice.text for chunk in chunks for choice in chunk.choices)


def streamed_content(chunks: Iterable[ChatCompletionChunk]) -> str:
    return "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)


def token_ids(cluster: BatonServe, **what: Any) -> list[int]:
    """What /tokenize makes of a prompt or of messages."""
    answer = httpx.post(f"{cluster.url}/tokenize", json={"model": MODEL, **what}).json()
    assert answer["count"] == len(answer["tokens"])
    tokens: list[int] = answer["tokens"]
    return tokens


def until(condition: Callable[[], bool], what: str, timeout_s: float = 10.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, f"not within {timeout_s} s: {what}"
        time.sleep(0.05)


# Completions and chat


def test_a_completion_has_one_choice_that_ends_at_max_tokens(client: OpenAI) -> None:
    for max_tokens in (1, 2, 17):
        answer = complete(client, max_tokens=max_tokens)
        assert answer.model == MODEL
        (choice,) = answer.choices
        assert (choice.index, choice.finish_reason) == (0, "length")
        assert answer.usage
        assert answer.usage.completion_tokens == max_tokens


def test_a_streamed_completion_is_the_one_that_is_not_streamed(client: OpenAI) -> None:
    whole = complete(client).choices[0]
    chunks = stream_completion(client)
    assert streamed_text(chunks) == whole.text
    assert len([chunk for chunk in chunks if chunk.choices[0].text]) > TOKENS / 2
    assert [chunk.choices[0].finish_reason for chunk in chunks][-1] == whole.finish_reason


def test_a_streamed_chat_is_the_one_that_is_not_streamed(client: OpenAI) -> None:
    whole = chat(client).choices[0]
    assert whole.message.role == "assistant"
    assert whole.finish_reason == "length"
    chunks = stream_chat(client)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert streamed_content(chunks) == whole.message.content
    assert chunks[-1].choices[0].finish_reason == "length"


def test_the_first_chunk_arrives_while_the_rest_is_generated(
    cluster: BatonServe, client: OpenAI
) -> None:
    raw = client.completions.with_raw_response.create(
        model=MODEL,
        prompt=PROMPT,
        max_tokens=1500,
        stream=True,
        temperature=0,
        extra_body={"ignore_eos": True},
    )
    with raw.parse() as stream:
        assert next(iter(stream)).choices[0].text
        (request,) = cluster.get(f"/cluster/requests/{raw.headers['x-request-id']}")["requests"]
    assert request["end"] is None
    assert request["ended_at"] is None


def test_a_prompt_may_be_token_ids(cluster: BatonServe, client: OpenAI) -> None:
    ids = token_ids(cluster, prompt=PROMPT)
    assert complete(client, ids).choices[0].text == complete(client).choices[0].text
    assert complete(client, ids[::-1]).choices[0].text != complete(client).choices[0].text


def test_a_chat_remembers_its_system_message_and_its_turns(
    cluster: BatonServe, client: OpenAI
) -> None:
    first = chat(client)
    system: list[Any] = [{"role": "system", "content": "Answer in one word."}, *MESSAGES]
    answer = {"role": "assistant", "content": first.choices[0].message.content}
    turns: list[Any] = [*MESSAGES, answer, {"role": "user", "content": "And in a class?"}]
    last_turn_alone: list[Any] = turns[-1:]
    texts = set()
    for messages in (MESSAGES, system, turns, last_turn_alone):
        got = chat(client, messages)
        texts.add(got.choices[0].message.content)
        assert got.usage
        assert got.usage.prompt_tokens == len(token_ids(cluster, messages=messages))
    assert len(texts) == 4


def test_the_models_list_names_the_model_and_where_it_is(client: OpenAI, tiny_model: Path) -> None:
    (model,) = client.models.list().data
    assert model.id == MODEL
    assert (model.model_extra or {})["root"] == str(tiny_model)


# Usage


def test_usage_counts_the_tokens_of_prompt_and_answer(cluster: BatonServe, client: OpenAI) -> None:
    prompt_tokens = len(token_ids(cluster, prompt=PROMPT))
    wanted = (prompt_tokens, TOKENS, prompt_tokens + TOKENS)
    assert _counts(complete(client).usage) == wanted
    chat_tokens = len(token_ids(cluster, messages=MESSAGES))
    assert _counts(chat(client).usage) == (chat_tokens, TOKENS, chat_tokens + TOKENS)


def test_a_stream_tells_usage_in_its_last_chunk_if_asked(client: OpenAI) -> None:
    asked: dict[str, Any] = {"stream_options": {"include_usage": True}}
    for chunks, whole in (
        (stream_completion(client, **asked), complete(client).usage),
        (stream_chat(client, **asked), chat(client).usage),
    ):
        *others, last = chunks
        assert last.choices == []
        assert _counts(last.usage) == _counts(whole)
        assert not any(chunk.usage for chunk in others)
    assert not any(chunk.usage for chunk in stream_completion(client))
    assert not any(chunk.usage for chunk in stream_chat(client))


def _counts(usage: CompletionUsage | None) -> tuple[int, int, int]:
    assert usage is not None
    return usage.prompt_tokens, usage.completion_tokens, usage.total_tokens


# Sampling


def test_logprobs_of_a_completion_name_the_best_tokens(client: OpenAI) -> None:
    choice = complete(client, logprobs=3).choices[0]
    logprobs = choice.logprobs
    assert logprobs is not None
    assert logprobs.tokens is not None
    assert "".join(logprobs.tokens) == choice.text
    assert logprobs.token_logprobs is not None
    assert logprobs.top_logprobs is not None
    assert len(logprobs.token_logprobs) == len(logprobs.top_logprobs) == TOKENS
    for value, top in zip(logprobs.token_logprobs, logprobs.top_logprobs, strict=True):
        assert value is not None
        assert 1 < len(top) <= 3
        assert value == max(top.values()) < 0


def test_logprobs_of_a_chat_are_the_same_streamed(client: OpenAI) -> None:
    asked: dict[str, Any] = {"logprobs": True, "top_logprobs": 3}
    choice = chat(client, **asked).choices[0]
    assert choice.logprobs is not None
    tokens = choice.logprobs.content
    assert tokens is not None
    assert len(tokens) == TOKENS
    assert "".join(token.token for token in tokens) == choice.message.content
    for token in tokens:
        assert len(token.top_logprobs) == 3
        assert token.logprob == max(top.logprob for top in token.top_logprobs) < 0
    streamed = [
        token
        for chunk in stream_chat(client, **asked)
        if chunk.choices[0].logprobs
        for token in chunk.choices[0].logprobs.content or ()
    ]
    assert [token.token for token in streamed] == [token.token for token in tokens]
    for ours, whole in zip(streamed, tokens, strict=True):
        assert ours.logprob == pytest.approx(whole.logprob, abs=1e-3)


def test_a_stop_string_ends_the_text_before_itself(client: OpenAI) -> None:
    text = complete(client).choices[0].text
    stop = text[len(text) // 2 :][:5]
    wanted = (text[: text.index(stop)], "stop")
    for asked in (stop, ["never to be seen", stop]):
        choice = complete(client, stop=asked).choices[0]
        assert (choice.text, choice.finish_reason) == wanted
        chunks = stream_completion(client, stop=asked)
        assert (streamed_text(chunks), chunks[-1].choices[0].finish_reason) == wanted
    assert complete(client, stop="never to be seen").choices[0].text == text


def test_a_stop_string_ends_a_chat_before_itself(client: OpenAI) -> None:
    text = chat(client).choices[0].message.content or ""
    stop = text[len(text) // 2 :][:5]
    choice = chat(client, stop=[stop]).choices[0]
    assert choice.message.content == text[: text.index(stop)]
    assert choice.finish_reason == "stop"


def test_a_seed_repeats_its_text_and_no_other(client: OpenAI) -> None:
    def texts() -> list[str]:
        return [complete(client, temperature=1, seed=seed).choices[0].text for seed in (1, 2, 3, 4)]

    first = texts()
    assert first == texts()
    assert len(set(first)) == len(first)


# Guided output and tools


@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
def test_a_json_schema_is_kept(client: OpenAI, streamed: bool) -> None:
    options: dict[str, Any] = {
        "max_tokens": 120,
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "thing", "schema": SCHEMA},
        },
    }
    found = set()
    for index in range(6):
        messages: list[Any] = [{"role": "user", "content": f"Describe thing number {index}."}]
        if streamed:
            content = streamed_content(stream_chat(client, messages, **options))
        else:
            content = chat(client, messages, **options).choices[0].message.content or ""
        jsonschema.validate(json.loads(content), SCHEMA)
        found.add(content)
    assert len(found) > 1


@pytest.mark.parametrize("choice", TOOL_CHOICES)
def test_a_tool_that_must_be_called_gets_arguments_of_its_schema(
    client: OpenAI, choice: str
) -> None:
    options: dict[str, Any] = {"tools": TOOLS, "tool_choice": TOOL_CHOICES[choice]}
    for index in range(3):
        messages: list[Any] = [{"role": "user", "content": f"It is dark in room {index}."}]
        answer = chat(client, messages, max_tokens=200, **options).choices[0]
        assert not answer.message.content
        assert answer.message.tool_calls
        functions = [call.function for call in answer.message.tool_calls]
        calls = [(function.name, function.arguments) for function in functions]
        for name, arguments in calls:
            assert choice == "required" or name == "open_door"
            jsonschema.validate(json.loads(arguments), ARGUMENTS[name])
        assert _streamed_calls(stream_chat(client, messages, max_tokens=200, **options)) == calls


def _streamed_calls(chunks: Iterable[ChatCompletionChunk]) -> list[tuple[str, str]]:
    names: dict[int, str] = {}
    arguments: dict[int, str] = {}
    for chunk in chunks:
        for call in chunk.choices[0].delta.tool_calls or ():
            assert call.function is not None
            names.setdefault(call.index, call.function.name or "")
            arguments[call.index] = arguments.get(call.index, "") + (call.function.arguments or "")
    return [(names[index], arguments[index]) for index in sorted(names)]


@pytest.mark.parametrize("choice", ["none", "auto"])
def test_a_tool_that_need_not_be_called_leaves_text(client: OpenAI, choice: str) -> None:
    message = chat(client, tools=TOOLS, tool_choice=choice).choices[0].message
    assert message.content
    assert not message.tool_calls


def test_a_tools_answer_is_part_of_the_conversation(cluster: BatonServe, client: OpenAI) -> None:
    call = {
        "id": "call-1",
        "type": "function",
        "function": {"name": "open_door", "arguments": '{"door": "front"}'},
    }
    asked: list[Any] = [*MESSAGES, {"role": "assistant", "content": "", "tool_calls": [call]}]
    texts = set()
    for result in ("open", "locked"):
        messages = [*asked, {"role": "tool", "tool_call_id": "call-1", "content": result}]
        texts.add(chat(client, messages, tools=TOOLS).choices[0].message.content)
    assert len(texts) == 2


# The operator's view


def test_a_responses_header_leads_to_the_requests_decision_and_attempts(
    cluster: BatonServe, client: OpenAI
) -> None:
    prompt = random.Random(7).choices(range(300, 2000), k=300)
    raw = client.completions.with_raw_response.create(
        model=MODEL, prompt=prompt, max_tokens=5, temperature=0
    )
    request_id = raw.headers["x-request-id"]
    assert request_id in raw.parse().id
    record = cluster.get(f"/cluster/requests/{request_id}")
    assert (record["id"], record["path"]) == (request_id, "/v1/completions")
    (request,) = record["requests"]
    assert (request["end"], request["error"]) == ("complete", "")
    assert (request["prompt_tokens"], request["output_tokens"]) == (len(prompt), 5)

    (decision,) = request["decisions"]
    assert decision["reason"] == "long_prompt"
    assert decision["prompt_tokens"] == len(prompt)
    assert decision["local_prefill_max_tokens"] == 0
    roles = {worker["id"]: worker["role"] for worker in cluster.workers()}
    assert (roles[decision["prefill"]], roles[decision["worker"]]) == ("prefill", "decode")
    for candidate in decision["candidates"]:
        assert {"worker", "role", "prefill_tokens", "requests", "kv_use", "cost"} <= set(candidate)

    first, second = request["attempts"]
    assert (first["worker"], second["worker"]) == (decision["prefill"], decision["worker"])
    assert (first["injected_tokens"], second["injected_tokens"]) == (0, 1)
    used, fetched = first["prompt_use"], second["prompt_use"]
    assert used["computed_tokens"] + used["cached_tokens"] == len(prompt)
    assert fetched["transferred_tokens"] + fetched["cached_tokens"] == len(prompt)
    assert fetched["transferred_tokens"] > 0
    assert fetched["computed_tokens"] == 0
    times = ("arrived_at", "first_token_at", "handed_off_at", "resumed_at", "ended_at")
    assert sorted(request[name] for name in times) == [request[name] for name in times]


def test_an_unknown_request_is_a_404_that_names_it(cluster: BatonServe) -> None:
    answer = httpx.get(f"{cluster.url}/cluster/requests/nobody")
    assert answer.status_code == 404
    assert "nobody" in answer.json()["error"]["message"]


def test_the_cluster_tells_its_pools(cluster: BatonServe, tiny_model: Path) -> None:
    told = cluster.get("/cluster")
    assert told["model"] == {"path": str(tiny_model), "served_names": [MODEL]}
    for role in ("prefill", "decode"):
        assert (told["pools"][role]["wanted"], told["pools"][role]["ready"]) == (1, 1)


def test_each_worker_tells_where_it_runs_and_how_loaded_it_is(cluster: BatonServe) -> None:
    workers = cluster.workers()
    assert sorted(worker["role"] for worker in workers) == ["decode", "prefill"]
    assert len({worker["weights"] for worker in workers}) == 1
    for worker in workers:
        assert worker["state"] == "ready"
        assert worker["seen_by_router"] == "serving"
        assert worker["node"]
        engine = psutil.Process(worker["engine_pid"])
        assert engine.ppid() == worker["pid"]
        load = worker["load"]
        assert load["kv_blocks_total"] > 0
        assert {"running", "waiting", "kv_blocks_used", "step_time_s"} <= set(load)


def test_each_router_tells_its_processes(cluster: BatonServe) -> None:
    (router,) = cluster.get("/cluster/routers")["routers"]
    assert router["id"]
    assert router["node"]
    assert router["state"] == "running"
    assert "router.process" in psutil.Process(router["pid"]).cmdline()
    assert "haproxy" in psutil.Process(router["edge"]).name()
    fast, full = (psutil.Process(pid) for pid in router["fronts"])
    assert fast.name() == "vllm-rs"
    assert "router.unit.fronts.full_front" in full.cmdline()


def test_metrics_have_vllms_names_labelled_by_worker(cluster: BatonServe, client: OpenAI) -> None:
    def generated() -> tuple[float, float]:
        name = "vllm:generation_tokens_total"
        prefill, decode = (
            cluster.metric(name, role=role, worker=f"{role}-0") for role in ("prefill", "decode")
        )
        return prefill, decode

    prefill_tokens, decode_tokens = once_settled(generated)
    # The same blocks each time: both workers find them in their caches.
    for index in range(3):
        complete(client, [*range(300, 600), 600 + index], max_tokens=5)
    # Each first token is the prefill worker's, the other four are the decode worker's.
    wanted = (prefill_tokens + 3, decode_tokens + 12)
    until(lambda: generated() == wanted, "generation_tokens_total grows by 3 and 12")
    names = {
        "vllm:num_requests_running",
        "vllm:num_requests_waiting",
        "vllm:kv_cache_usage_perc",
        "vllm:prompt_tokens_total",
        "vllm:generation_tokens_total",
        "vllm:request_success_total",
        "vllm:prefix_cache_queries_total",
        "vllm:prefix_cache_hits_total",
    }
    for role in ("prefill", "decode"):
        label = f'worker="{role}-0"'
        found = {sample.partition("{")[0] for sample in cluster.metrics() if label in sample}
        assert names <= found
    buckets = cluster.metric("vllm:time_to_first_token_seconds_bucket", le="+Inf")
    assert buckets == cluster.metric("vllm:time_to_first_token_seconds_count") >= 3


# Concurrency


def test_concurrent_streams_have_the_texts_that_they_have_alone(
    cluster: BatonServe, client: OpenAI
) -> None:
    dice = random.Random(32)
    prompts = [
        dice.choices(range(300, 2000), k=dice.choice([5, 127, 128, 300])) for _ in range(STREAMS)
    ]

    def text(prompt: list[int]) -> str:
        return streamed_text(stream_completion(client, prompt))

    handoffs = cluster.metric("baton_handoffs_total")
    with ThreadPoolExecutor(STREAMS) as pool:
        together = list(pool.map(text, prompts))
    assert cluster.metric("baton_handoffs_total") - handoffs == STREAMS
    assert together == [text(prompt) for prompt in prompts]
    assert len(set(together)) == STREAMS
