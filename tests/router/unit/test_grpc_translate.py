"""Requests to bodies, events to messages, errors to statuses: tables, nothing runs."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from itertools import pairwise
from typing import Any

import pytest
from grpc import StatusCode
from hypothesis import given
from hypothesis import strategies as st

from protos.inference_pb2 import (
    FINISH_REASON_LENGTH,
    FINISH_REASON_STOP,
    GenerateRequest,
    GenerateResponse,
    Sampling,
    TokenIds,
    TokenLogprob,
    TokenLogprobs,
    Usage,
)
from router.core.events import Fault
from router.unit.grpc_front.errors import ErrorEvent, Failure, http_failure, recorded_failure
from router.unit.grpc_front.translate import AnswerReader, completion_body, parse

ALWAYS = {
    "stream": True,
    "stream_options": {"include_usage": True},
    "return_token_ids": True,
}
SCHEMA = '{"type": "object", "properties": {"z": {"const": 1}, "a": {"const": 1e400}}}'


# Requests


def body(request: GenerateRequest) -> Any:
    return json.loads(completion_body(parse(request.SerializeToString())))


def test_what_is_left_out_is_left_to_the_front() -> None:
    assert body(GenerateRequest(text="")) == {"prompt": "", **ALWAYS}


def test_a_prompt_of_token_ids() -> None:
    request = GenerateRequest(model="m", token_ids=TokenIds(ids=[0, 2**32 - 1]))
    assert body(request) == {"model": "m", "prompt": [0, 2**32 - 1], **ALWAYS}


def test_every_sampling_parameter_is_passed_on() -> None:
    values: dict[str, Any] = {
        "max_tokens": 7,
        "min_tokens": 2,
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": 40,
        "min_p": 0.1,
        "seed": -(2**63),
        "stop": ["\n", "é"],
        "stop_token_ids": [1, 2],
        "ignore_eos": True,
        "presence_penalty": -0.5,
        "frequency_penalty": 0.25,
        "repetition_penalty": 1.1,
        "logprobs": 3,
    }
    sampling = Sampling(**values, logit_bias={17: -100.0, 5: 1.5}, json_schema=SCHEMA)
    assert {field.name for field, _ in sampling.ListFields()} == {
        field.name for field in Sampling.DESCRIPTOR.fields
    }
    text = completion_body(GenerateRequest(text="x", sampling=sampling)).decode()
    # As written: its keys' order is the text's order, and its numbers are not ours to read.
    assert SCHEMA in text
    got = json.loads(text)
    assert got.pop("response_format")["type"] == "json_schema"
    assert got.pop("logit_bias") == {"17": -100.0, "5": 1.5}
    assert got == {"prompt": "x", **ALWAYS, **values, "return_tokens_as_token_ids": True}


def test_zeros_that_are_given_are_passed_on() -> None:
    fields = Sampling.DESCRIPTOR.fields
    names = [f.name for f in fields if f.has_presence and f.name != "json_schema"]
    got = body(GenerateRequest(text="x", sampling=Sampling(**dict.fromkeys(names, 0))))
    assert {name: got[name] for name in names} == dict.fromkeys(names, 0)
    assert len(names) > 10


REFUSED = {
    "no prompt": (GenerateRequest(model="m"), "no prompt"),
    "not a number": (
        GenerateRequest(text="x", sampling=Sampling(temperature=math.nan)),
        "`temperature` must be a finite number, not nan",
    ),
    "an infinite bias": (
        GenerateRequest(text="x", sampling=Sampling(logit_bias={3: -math.inf})),
        "`logit_bias` must be a finite number, not -inf",
    ),
    "a schema that is no JSON": (
        GenerateRequest(text="x", sampling=Sampling(json_schema="{'a': 1}")),
        "`json_schema` is no JSON",
    ),
    "a schema that is no object": (
        GenerateRequest(text="x", sampling=Sampling(json_schema="[1]")),
        "`json_schema` must be a JSON object",
    ),
    "an empty schema": (
        GenerateRequest(text="x", sampling=Sampling(json_schema="")),
        "`json_schema` is no JSON",
    ),
    "a schema without a bottom": (
        GenerateRequest(text="x", sampling=Sampling(json_schema='{"a":' * 100_000)),
        "`json_schema` is nested too deeply",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_json_cannot_say_is_refused(kind: str) -> None:
    request, says = REFUSED[kind]
    with pytest.raises(Failure, match=says) as caught:
        completion_body(request)
    assert caught.value.code is StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize("data", [b"\xff", b"\x12\x03abc\xff", b"\x12\x02\xc3\x28"])
def test_bytes_that_are_no_request_are_refused(data: bytes) -> None:
    with pytest.raises(Failure, match="GenerateRequest") as caught:
        parse(data)
    assert caught.value.code is StatusCode.INVALID_ARGUMENT


# Answers


def event(**fields: Any) -> bytes:
    return b"data: " + json.dumps(fields).encode() + b"\n\n"


def delta(text: str, *token_ids: int, **fields: Any) -> bytes:
    return event(choices=[{"index": 0, "text": text, "token_ids": token_ids, **fields}])


BEGIN = delta("", prompt_token_ids=[7, 8])
FINISH = delta("", finish_reason="length")
USAGE = event(
    choices=[],
    usage={
        "prompt_tokens": 2,
        "completion_tokens": 3,
        "prompt_tokens_details": {"cached_tokens": 1},
    },
)
DONE = b"data: [DONE]\n\n"
WHOLE = BEGIN + delta("é", 5) + b": still here\n\n" + delta("", 6) + delta("bc", 4) + FINISH
WHOLE += USAGE + DONE
LAST = GenerateResponse(
    finish_reason=FINISH_REASON_LENGTH,
    usage=Usage(prompt_tokens=2, completion_tokens=3, cached_tokens=1),
    request_id="id",
)


def read(pieces: Iterable[bytes], top: int = 0) -> list[GenerateResponse]:
    reader = AnswerReader("id", top)
    messages = [message for piece in pieces for message in reader.feed(piece)]
    reader.end()
    return messages


def test_what_comes_together_is_one_message() -> None:
    whole = GenerateResponse(text="ébc", token_ids=[5, 6, 4])
    whole.MergeFrom(LAST)
    assert read([WHOLE]) == [whole]


def test_the_end_is_told_once_all_of_it_has_come() -> None:
    pieces = [BEGIN, delta("a", 5), FINISH, USAGE, DONE, b"\n"]
    assert read(pieces) == [GenerateResponse(text="a", token_ids=[5]), LAST]


@given(st.lists(st.integers(0, len(WHOLE)), max_size=12))
def test_pieces_say_what_the_whole_says(cuts: list[int]) -> None:
    ends = sorted({0, *cuts, len(WHOLE)})
    pieces = [WHOLE[a:b] for a, b in pairwise(ends)]
    merged = GenerateResponse()
    for message in read(pieces):
        assert not merged.finish_reason, "something came after the end"
        merged.MergeFrom(GenerateResponse(token_ids=message.token_ids))
        merged.text += message.text
        merged.finish_reason = message.finish_reason
    assert (merged.text, merged.token_ids) == ("ébc", [5, 6, 4])
    assert merged.finish_reason == FINISH_REASON_LENGTH


def test_lines_may_end_as_on_windows() -> None:
    assert read([WHOLE.replace(b"\n", b"\r\n")]) == read([WHOLE])


def test_a_front_that_knows_of_no_cache_tells_no_cached_tokens() -> None:
    usage = event(
        choices=[],
        usage={"prompt_tokens": 2, "completion_tokens": 3, "prompt_tokens_details": None},
    )
    stop = delta("", finish_reason="stop")
    (message,) = read([stop + usage + DONE])
    assert message.finish_reason == FINISH_REASON_STOP
    assert message.usage == Usage(prompt_tokens=2, completion_tokens=3)


LOGPROBS = {
    "tokens": ["token_id:5", "token_id:6"],
    "token_logprobs": [-0.5, -9999.0],
    "top_logprobs": [
        {"token_id:9": -2.0, "token_id:5": -0.5, "token_id:8": -1.0},
        # The generated token is not one of the two likeliest.
        {"token_id:6": -9999.0, "token_id:2": -0.25, "token_id:3": -1.5},
    ],
    "text_offset": [0, 1],
}


@pytest.mark.parametrize("top", [0, 1, 2])
def test_logprobs_are_as_many_as_asked_for_and_the_likeliest_first(top: int) -> None:
    alternatives = (
        [TokenLogprob(token_id=5, logprob=-0.5), TokenLogprob(token_id=8, logprob=-1.0)],
        [TokenLogprob(token_id=2, logprob=-0.25), TokenLogprob(token_id=3, logprob=-1.5)],
    )
    first, _ = read([delta("ab", 5, 6, logprobs=LOGPROBS), FINISH + USAGE + DONE], top)
    assert list(first.logprobs) == [
        TokenLogprobs(logprob=-0.5, top=alternatives[0][:top]),
        TokenLogprobs(logprob=-9999.0, top=alternatives[1][:top]),
    ]


INCOMPLETE = {
    "nothing": b"",
    "no end": BEGIN + delta("a", 5),
    "half an event": BEGIN + delta("a", 5) + FINISH + USAGE + DONE[:-4],
    "no finish reason": BEGIN + delta("a", 5) + USAGE + DONE,
    "no usage": BEGIN + delta("a", 5) + FINISH + DONE,
    "no last event": BEGIN + delta("a", 5) + FINISH + USAGE,
}


def read_to_the_end(reader: AnswerReader, data: bytes, given: list[GenerateResponse]) -> None:
    for message in reader.feed(data):
        given.append(message)
    reader.end()


@pytest.mark.parametrize("kind", INCOMPLETE)
def test_an_answer_that_is_cut_never_looks_complete(kind: str) -> None:
    reader = AnswerReader("id", 0)
    given: list[GenerateResponse] = []
    with pytest.raises(Failure, match="cut before its end") as caught:
        read_to_the_end(reader, INCOMPLETE[kind], given)
    assert caught.value.code is StatusCode.UNAVAILABLE
    assert [message.text for message in given] == (["a"] if kind != "nothing" else [])
    assert not any(message.finish_reason for message in given)


def error_event(message: str, code: int | str | None) -> bytes:
    return event(error={"message": message, "type": "server_error", "param": None, "code": code})


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("server_error", StatusCode.INTERNAL),
        (None, StatusCode.INTERNAL),
        (500, StatusCode.INTERNAL),
        (503, StatusCode.UNAVAILABLE),
        (504, StatusCode.DEADLINE_EXCEEDED),
        (400, StatusCode.INVALID_ARGUMENT),
    ],
)
def test_an_error_event_ends_it_after_what_came_before(
    code: int | str | None, status: StatusCode
) -> None:
    reader = AnswerReader("id", 0)
    feed = reader.feed(BEGIN + delta("a", 5) + error_event("It broke.", code) + DONE)
    assert next(feed) == GenerateResponse(text="a", token_ids=[5])
    with pytest.raises(ErrorEvent, match="It broke") as caught:
        next(feed)
    assert caught.value.code is status


@pytest.mark.parametrize("what", [b"data: {\n", delta("", finish_reason="abort"), event(choices=3)])
def test_an_event_that_cannot_be_read_is_an_error_of_ours(what: bytes) -> None:
    with pytest.raises(Failure) as caught:
        list(AnswerReader("id", 0).feed(BEGIN + what))
    assert caught.value.code is StatusCode.INTERNAL


# Errors


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (400, StatusCode.INVALID_ARGUMENT),
        (401, StatusCode.UNAUTHENTICATED),
        (403, StatusCode.PERMISSION_DENIED),
        (404, StatusCode.NOT_FOUND),
        (405, StatusCode.INVALID_ARGUMENT),
        (409, StatusCode.ABORTED),
        (413, StatusCode.RESOURCE_EXHAUSTED),
        (422, StatusCode.INVALID_ARGUMENT),
        (429, StatusCode.RESOURCE_EXHAUSTED),
        (499, StatusCode.CANCELLED),
        (500, StatusCode.INTERNAL),
        (501, StatusCode.INTERNAL),
        (502, StatusCode.UNAVAILABLE),
        (503, StatusCode.UNAVAILABLE),
        (504, StatusCode.DEADLINE_EXCEEDED),
    ],
)
def test_an_http_status_has_a_code(status: int, code: StatusCode) -> None:
    error = {"error": {"message": "Not so.", "type": "x", "param": None, "code": "y"}}
    failure = http_failure(status, json.dumps(error).encode(), {})
    assert (failure.code, failure.message, failure.retry_after_s) == (code, "Not so.", None)


def test_a_refusal_tells_when_to_come_back() -> None:
    assert http_failure(429, b"", {"Retry-After": "7"}).retry_after_s == "7"


@pytest.mark.parametrize("content", [b"", b"<html>", b'{"error": 3}', b"\xff"])
def test_an_error_without_a_message_says_its_status(content: bytes) -> None:
    assert "HTTP status 502" in http_failure(502, content, {}).message


@pytest.mark.parametrize("letter", ["x", "é", "\N{ROCKET}"])
def test_a_long_message_is_cut_to_what_a_header_takes(letter: str) -> None:
    error = {"error": {"message": letter * 10_000}}
    message = http_failure(400, json.dumps(error).encode(), {}).message
    assert set(message) == {letter}
    assert 1490 < len(message.encode()) <= 1500


FAULTS = {
    Fault.REFUSED: (StatusCode.INVALID_ARGUMENT, None),
    Fault.DEADLINE: (StatusCode.DEADLINE_EXCEEDED, None),
    Fault.NO_WORKER: (StatusCode.UNAVAILABLE, "5"),
    Fault.WORKER_LOST: (StatusCode.UNAVAILABLE, "1"),
    Fault.POISON: (StatusCode.INTERNAL, None),
    Fault.ENGINE: (StatusCode.INTERNAL, None),
    Fault.FRONT_LOST: (StatusCode.UNAVAILABLE, "1"),
}


def story(**request: Any) -> bytes:
    return json.dumps({"id": "id", "requests": [request]}).encode()


@pytest.mark.parametrize("fault", Fault)
def test_every_fault_on_record_has_a_code(fault: Fault) -> None:
    failure = recorded_failure(story(end="failed", error="decode-0 died", fault=fault))
    assert failure is not None
    assert (failure.code, failure.retry_after_s) == FAULTS[fault]
    assert failure.message == "decode-0 died"


@pytest.mark.parametrize(
    "record",
    [
        b"",
        b'{"error": {"message": "unknown"}}',
        b'{"requests": []}',
        story(end=None, error="", fault=None),
        story(end="complete", error="a stop string matched", fault=None),
    ],
)
def test_without_a_failure_on_record_there_is_none(record: bytes) -> None:
    assert recorded_failure(record) is None
