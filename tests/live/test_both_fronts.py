"""Both fronts at one URL: which answers what, and that each says what plain vLLM says.

The same bodies go to the cluster and to vLLM's own API server.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

import anthropic
import httpx
import openai
import pytest
from anthropic import Anthropic
from openai import OpenAI

from tests.live.cluster_process import BatonServe
from tests.live.conftest import MODEL
from tests.live.test_api import MESSAGES, PROMPT, SCHEMA, TOOLS

TOKENS: Final = 12
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
ANTHROPIC, COUNT, RESPONSES = "/v1/messages", "/v1/messages/count_tokens", "/v1/responses"
IDS: Final = [[300, 301, 302], list(range(400, 540)), [1900]]
LIMIT_S: Final = 120.0
GUIDED: Final = {"type": "json_schema", "json_schema": {"name": "thing", "schema": SCHEMA}}
ANTHROPIC_TOOLS: Final = [
    {
        "name": tool["function"]["name"],
        "input_schema": tool["function"]["parameters"],
        "strict": True,
    }
    for tool in TOOLS
]
SYSTEM: Final = "Answer in one word."


@dataclass(frozen=True)
class Asked:
    """A request, the front that is to answer it, and how many engine requests it makes."""

    front: str
    path: str
    body: dict[str, Any]
    requests: int = 1

    def send(self, url: str, **more: Any) -> httpx.Response:
        body = {"model": MODEL, **self.body, **more}
        return httpx.post(url + self.path, json=body, timeout=LIMIT_S)


def completion(front: str, prompt: Any = PROMPT, requests: int = 1, **body: Any) -> Asked:
    greedy = {"prompt": prompt, "max_tokens": TOKENS, "temperature": 0, **body}
    return Asked(front, COMPLETIONS, greedy, requests)


def chat(front: str, messages: Any = MESSAGES, requests: int = 1, **body: Any) -> Asked:
    greedy = {"messages": messages, "max_tokens": TOKENS, "temperature": 0, **body}
    return Asked(front, CHAT, greedy, requests)


def message(**body: Any) -> Asked:
    return Asked(
        "full",
        ANTHROPIC,
        {"messages": MESSAGES, "max_tokens": TOKENS, "temperature": 0, **body},
    )


def response(**body: Any) -> Asked:
    greedy = {"input": PROMPT, "max_output_tokens": TOKENS, "temperature": 0, **body}
    return Asked("full", RESPONSES, greedy)


SERVED: Final = {
    "completion": completion("fast"),
    "completion of token ids": completion("fast", IDS[1]),
    "completion with n 1": completion("fast", n=1),
    "texts": completion("full", [PROMPT, "def f("], 2),
    "a list of one text": completion("full", [PROMPT]),
    "lists of token ids": completion("full", IDS, 3, return_token_ids=True),
    "n completions": completion("full", requests=3, n=3, temperature=1, seed=3),
    "n of each of two": completion("full", [PROMPT, "a"], 4, n=2, temperature=1, seed=3),
    "logprobs of a list": completion("full", IDS[:1], logprobs=3),
    "guided, of a list": completion("full", [PROMPT], max_tokens=120, response_format=GUIDED),
    "bad words": completion("full", bad_words=["prefix"]),
    "a long body": completion("full", IDS[1], user="u" * 70_000),
    "a long prompt": completion("full", [300 + i % 1700 for i in range(8000)], user="u" * 40_000),
    "chat": chat("fast"),
    "chat with a system message": chat("fast", [{"role": "system", "content": SYSTEM}, *MESSAGES]),
    "chat with tools": chat("fast", tools=TOOLS, tool_choice="required", max_tokens=200),
    "n chats": chat("full", requests=2, n=2, temperature=1, seed=5),
    "chat in parts": chat(
        "full",
        [{"role": "user", "content": [{"type": "text", "text": part} for part in ("a", "b")]}],
    ),
    "chat in a long body": chat("full", user="u" * 70_000),
    "message": message(),
    "message in parts": message(
        messages=[{"role": "user", "content": [{"type": "text", "text": "What is a list?"}]}]
    ),
    "message with a system prompt": message(system=SYSTEM),
    "message with a stop sequence": message(stop_sequences=["e"]),
    "message with tools": message(
        tools=ANTHROPIC_TOOLS, tool_choice={"type": "any"}, max_tokens=200
    ),
    "message with one tool": message(
        tools=ANTHROPIC_TOOLS, tool_choice={"type": "tool", "name": "open_door"}, max_tokens=200
    ),
    "message with tools at will": message(tools=ANTHROPIC_TOOLS, tool_choice={"type": "auto"}),
    "response": response(),
    "response with instructions": response(input=MESSAGES, instructions=SYSTEM),
    "guided response": response(
        max_output_tokens=120,
        text={"format": {"type": "json_schema", "name": "thing", "schema": SCHEMA}},
    ),
}
"""Generating, whole and as a stream."""

WHOLE: Final = {
    "beam search": completion("full", use_beam_search=True, n=2),
    "beam search of a chat": chat("full", use_beam_search=True, n=2),
    "echo of texts": completion("full", [PROMPT, "a b"], echo=True, logprobs=2),
    "tokenize": Asked("fast", "/tokenize", {"prompt": PROMPT}),
    "tokenize a chat": Asked("fast", "/tokenize", {"messages": MESSAGES}),
    "detokenize": Asked("fast", "/detokenize", {"tokens": IDS[1]}),
    "count_tokens": Asked("full", COUNT, {"messages": MESSAGES}),
    "count_tokens of all": Asked(
        "full", COUNT, {"messages": MESSAGES, "system": SYSTEM, "tools": ANTHROPIC_TOOLS}
    ),
}
"""Not as a stream."""

REFUSED: Final = {
    "suffix": completion("full", suffix="return"),
    "n greedy": completion("full", n=2),
    "an empty prompt": completion("full", [PROMPT, ""]),
    "a token id of no token": completion("full", [[300], [5000]]),
    "temperature": completion("full", [PROMPT], temperature=3),
    "max_tokens 0": completion("full", [PROMPT], max_tokens=0),
    "messages of no role": message(messages=[{"role": "nobody", "content": "a"}]),
    "message without max_tokens": message(max_tokens=None),
    "message of no tokens": message(max_tokens=0),
    "message of another model": message(model="gpt-none"),
    "message too hot": message(temperature=3),
    "count_tokens of another model": Asked(
        "full", COUNT, {"messages": MESSAGES, "model": "gpt-none"}
    ),
    "response of another model": response(model="gpt-none"),
    "response of no tokens": response(max_output_tokens=0),
    "response of too many tokens": response(max_output_tokens=100_000),
    "tokenize null": Asked("full", "/tokenize", {"prompt": PROMPT, "add_special_tokens": None}),
    "detokenize below 0": Asked("full", "/detokenize", {"tokens": [-1]}),
}
"""By vLLM's server, whose message it is."""

