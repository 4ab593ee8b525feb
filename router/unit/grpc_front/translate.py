"""Between `baton.v1` and the HTTP API's completions route: requests and events.

Pure. A GenerateRequest becomes a JSON body, the events of the answer's stream GenerateResponses;
what goes wrong, `errors` names.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from heapq import nlargest
from typing import Any, Final

import msgspec
from google.protobuf.message import DecodeError
from grpc import StatusCode
from msgspec import Struct

from protos.inference_pb2 import (
    FINISH_REASON_LENGTH,
    FINISH_REASON_STOP,
    FINISH_REASON_UNSPECIFIED,
    GenerateRequest,
    GenerateResponse,
    Sampling,
    TokenLogprob,
    TokenLogprobs,
    Usage,
)
from router.unit.grpc_front.errors import ApiError, Failure, event_failure

_FINISH_REASONS: Final = {
    None: FINISH_REASON_UNSPECIFIED,
    "stop": FINISH_REASON_STOP,
    "length": FINISH_REASON_LENGTH,
}
_CUT: Final = "The answer was cut before its end; try again."
_TOKEN: Final = "token_id:"
"""What names a token by its id where the API has texts."""


# Requests


def parse(data: bytes) -> GenerateRequest:
    """Raises Failure for bytes that are no GenerateRequest."""
    try:
        return GenerateRequest.FromString(data)
    except DecodeError:
        raise _invalid("The message is no baton.v1.GenerateRequest.") from None


def completion_body(request: GenerateRequest) -> bytes:
    """The body of a streamed completion. What its values may be is checked behind the edge.

    Raises Failure for what JSON can't say.
    """
    body: dict[str, Any] = {
        "prompt": _prompt(request),
        "stream": True,
        "stream_options": {"include_usage": True},
        "return_token_ids": True,
        **_sampling(request.sampling),
    }
    if request.model:
        body["model"] = request.model
    return msgspec.json.encode(body)


def _prompt(request: GenerateRequest) -> str | list[int]:
    kind = request.WhichOneof("prompt")
    if kind is None:
        raise _invalid("There is no prompt: give `text` or `token_ids`.")
    return request.text if kind == "text" else list(request.token_ids.ids)


def _sampling(sampling: Sampling) -> dict[str, Any]:
    """Parameters have the same names in the HTTP API."""
    fields: dict[str, Any] = {}
    for field, value in sampling.ListFields():
        if field.name == "json_schema":
            fields["response_format"] = _json_schema(value)
        elif field.name == "logit_bias":
            fields[field.name] = {token: _finite(field.name, bias) for token, bias in value.items()}
        elif field.is_repeated:
            fields[field.name] = list(value)
        else:
            fields[field.name] = _finite(field.name, value)
    if "logprobs" in fields:
        fields["return_tokens_as_token_ids"] = True
    return fields


def _finite(name: str, value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        raise _invalid(f"`{name}` must be a finite number, not {value}.")
    return value


def _json_schema(text: str) -> dict[str, Any]:
    try:
        msgspec.json.decode(text, type=dict[str, msgspec.Raw])
    except msgspec.ValidationError:
        raise _invalid("`json_schema` must be a JSON object.") from None
    except RecursionError:
        raise _invalid("`json_schema` is nested too deeply.") from None
    except msgspec.DecodeError as error:
        raise _invalid(f"`json_schema` is no JSON: {error}.") from None
    # As it was written: the order of its keys is the order of the text's.
    schema = {"name": "schema", "schema": msgspec.Raw(text.encode())}
    return {"type": "json_schema", "json_schema": schema}


def _invalid(message: str) -> Failure:
    return Failure(StatusCode.INVALID_ARGUMENT, message)


# Answers


class _Logprobs(Struct):
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]


class _Choice(Struct):
    text: str = ""
    token_ids: list[int] | None = None
    logprobs: _Logprobs | None = None
    finish_reason: str | None = None


class _PromptDetails(Struct):
    cached_tokens: int = 0


class _Usage(Struct):
    prompt_tokens: int
    completion_tokens: int
    prompt_tokens_details: _PromptDetails | None = None


class _Event(Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: ApiError | None = None


_event_decoder: Final = msgspec.json.Decoder(_Event)


class AnswerReader:
    """Reads one stream of events. `top` is how many alternatives each token is to have."""

    def __init__(self, request_id: str, top: int) -> None:
        self.request_id = request_id
        self._top = top
        self._rest = b""
        self._finish_reason: str | None = None
        self._usage: _Usage | None = None
        self._complete = False

    def feed(self, data: bytes) -> Iterator[GenerateResponse]:
        """At most one message, for all that `data` brings. Raises Failure after it.

        Every event is one line that begins with `data:`; what else there is, are comments.
        """
        if self._complete:
            return
        *lines, self._rest = (self._rest + data).split(b"\n")
        choices: list[_Choice] = []
        failure = None
        try:
            for line in lines:
                if line.startswith(b"data:"):
                    choices += self._take(line[len(b"data:") :].strip())
        except Failure as found:
            failure = found
        message = self._message(choices)
        if message.ByteSize():
            yield message
        if failure is not None:
            raise failure

    def end(self) -> None:
        """The stream is over. Raises Failure if it is not complete."""
        if not self._complete:
            raise Failure(StatusCode.UNAVAILABLE, _CUT)

    def _take(self, data: bytes) -> list[_Choice]:
        if data == b"[DONE]":
            self._complete = self._finish_reason is not None and self._usage is not None
            self.end()
            return []
        try:
            event = _event_decoder.decode(data)
        except msgspec.DecodeError as error:
            raise Failure(StatusCode.INTERNAL, f"The answer can't be read: {error}.") from None
        if event.error is not None:
            raise event_failure(event.error)
        self._usage = event.usage or self._usage
        for choice in event.choices:
            self._finish_reason = choice.finish_reason or self._finish_reason
        if self._finish_reason not in _FINISH_REASONS:
            raise Failure(StatusCode.INTERNAL, f"The answer ended with {self._finish_reason!r}.")
        return event.choices

    def _message(self, choices: list[_Choice]) -> GenerateResponse:
        message = GenerateResponse(
            text="".join([choice.text for choice in choices]),
            token_ids=[token for choice in choices for token in choice.token_ids or ()],
        )
        for choice in choices:
            if choice.logprobs is not None:
                message.logprobs.extend(_logprobs(choice.logprobs, self._top))
        if self._complete:
            assert self._usage is not None
            message.finish_reason = _FINISH_REASONS[self._finish_reason]
            message.usage.CopyFrom(_usage(self._usage))
            message.request_id = self.request_id
        return message


def _logprobs(logprobs: _Logprobs, top: int) -> Iterator[TokenLogprobs]:
    for logprob, found in zip(logprobs.token_logprobs, logprobs.top_logprobs, strict=True):
        # They come in no order, and the generated token is always one of them.
        names = nlargest(top, found, key=found.__getitem__)
        alternatives = [
            TokenLogprob(token_id=int(name.removeprefix(_TOKEN)), logprob=found[name])
            for name in names
        ]
        yield TokenLogprobs(logprob=logprob, top=alternatives)


def _usage(usage: _Usage) -> Usage:
    details = usage.prompt_tokens_details
    return Usage(
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        cached_tokens=details.cached_tokens if details is not None else 0,
    )
