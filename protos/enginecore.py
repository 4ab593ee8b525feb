"""Reader and writer of vLLM's engine-core messages, without importing vLLM.

vLLM's API servers (fronts) and its EngineCore exchange msgpack over ZMQ; the structs are
positional arrays (`vllm/v1/engine/__init__.py`, vLLM 0.32). Fields that Baton only passes on stay
`msgspec.Raw`, byte for byte. `tests/contract/test_enginecore.py` holds every field against vLLM.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, cast

import msgspec
from msgspec import Raw, Struct

from protos.errors import ProtocolError

ENGINE_TAG: Final = "vllm-0.32"
"""Names this layout on the links that carry it as opaque bytes."""

ADD: Final = b"\x00"
ABORT: Final = b"\x01"
UTILITY: Final = b"\x03"
"""First frame of a message from a front to an engine."""

FINISH_STOP: Final = 0
FINISH_LENGTH: Final = 1
FINISH_ABORT: Final = 2
FINISH_ERROR: Final = 3
FINISH_REPETITION: Final = 4

DEFAULT_MAX_TOKENS: Final = 16
"""Of output: vLLM's default, which an encoded request leaves out."""

NIL: Final = Raw(b"\xc0")
"""What passes through and is not there."""


class EngineRequest(Struct, array_like=True, omit_defaults=True, gc=False):
    """`EngineCoreRequest`: what a front asks of an engine."""

    request_id: str
    prompt_token_ids: list[int] | None
    mm_features: Any
    sampling_params: dict[str, Any] | None
    pooling_params: Any
    arrival_time: float
    lora_request: Any
    cache_salt: str | None
    data_parallel_rank: int | None
    prompt_embeds: Any = None
    prompt_is_token_ids: Any = None
    client_index: int = 0
    current_wave: int = 0
    priority: int = 0
    trace_headers: dict[str, str] | None = None
    resumable: bool = False
    external_req_id: str | None = None
    reasoning_ended: bool | None = None
    reasoning_parser_kwargs: dict[str, Any] | None = None
    abort_immediately: bool = False
    session_id: str | None = None
    kv_hints: Any = None


class EngineRequestHead(Struct, array_like=True, gc=False):
    """The first field of an `EngineRequest`, for those who only relay it."""

    request_id: str


class PrefillStats(Struct, omit_defaults=True, gc=False):
    """`PrefillStats`: how an engine came by a prompt's KV state, in tokens."""

    num_prompt_tokens: int = 0
    num_computed_tokens: int = 0
    num_cached_tokens: int = 0
    num_local_cached_tokens: int = 0
    num_external_cached_tokens: int = 0
    num_cache_creation_tokens: int = 0


class EngineOutput(Struct, array_like=True, omit_defaults=True, gc=False):
    """`EngineCoreOutput`: what one step of an engine adds to one request."""

    request_id: str
    new_token_ids: list[int]
    new_logprobs: Raw = NIL
    new_prompt_logprobs_tensors: Raw = NIL
    pooling_output: Raw = NIL
    finish_reason: int | None = None
    stop_reason: int | str | None = None
    events: Raw = NIL
    kv_transfer_params: dict[str, Any] | None = None
    ec_transfer_params: dict[str, Any] | None = None
    trace_headers: dict[str, str] | None = None
    prefill_stats: PrefillStats | None = None
    routed_experts: Raw = NIL
    num_nans_in_logits: int = 0
    mm_cache_miss_hashes: list[str] | None = None
    new_sampling_mask: Raw = NIL
    spec_decode_metrics: Raw = NIL
    prompt_token_id_logprobs: Raw = NIL


_RAW_FIELDS: Final = tuple(
    name for name in EngineOutput.__struct_fields__ if getattr(EngineOutput("", []), name) is NIL
)


def detach(output: EngineOutput) -> None:
    """Let it stand without the message that it was decoded from, which its parts are views of.

    What is not there is then `NIL` itself.
    """
    for name in _RAW_FIELDS:
        value = getattr(output, name)
        if value is not NIL:
            setattr(output, name, NIL if value == NIL else value.copy())