# Of one answer alone, or of the cache, which has another history in each server.
_PASSING: Final = (
    *("id", "created", "created_at", "completed_at", "item_id", "call_id"),
    *("system_fingerprint", "store", "request_id", "usage"),
)


def essence(answer: Any) -> Any:
    """All that two servers must have in common."""
    if isinstance(answer, dict):
        return {key: essence(value) for key, value in answer.items() if key not in _PASSING}
    if isinstance(answer, list):
        return [essence(value) for value in answer]
    return pytest.approx(answer, abs=1e-3) if isinstance(answer, float) else answer


def said(answer: dict[str, Any]) -> Any:
    """What the fast front and vLLM's server write in the same way."""
    if "choices" not in answer:
        return essence(answer)
    choices = []
    for choice in answer["choices"]:
        message = choice.get("message") or {}
        functions = [call["function"] for call in message.get("tool_calls") or ()]
        calls = [(function["name"], json.loads(function["arguments"])) for function in functions]
        text = choice.get("text") or message.get("content") or ""
        choices.append((text, calls, choice["finish_reason"]))
    return choices


def used(answer: dict[str, Any]) -> tuple[int, int]:
    """Tokens of prompt and answer, in either API's words."""
    usage = answer["usage"]
    prompt = usage.get("prompt_tokens", usage.get("input_tokens", 0))
    # Anthropic's count of a prompt leaves out what a cache held.
    for name in ("cache_creation_input_tokens", "cache_read_input_tokens"):
        prompt += usage.get(name) or 0
    return prompt, usage.get("completion_tokens", usage.get("output_tokens"))


