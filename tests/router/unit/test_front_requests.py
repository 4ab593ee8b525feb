"""What the full front refuses before vLLM sees it, and what it writes into a request."""

from __future__ import annotations

import json
from typing import Any

import pytest

from router.unit.fronts.launch import MOST_COMPLETIONS
from router.unit.fronts.requests import (
    Refusal,
    as_anthropic,
    check,
    error_body,
    error_event,
    too_large,
)

TICKET = "0123456789abcdef" * 2
COMPLETIONS = "/v1/completions"
RESPONSES = "/v1/responses"


def refused(path: str, request: Any) -> Refusal:
    body = request if isinstance(request, bytes) else json.dumps(request).encode()
    answer = check(path, body, TICKET)
    assert isinstance(answer, Refusal), answer
    assert answer.status == 400
    return answer


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b'{"prompt": "a',
        b'{"prompt": "\xff"}',
        b'{"prompt": "\\ud800"}',
        b'{"temperature": NaN}',
        b'{"a":' * 40_000,
    ],
)
def test_what_is_no_json_is_refused(body: bytes) -> None:
    assert refused(COMPLETIONS, body).message.startswith("The body is not valid JSON")


@pytest.mark.parametrize("body", [b"[]", b'"text"', b"null", b"1"])
def test_what_is_no_object_is_refused(body: bytes) -> None:
    assert refused(COMPLETIONS, body).message == "The body must be a JSON object."


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        ({"kv_transfer_params": {"do_remote_prefill": True}}, "kv_transfer_params"),
        ({"ec_transfer_params": {"a": 1}}, "ec_transfer_params"),
        ({"kv_hints": {"a": 1}}, "kv_hints"),
        ({"priority": -1}, "priority"),
        ({"data_parallel_rank": 1}, "data_parallel_rank"),
        ({"vllm_xargs": {"fine": 1, "kv_transfer_params": 0}}, "kv_transfer_params"),
        ({"vllm_xargs": {"baton_output_token_ids": [1]}}, "baton_output_token_ids"),
    ],
)
@pytest.mark.parametrize("path", [COMPLETIONS, RESPONSES, "/v1/messages"])
def test_fields_that_are_the_engines_own_are_refused(
    path: str, request_: dict[str, Any], field: str
) -> None:
    refusal = refused(path, request_)
    assert refusal.field == field
    assert field in refusal.message


@pytest.mark.parametrize(
    "request_",
    [
        {"prompt": "a", "priority": 0, "kv_transfer_params": None, "vllm_xargs": None},
        {"prompt": "a", "vllm_xargs": {"fine": 1}, "request_id": "mine"},
        {"prompt": [1] * (MOST_COMPLETIONS + 1), "n": 1},
        {"prompt": ["a"] * (MOST_COMPLETIONS // 2), "n": 2},
        {"vllm_xargs": 5, "n": "2", "prompt": {}},
    ],
)
def test_everything_else_is_left_to_vllm_byte_for_byte(request_: dict[str, Any]) -> None:
    body = json.dumps(request_, indent=3).encode()
    assert check(COMPLETIONS, body, TICKET) == body


@pytest.mark.parametrize(
    "request_",
    [
        {"prompt": "a", "n": MOST_COMPLETIONS + 1},
        {"prompt": ["a"] * (MOST_COMPLETIONS + 1)},
        {"prompt": [[1], [2], [3]], "n": MOST_COMPLETIONS // 2},
    ],
)
def test_too_many_completions_are_refused(request_: dict[str, Any]) -> None:
    assert str(MOST_COMPLETIONS) in refused(COMPLETIONS, request_).message


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("store", True),
        ("background", True),
        ("previous_response_id", "resp_1"),
        ("conversation", {"id": "conv_1"}),
    ],
)
def test_responses_that_would_have_to_be_kept_are_refused(field: str, value: Any) -> None:
    assert refused(RESPONSES, {"input": "a", field: value}).field == field


def test_a_response_is_named_by_its_ticket() -> None:
    body = json.dumps({"input": "ä", "request_id": "f" * 32, "previous_response_id": None}).encode()
    passed = check(RESPONSES, body, TICKET)
    assert isinstance(passed, bytes)
    assert json.loads(passed) == {
        "input": "ä", "request_id": f"resp_{TICKET}", "previous_response_id": None, "store": False
    }  # fmt: skip


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, "invalid_request_error"), (404, "not_found_error"), (413, "request_too_large"),
        (429, "rate_limit_error"), (500, "api_error"), (503, "overloaded_error"),
    ],
)  # fmt: skip
def test_errors_have_the_form_of_the_paths_api(status: int, kind: str) -> None:
    refusal = Refusal(status, "so", "x")
    theirs = json.loads(error_body("/v1/messages", refusal))
    assert theirs == {"type": "error", "error": {"type": kind, "message": "so"}}
    ours = json.loads(error_body(COMPLETIONS, refusal))["error"]
    assert (ours["message"], ours["param"], ours["code"]) == ("so", "x", status)
    vllms = json.dumps({"error": {"message": "so", "type": "BadRequestError", "code": 400}})
    assert json.loads(as_anthropic("/v1/messages/count_tokens", status, vllms.encode())) == theirs


def test_an_error_that_can_not_be_read_is_passed_on_as_text() -> None:
    told = json.loads(as_anthropic("/v1/messages", 500, b"Internal Server Error"))
    assert told["error"] == {"type": "api_error", "message": "Internal Server Error"}


def test_the_limit_is_told() -> None:
    assert "1000 bytes" in too_large(1000).message


def test_the_last_event_of_a_stream_that_failed() -> None:
    name, data = error_event(RESPONSES, 7).decode().rstrip("\n").split("\n")
    event = json.loads(data.removeprefix("data: "))
    assert name == "event: error"
    assert (event["type"], event["sequence_number"]) == ("error", 7)
    assert event["error"]["message"] == event["message"]
    data = error_event("/v1/messages", 7).decode().split("\n")[1]
    assert json.loads(data.removeprefix("data: "))["error"]["type"] == "api_error"