class UtilityOutput(Struct, array_like=True, gc=False):
    """The answer to a utility call; a failure message stands for a failed call."""

    call_id: int
    failure_message: str | None = None
    result: Any = None


class EngineOutputs(Struct, array_like=True, omit_defaults=True, gc=False):
    """`EngineCoreOutputs`: one message of an engine to a front."""

    engine_index: int = 0
    outputs: list[EngineOutput] = []
    scheduler_stats: dict[str, Any] | None = None
    timestamp: float = 0.0
    utility_output: UtilityOutput | None = None
    finished_requests: list[str] | None = None
    wave_complete: int | None = None
    start_wave: int | None = None
    weight_version: str | None = None


class _RelayedOutputs(Struct, array_like=True, omit_defaults=True, gc=False):
    """`EngineOutputs` whose outputs are encoded already."""

    engine_index: int
    outputs: list[Raw]
    scheduler_stats: None = None
    timestamp: float = 0.0
    utility_output: UtilityOutput | None = None


class ReadyResponse(Struct):
    """`EngineCoreReadyResponse`: an engine's first message to a front (a map)."""

    max_model_len: int
    num_gpu_blocks: int
    block_size: int
    dp_stats_address: str | None
    dtype: str
    vllm_version: str
    world_size: int
    data_parallel_size: int
    tensor_parallel_size: int
    pipeline_parallel_size: int
    decode_context_parallel_size: int
    data_parallel_rank: int
    max_num_seqs: int
    max_num_batched_tokens: int
    instance_id: str
    supports_lora: bool
    max_loras: int
    mamba_block_size: int | None = None
    kv_cache_size_tokens: int | None = None
    kv_cache_max_concurrency: float | None = None
    kv_events_config: Any = None
    weight_transfer_backend: str | None = None
    enable_sleep_mode: bool = False
    supports_draft_weight_updates: bool = False
    effective_attention_block_size: int | None = None


class UtilityCall(Struct, array_like=True, gc=False):
    """A front's call of an engine's method by name."""

    client_index: int
    call_id: int
    method: str
    args: Any


_encoder = msgspec.msgpack.Encoder()
_request_decoder = msgspec.msgpack.Decoder(EngineRequest)
_head_decoder = msgspec.msgpack.Decoder(EngineRequestHead)
_outputs_decoder = msgspec.msgpack.Decoder(EngineOutputs)
_output_decoder = msgspec.msgpack.Decoder(EngineOutput)
_ready_decoder = msgspec.msgpack.Decoder(ReadyResponse)
_utility_decoder = msgspec.msgpack.Decoder(UtilityCall)
_ids_decoder = msgspec.msgpack.Decoder(list[str])


def encode(message: Struct | list[str]) -> bytes:
    """Any message of this module, or an abort's list of request ids, as msgpack."""
    return _encoder.encode(message)


def only_frame(frames: Sequence[bytes]) -> bytes:
    """The one frame of a message that must not refer to others. Raises ProtocolError.

    vLLM moves large arrays into frames of their own, to which numbers in the first frame refer;
    such a message can't be cut up and merged. VLLM_MSGPACK_ZERO_COPY_THRESHOLD keeps it whole.
    """
    if len(frames) != 1:
        raise ProtocolError(
            f"an engine-core message of {len(frames)} frames; raise "
            "VLLM_MSGPACK_ZERO_COPY_THRESHOLD so that it is one"
        )
    return frames[0]


def decode_request(payload: bytes | memoryview) -> EngineRequest:
    """The payload frame of an ADD. Raises msgspec.DecodeError for anything else."""
    return _request_decoder.decode(payload)


def decode_request_id(payload: bytes | memoryview) -> str:
    """The request id of an ADD's payload, without reading the rest."""
    return _head_decoder.decode(payload).request_id


def decode_ids(payload: bytes | memoryview) -> list[str]:
    """The payload frame of an ABORT."""
    return _ids_decoder.decode(payload)


def decode_utility(payload: bytes | memoryview) -> UtilityCall:
    """The payload frame of a UTILITY."""
    return _utility_decoder.decode(payload)