# Which front answers what, and as plain vLLM would


@pytest.mark.parametrize("kind", SERVED | WHOLE)
def test_an_answer_is_plain_vllms_and_of_the_front_that_is_meant(
    kind: str, cluster: BatonServe, plain_url: str
) -> None:
    asked = (SERVED | WHOLE)[kind]
    handoffs = cluster.metric("baton_handoffs_total")
    ours, plain = asked.send(cluster.url), asked.send(plain_url)
    assert (ours.status_code, plain.status_code) == (200, 200), ours.text
    assert ours.headers["x-baton-front"] == asked.front
    assert ours.headers["x-request-id"]
    view = essence if asked.front == "full" else said
    assert view(ours.json()) == view(plain.json())
    if "usage" in plain.json():
        assert used(ours.json()) == used(plain.json())
    if kind in SERVED:
        assert cluster.metric("baton_handoffs_total") - handoffs == asked.requests


@pytest.mark.parametrize(
    "kind", ["completion", "a list of one text", "chat", "n chats", "response"]
)
def test_a_clients_own_request_id_does_not_take_the_place_of_its_ticket(
    kind: str, cluster: BatonServe
) -> None:
    """Not even where it is somebody else's ticket, whose tenant and terms it would have."""
    asked = (SERVED | WHOLE)[kind]
    first = asked.send(cluster.url, user="first")
    theirs = first.headers["x-request-id"]
    second = asked.send(cluster.url, request_id=theirs)
    assert (first.status_code, second.status_code) == (200, 200), second.text
    ticket = second.headers["x-request-id"]
    assert ticket != theirs
    for each in (theirs, ticket):
        records = cluster.get(f"/cluster/requests/{each}")["requests"]
        assert len(records) == asked.requests


@pytest.mark.parametrize("kind", SERVED)
def test_a_stream_is_plain_vllms_and_of_the_front_that_is_meant(
    kind: str, cluster: BatonServe, plain_url: str
) -> None:
    asked = SERVED[kind]
    ours, plain = asked.send(cluster.url, stream=True), asked.send(plain_url, stream=True)
    assert (ours.status_code, plain.status_code) == (200, 200), ours.text
    assert ours.headers["content-type"].startswith("text/event-stream")
    assert ours.headers["x-baton-front"] == asked.front
    assert told(ours.text) == told(plain.text)
    if asked.path in (COMPLETIONS, CHAT):
        assert ours.text.endswith("data: [DONE]\n\n")


def told(stream: str) -> dict[Any, Any]:
    """What a stream says, whatever its pieces: texts by choice or kind of event, and its ends."""
    texts: dict[Any, str] = {}
    ends: dict[Any, Any] = {}
    kinds: list[str] = []
    for line in stream.splitlines():
        name, _, data = line.partition(": ")
        if name != "data" or data == "[DONE]":
            continue
        event = json.loads(data)
        for choice in event.get("choices", ()):
            for place, text in _pieces(choice):
                texts[place] = texts.get(place, "") + text
            if choice.get("finish_reason") is not None:
                ends[choice["index"]] = choice["finish_reason"]
        kind = event.get("type", "chunk")
        if kind not in kinds[-1:]:
            kinds.append(kind)
        place, text = _delta(event)
        texts[place] = texts.get(place, "") + text
        if kind == "message_delta":
            ends[kind] = event["delta"]["stop_reason"]
        if kind == "response.completed":
            ends[kind] = essence(event["response"])
    return {"texts": texts, "ends": ends, "kinds": kinds}


