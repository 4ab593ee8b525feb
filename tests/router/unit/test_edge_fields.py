"""The edge's tables of request fields, held against vLLM's own request types.

A field that vLLM knows and the edge does not would be taken for one that nobody knows: it would go
to the fast front, whatever that makes of it. And what the edge gives to the fast front for one of
the fields, the real one must serve wherever vLLM's types accept it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
from pydantic import BaseModel
from running_edge import RunningEdge
from running_unit import MODEL_NAME, Unit, build_model
from vllm.entrypoints.anthropic.protocol import (
    AnthropicCountTokensRequest,
    AnthropicMessagesRequest,
)
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
from vllm.entrypoints.serve.tokenize.protocol import (
    DetokenizeRequest,
    TokenizeChatRequest,
    TokenizeCompletionRequest,
)
from vllm.exceptions import VLLMClientError

from router.unit.edge import configuration as edge
from router.unit.fronts import requests

SCRIPT: Final = re.sub(r"--.*", "", Path(edge.__file__).with_name("request_body.lua").read_text())
TYPES: Final[dict[str, list[type[BaseModel]]]] = {
    "/v1/completions": [CompletionRequest],
    "/v1/chat/completions": [ChatCompletionRequest],
    "/tokenize": [TokenizeCompletionRequest, TokenizeChatRequest],
    "/detokenize": [DetokenizeRequest],
}
OTHER_TYPES: Final[list[type[BaseModel]]] = [
    ResponsesRequest,
    AnthropicMessagesRequest,
    AnthropicCountTokensRequest,
]
"""Of what only the full front serves."""

ENGINES_OWN: Final = re.compile(r"kv_|transfer|rank|priority|xargs|hints")
"""What the names of fields look like that engines and routers use among themselves."""

PLAIN: Final[dict[str, dict[str, Any]]] = {
    "/v1/completions": {"prompt": "a", "max_tokens": 2},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "a"}], "max_tokens": 2},
    "/tokenize": {"prompt": "a"},
    "/detokenize": {"tokens": [5]},
}
VALUES: Final[list[Any]] = [
    *(None, True, False, 0, 1, 5, -1, 0.5, 1e30, "", "a", [], [1], ["a"]),
    *({}, {"a": 1}, {"1": 1}, {"type": "text"}),
]


def is_beyond_types(field: str, value: Any) -> bool:
    """Whether more than the types decide: the model, its vocabulary, its engine."""
    return (
        (field == "model" and value is not None)
        or (field == "logprobs" and value is not None and value is not False)
        or (field, value) in (("prompt_logprobs", -1), ("prompt", []))
    )


def table(name: str) -> str:
    """The text of one of the script's tables."""
    found = re.search(rf"^local {name} = {{(.*?)^}}", SCRIPT, re.M | re.S)
    assert found is not None, name
    return found[1]


def names(text: str) -> set[str]:
    return set(re.findall(r"(\w+) = ", text))


def listed() -> dict[str, set[str]]:
    """By path: the fields that the edge's table names."""
    shared = {name: names(table(name)) for name in ("SAMPLING", "RENDERING")}
    _, *parts = re.split(r'\["(/[\w/]+)"\] = ', table("FIELDS"))
    return {
        path: names(text).union(*(shared[name] for name in shared if name in text))
        for path, text in zip(parts[::2], parts[1::2], strict=True)
    }


def known(model: type[BaseModel]) -> set[str]:
    """The names under which a client can give the type's fields."""
    aliases = {field.alias for field in model.model_fields.values() if field.alias is not None}
    return set(model.model_fields) | aliases


def test_the_tables_are_read() -> None:
    fields = listed()
    assert set(fields) == set(edge.CHOSEN_PATHS) == set(TYPES)
    assert {"prompt", "n", "suffix", "kv_transfer_params"} <= fields["/v1/completions"]
    assert {"messages", "n", "tool_choice", "tools"} <= fields["/v1/chat/completions"]
    assert fields["/detokenize"] == {"model", "tokens"}


@pytest.mark.parametrize("path", TYPES)
def test_every_field_of_vllms_is_listed(path: str) -> None:
    for model in TYPES[path]:
        assert known(model) - listed()[path] == set(), f"{model.__name__} has fields not judged"


def test_every_field_between_engines_is_refused() -> None:
    refused = names(table("REFUSED"))
    assert refused - {"vllm_xargs"} == set(requests._ENGINES_OWN)
    for model in [*(model for models in TYPES.values() for model in models), *OTHER_TYPES]:
        suspicious = {name for name in known(model) if ENGINES_OWN.search(name)}
        assert suspicious - refused == set(), model.__name__


@pytest.fixture(scope="module")
def edge_alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningEdge]:
    edge = RunningEdge(tmp_path_factory.mktemp("edge") / "u")
    yield edge
    edge.end()


@pytest.fixture(scope="module")
def unit(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Unit]:
    """With the real fast front."""
    directory = tmp_path_factory.mktemp("unit")
    unit = Unit(directory / "u", build_model(directory / "model"), pace_s=0.0)
    try:
        unit.wait_until_serving()
        yield unit
    finally:
        unit.end()


def vllm_accepts(path: str, body: dict[str, Any]) -> bool:
    """As one of the types of this path, and as sampling parameters if it has any."""
    for model in TYPES[path]:
        try:
            request = model.model_validate(body)
            if isinstance(request, CompletionRequest | ChatCompletionRequest):
                asked = getattr(request, "max_completion_tokens", None)
                tokens = request.max_tokens if asked is None else asked
                request.to_sampling_params(2 if tokens is None else tokens, {})
        except (ValueError, VLLMClientError):
            continue
        return True
    return False


@pytest.mark.parametrize("path", TYPES)
def test_the_fast_front_serves_what_it_is_given(
    edge_alone: RunningEdge, unit: Unit, path: str
) -> None:
    served, failed = 0, []
    for field in sorted(listed()[path]):
        for value in VALUES:
            body = {"model": MODEL_NAME, **PLAIN[path], field: value}
            if is_beyond_types(field, value):
                continue
            status, _, headers = edge_alone.post(path, body)
            if status == 400 or headers["X-Baton-Front"] == "full":
                continue
            response = unit.request("POST", path, body)
            answer = response.read().decode()
            served += response.status == 200
            expected = (200,) if vllm_accepts(path, body) else (200, 400)
            if response.status not in expected:
                failed.append(f"{json.dumps({field: value})}: {response.status} {answer}")
    assert failed == []
    # One for each field at least, or nearly.
    assert served > len(listed()[path]) / 2