def decode_outputs(payload: bytes | memoryview) -> EngineOutputs:
    """One message of an engine (a single frame: see `VLLM_MSGPACK_ZERO_COPY_THRESHOLD`)."""
    return _outputs_decoder.decode(payload)


def decode_output(payload: bytes | memoryview) -> EngineOutput:
    """One request's part of an engine's message, as workers send it."""
    return _output_decoder.decode(payload)


def decode_ready(payload: bytes | memoryview) -> ReadyResponse:
    """An engine's first message."""
    return _ready_decoder.decode(payload)


def relay_outputs(payloads: Sequence[bytes], timestamp_s: float) -> bytes:
    """One engine's message from outputs that are encoded already.

    `timestamp_s` is the monotonic clock's, as vLLM's own engines stamp it.
    """
    raws = [Raw(payload) for payload in payloads]
    return _encoder.encode(_RelayedOutputs(0, raws, None, timestamp_s))


def utility_reply(call_id: int, result: Any, failure_message: str | None = None) -> bytes:
    """The message that answers a utility call.

    vLLM wraps a result as `[type information, value]`; plain values carry no type information.
    """
    wrapped = None if failure_message is not None else [None, result]
    answer = UtilityOutput(call_id, failure_message, wrapped)
    return _encoder.encode(_RelayedOutputs(0, [], None, 0.0, answer))


def error_output(request_id: str) -> bytes:
    """An output that ends a request with an error, which a front tells its client."""
    return _encoder.encode(EngineOutput(request_id, [], finish_reason=FINISH_ERROR))


# What Baton tells its own scheduler and connector travels in the sampling parameters' extra
# arguments: the one field of a request that vLLM carries to both without looking at it.

_KV_TRANSFER: Final = "kv_transfer_params"
_RESUME: Final = "baton_output_token_ids"


def strip_internal_arguments(request: EngineRequest) -> list[str]:
    """Remove what a client must never set; returns the names of what was removed.

    Wrong transfer parameters end an engine, and right ones read another request's KV state.
    """
    params = request.sampling_params
    extra = params.get("extra_args") if params else None
    if not params or not extra:
        return []
    internal = [name for name in extra if _is_internal(name)]
    if internal:
        kept = {name: value for name, value in extra.items() if name not in internal}
        params["extra_args"] = kept or None
    return internal


def _is_internal(name: str) -> bool:
    return name in (_KV_TRANSFER, "ec_transfer_params", "kv_hints") or name.startswith("baton_")


def hand_off_after_first_token(request: EngineRequest) -> None:
    """Make the engine stop after one token and keep the prompt's blocks to be fetched."""
    params = _sampling(request)
    params["max_tokens"] = 1
    # One token is all it makes, so more than one can't be asked for; one already masks the ends.
    if params.get("min_tokens", 0) > 1:
        params["min_tokens"] = 1
    _set_extra(request, _KV_TRANSFER, {"do_remote_decode": True, "do_remote_prefill": False})


def resume_from(request: EngineRequest, output_token_ids: list[int], manifest: bytes) -> None:
    """Make the engine continue after `output_token_ids`, fetching what `manifest` names."""
    if output_token_ids:
        _set_extra(request, _RESUME, output_token_ids)
    if manifest:
        _set_extra(request, _KV_TRANSFER, msgspec.msgpack.decode(manifest))


def resumed_output_token_ids(extra_args: dict[str, Any] | None) -> list[int]:
    """What `resume_from` asked to be injected; for the engine's side of the process boundary."""
    return cast("list[int]", (extra_args or {}).get(_RESUME, []))


def encode_manifest(kv_transfer_params: dict[str, Any]) -> bytes:
    """An engine's answer to a hand-off, opaque to all but engines."""
    return msgspec.msgpack.encode(kv_transfer_params)


def _sampling(request: EngineRequest) -> dict[str, Any]:
    if request.sampling_params is None:
        raise ValueError("the request has no sampling parameters; only generation is served")
    return request.sampling_params


def _set_extra(request: EngineRequest, name: str, value: Any) -> None:
    params = _sampling(request)
    params["extra_args"] = {**(params.get("extra_args") or {}), name: value}