def _pieces(choice: dict[str, Any]) -> Iterable[tuple[tuple[Any, ...], str]]:
    """What a chunk adds to which part of a choice."""
    index, delta = choice["index"], choice.get("delta") or {}
    yield (index, "text"), choice.get("text") or delta.get("content") or ""
    for call in delta.get("tool_calls") or ():
        function = call["function"]
        yield (index, call["index"], "name"), function.get("name") or ""
        yield (index, call["index"], "arguments"), function.get("arguments") or ""


def _delta(event: dict[str, Any]) -> tuple[tuple[Any, ...], str]:
    """The same of an event of Anthropic's API or of Responses."""
    delta = event.get("delta", "")
    place = (event.get("type"), event.get("index"), event.get("output_index"))
    if isinstance(delta, dict):
        return place, delta.get("text") or delta.get("partial_json") or ""
    return place, delta


@pytest.mark.parametrize("kind", REFUSED)
def test_what_vllms_server_refuses_it_refuses_in_its_words(
    kind: str, cluster: BatonServe, plain_url: str
) -> None:
    asked = REFUSED[kind]
    ours, plain = asked.send(cluster.url), asked.send(plain_url)
    assert 400 <= ours.status_code == plain.status_code < 500, ours.text
    assert ours.headers["x-baton-front"] == asked.front
    form = ours.json()
    if asked.path in (ANTHROPIC, COUNT):
        assert form["type"] == "error"
        kinds = {400: "invalid_request_error", 404: "not_found_error"}
        assert form["error"]["type"] == kinds[ours.status_code]
        assert set(form["error"]) == {"type", "message"}
    assert form["error"]["message"] == plain.json()["error"]["message"]


def test_the_list_of_models_is_the_fast_fronts(cluster: BatonServe) -> None:
    assert httpx.get(f"{cluster.url}/v1/models").headers["x-baton-front"] == "fast"


@pytest.mark.parametrize(
    ("field", "value"),
    [("store", True), ("background", True), ("previous_response_id", "resp_1")],
)
def test_a_response_that_would_have_to_be_kept_is_refused_with_a_sentence(
    field: str, value: object, cluster: BatonServe
) -> None:
    answer = response(**{field: value}).send(cluster.url)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["param"] == field
    assert error["message"].startswith(f"{field} needs responses to be kept, and none is")


# The clients


@pytest.fixture(scope="module")
def anthropics(cluster: BatonServe) -> Anthropic:
    return Anthropic(base_url=cluster.url, api_key="none", max_retries=0, timeout=LIMIT_S)


def test_anthropics_client_gets_a_message_whole_and_streamed(
    anthropics: Anthropic, cluster: BatonServe
) -> None:
    asked: dict[str, Any] = {
        "model": MODEL,
        "messages": MESSAGES,
        "system": SYSTEM,
        "max_tokens": TOKENS,
        "extra_body": {"temperature": 0},
    }
    raw = anthropics.messages.with_raw_response.create(**asked)
    assert raw.headers["x-baton-front"] == "full"
    request_id = raw.headers["x-request-id"]
    whole = raw.parse()
    assert request_id in whole.id
    (block,) = whole.content
    assert block.type == "text"
    assert (whole.role, whole.stop_reason) == ("assistant", "max_tokens")
    counted = anthropics.messages.count_tokens(model=MODEL, messages=MESSAGES, system=SYSTEM)
    assert (whole.usage.input_tokens, whole.usage.output_tokens) == (counted.input_tokens, TOKENS)
    with anthropics.messages.stream(**asked) as stream:
        assert "".join(stream.text_stream) == block.text
        final = stream.get_final_message()
    assert (final.stop_reason, final.usage.output_tokens) == ("max_tokens", TOKENS)
    (record,) = cluster.get(f"/cluster/requests/{request_id}")["requests"]
    assert (record["end"], record["output_tokens"]) == ("complete", TOKENS)


