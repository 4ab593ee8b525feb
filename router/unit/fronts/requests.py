"""What a request of the full front may say, and what Baton writes into it.

Pure. Boundary: only what vLLM's API server would take and Baton can't: everything else about a
body is vLLM's to check.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, NamedTuple

import msgspec

from router.unit.fronts.launch import MOST_COMPLETIONS

RESPONSES_PATH: Final = "/v1/responses"
ANTHROPIC_PATHS: Final = "/v1/messages"
"""Also what lies below."""

_ENGINES_OWN: Final = (
    "kv_transfer_params",
    "ec_transfer_params",
    "kv_hints",
    "data_parallel_rank",
    "priority",
)
"""Fields by which engines and routers talk to each other; a client's could end an engine."""
_OUR_PREFIX: Final = "baton_"

_ANTHROPIC_KINDS: Final = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


class Refusal(NamedTuple):
    """An answer instead of vLLM's."""

    status: int
    message: str
    field: str | None = None


def too_large(max_body_bytes: int) -> Refusal:
    """The answer to a body of more than so many bytes."""
    return Refusal(413, f"The body is larger than {max_body_bytes} bytes.")


def check(path: str, body: bytes, ticket: str | None) -> bytes | Refusal:
    """The body as vLLM is to see it, or why it is refused."""
    try:
        request = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        return Refusal(400, f"The body is not valid JSON: {error}.")
    if not isinstance(request, dict):
        return Refusal(400, "The body must be a JSON object.")
    if (refusal := _refusal(request)) is not None:
        return refusal
    if path == RESPONSES_PATH:
        return _kept_nowhere(request, ticket)
    return body


def _refusal(request: Mapping[str, Any]) -> Refusal | None:
    extra = request.get("vllm_xargs")
    inner = extra if isinstance(extra, dict) else {}
    named = [name for name in _ENGINES_OWN if request.get(name)]
    named += [name for name in inner if name in _ENGINES_OWN or name.startswith(_OUR_PREFIX)]
    if named:
        message = f"{named[0]} is not the client's to set; leave it out."
        return Refusal(400, message, named[0])
    completions = _completions(request)
    if completions > MOST_COMPLETIONS:
        return Refusal(
            400,
            f"{completions} completions in one request are too many; {MOST_COMPLETIONS} prompts "
            "times n are the most.",
        )
    return None


def _completions(request: Mapping[str, Any]) -> int:
    """How many engine requests vLLM would make of it."""
    prompt, n = request.get("prompt"), request.get("n")
    prompts = 1
    if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
        prompts = len(prompt)
    return prompts * (n if isinstance(n, int) else 1)


def _kept_nowhere(request: dict[str, Any], ticket: str | None) -> bytes | Refusal:
    """A Responses request that leaves nothing behind, and whose id is its ticket's."""
    for name in ("store", "background", "previous_response_id", "conversation"):
        if request.get(name):
            return Refusal(
                400,
                f"{name} needs responses to be kept, and none is: send store=false and the whole "
                "conversation in input.",
                name,
            )
    request["store"] = False
    if ticket is not None:
        # vLLM names a response and its engine request by this field, and reads no header for it.
        request["request_id"] = f"resp_{ticket}"
    return msgspec.json.encode(request)


def is_anthropic(path: str) -> bool:
    """Whether clients of this path expect Anthropic's errors instead of OpenAI's."""
    return path == ANTHROPIC_PATHS or path.startswith(f"{ANTHROPIC_PATHS}/")


def error_body(path: str, refusal: Refusal) -> bytes:
    """An error in the form of the path's API."""
    status, message, field = refusal
    general = "invalid_request_error" if status < 500 else "server_error"
    if not is_anthropic(path):
        return msgspec.json.encode(
            {"error": {"message": message, "type": general, "param": field, "code": status}}
        )
    if status >= 500:
        general = "api_error"
    kind = _ANTHROPIC_KINDS.get(status, general)
    return msgspec.json.encode({"type": "error", "error": {"type": kind, "message": message}})


def error_event(path: str, number: int) -> bytes:
    """The last event of a stream that can't go on, its `number`-th from 0, with a name as the
    events of Anthropic's API and of Responses have."""
    failed = Refusal(500, "The request failed; GET /cluster/requests/{its id} tells why.")
    if is_anthropic(path):
        data = error_body(path, failed)
    else:
        error = {"code": "server_error", "message": failed.message, "param": None}
        # At the top as OpenAI documents it, and below `error` as its client looks for it.
        data = msgspec.json.encode(
            {"type": "error", **error, "sequence_number": number, "error": error}
        )
    return b"event: error\ndata: " + data + b"\n\n"


def as_anthropic(path: str, status: int, body: bytes) -> bytes:
    """An error of vLLM's, which has OpenAI's form on all paths, in Anthropic's."""
    try:
        message = msgspec.json.decode(body)["error"]["message"]
    except (msgspec.DecodeError, LookupError, TypeError):
        message = body.decode(errors="replace")
    return error_body(path, Refusal(status, message))