def test_anthropics_client_gets_a_tools_arguments(anthropics: Anthropic) -> None:
    asked: dict[str, Any] = {
        "model": MODEL,
        "messages": MESSAGES,
        "max_tokens": 200,
        "tools": ANTHROPIC_TOOLS,
        "tool_choice": {"type": "tool", "name": "open_door"},
        "extra_body": {"temperature": 0},
    }
    whole = anthropics.messages.create(**asked)
    assert whole.stop_reason == "tool_use"
    (call,) = whole.content
    assert call.type == "tool_use"
    assert call.name == "open_door"
    assert call.input in ({"door": "front"}, {"door": "back"})
    with anthropics.messages.stream(**asked) as stream:
        (streamed,) = stream.get_final_message().content
    assert streamed.type == "tool_use"
    assert (streamed.name, streamed.input) == (call.name, call.input)


def test_anthropics_client_raises_what_the_status_stands_for(anthropics: Anthropic) -> None:
    asked: dict[str, Any] = {"model": MODEL, "messages": MESSAGES, "max_tokens": TOKENS}
    with pytest.raises(anthropic.NotFoundError, match="gpt-none"):
        anthropics.messages.create(**{**asked, "model": "gpt-none"})
    with pytest.raises(anthropic.BadRequestError, match="max_tokens"):
        anthropics.messages.create(**{**asked, "max_tokens": 0})
    with pytest.raises(anthropic.BadRequestError, match="temperature"):
        anthropics.messages.create(**asked, stream=True, extra_body={"temperature": 3})
    with pytest.raises(anthropic.BadRequestError, match="kv_transfer_params is not the client's"):
        anthropics.messages.create(**asked, extra_body={"kv_transfer_params": {"a": 1}})


def test_openais_client_gets_a_response_whole_and_streamed(
    client: OpenAI, cluster: BatonServe
) -> None:
    asked: dict[str, Any] = {
        "model": MODEL,
        "input": PROMPT,
        "instructions": SYSTEM,
        "max_output_tokens": TOKENS,
        "temperature": 0,
    }
    raw = client.responses.with_raw_response.create(**asked)
    assert raw.headers["x-baton-front"] == "full"
    request_id = raw.headers["x-request-id"]
    whole = raw.parse()
    assert whole.id == f"resp_{request_id}"
    assert whole.status == "incomplete"
    assert whole.incomplete_details is not None
    assert whole.incomplete_details.reason == "max_output_tokens"
    assert whole.usage is not None
    assert whole.usage.output_tokens == TOKENS
    with client.responses.stream(**asked) as stream:
        deltas = [event.delta for event in stream if event.type == "response.output_text.delta"]
    assert "".join(deltas) == whole.output_text != ""
    (record,) = cluster.get(f"/cluster/requests/{request_id}")["requests"]
    assert (record["end"], record["output_tokens"]) == ("complete", TOKENS)


def test_openais_client_is_told_that_responses_are_not_kept(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="store needs responses to be kept"):
        client.responses.create(model=MODEL, input=PROMPT, store=True)


def test_openais_client_gets_choices_in_their_order(client: OpenAI) -> None:
    prompts = [PROMPT, "def f("]
    alone = [
        client.completions.create(model=MODEL, prompt=prompt, max_tokens=TOKENS, temperature=0)
        for prompt in prompts
    ]
    together = client.completions.create(
        model=MODEL, prompt=prompts, max_tokens=TOKENS, temperature=0
    )
    assert [choice.index for choice in together.choices] == [0, 1]
    assert [choice.text for choice in together.choices] == [a.choices[0].text for a in alone]
    several = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, n=3, max_tokens=TOKENS, temperature=1, seed=1
    )
    assert len({choice.message.content for choice in several.choices}) == 3


def test_one_responses_header_leads_to_all_its_engine_requests(cluster: BatonServe) -> None:
    asked = completion("full", [PROMPT, "def f("], n=2, temperature=1, seed=3)
    answer = asked.send(cluster.url)
    record = cluster.get(f"/cluster/requests/{answer.headers['x-request-id']}")
    assert [request["end"] for request in record["requests"]] == ["complete"] * 4
