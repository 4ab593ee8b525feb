"""Our reader and writer of engine-core messages against vLLM's own structs and (de)serialiser."""

from __future__ import annotations

import dataclasses
from typing import Any

import msgspec
import numpy as np
import pytest
from vllm.sampling_params import RequestOutputKind, SamplingParams, StructuredOutputsParams
from vllm.v1 import engine as vllm_engine
from vllm.v1.engine.utils import EngineHandshakeMetadata, EngineZmqAddresses
from vllm.v1.metrics.stats import PrefillStats, SchedulerStats
from vllm.v1.outputs import LogprobsLists
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder, UtilityResult

from protos import enginecore, sampling
from protos.errors import ProtocolError

ONE_FRAME = 1_000_000_000


def encode_as_vllm(message: Any, threshold_bytes: int = ONE_FRAME) -> list[bytes]:
    return [bytes(frame) for frame in MsgpackEncoder(threshold_bytes).encode(message)]


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (enginecore.EngineRequest, vllm_engine.EngineCoreRequest),
        (enginecore.EngineOutput, vllm_engine.EngineCoreOutput),
        (enginecore.EngineOutputs, vllm_engine.EngineCoreOutputs),
        (enginecore.UtilityOutput, vllm_engine.UtilityOutput),
    ],
)
def test_positional_structs_have_the_same_fields_in_the_same_order(ours: Any, theirs: Any) -> None:
    assert ours.__struct_fields__ == theirs.__struct_fields__
    assert ours.__struct_config__.array_like
    assert theirs.__struct_config__.array_like
    required = [field.name for field in msgspec.structs.fields(theirs) if field.required]
    assert [field.name for field in msgspec.structs.fields(ours) if field.required] == required


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (enginecore.ReadyResponse, vllm_engine.EngineCoreReadyResponse),
        (enginecore.PrefillStats, PrefillStats),
    ],
)
def test_maps_have_the_same_names(ours: Any, theirs: Any) -> None:
    names = {field.name for field in dataclasses.fields(theirs)}
    assert set(ours.__struct_fields__) == names


def test_message_types_and_finish_reasons_have_vllms_values() -> None:
    kinds = vllm_engine.EngineCoreRequestType
    assert kinds.ADD.value == enginecore.ADD
    assert kinds.ABORT.value == enginecore.ABORT
    assert kinds.UTILITY.value == enginecore.UTILITY
    reasons = vllm_engine.FinishReason
    assert enginecore.FINISH_STOP == reasons.STOP
    assert enginecore.FINISH_LENGTH == reasons.LENGTH
    assert enginecore.FINISH_ABORT == reasons.ABORT
    assert enginecore.FINISH_ERROR == reasons.ERROR
    assert enginecore.FINISH_REPETITION == reasons.REPETITION


def full_request() -> vllm_engine.EngineCoreRequest:
    params = SamplingParams(
        temperature=0.7,
        top_p=0.9,
        top_k=5,
        min_p=0.1,
        seed=3,
        stop=["a", "b"],
        stop_token_ids=[7],
        max_tokens=9,
        min_tokens=2,
        logprobs=4,
        presence_penalty=0.1,
        frequency_penalty=0.2,
        repetition_penalty=1.3,
        logit_bias={5: 1.5},
        bad_words=["no"],
        output_kind=RequestOutputKind.DELTA,
        structured_outputs=StructuredOutputsParams(json='{"type": "object"}'),
        extra_args={"mine": 1},
    )
    return vllm_engine.EngineCoreRequest(
        request_id="cmpl-1",
        prompt_token_ids=[1, 2, 3],
        mm_features=None,
        sampling_params=params,
        pooling_params=None,
        arrival_time=1.5,
        lora_request=None,
        cache_salt="salt",
        data_parallel_rank=2,
        client_index=1,
        current_wave=4,
        priority=-3,
        trace_headers={"traceparent": "x"},
        resumable=True,
        external_req_id="cmpl",
        reasoning_ended=True,
        reasoning_parser_kwargs={"a": 1},
        abort_immediately=True,
        session_id="s",
    )


def test_a_request_with_every_field_survives_reading_and_writing() -> None:
    theirs = full_request()
    (frame,) = encode_as_vllm(theirs)
    assert enginecore.decode_request_id(frame) == "cmpl-1"
    ours = enginecore.decode_request(frame)
    for name in ours.__struct_fields__:
        if name != "sampling_params":
            assert getattr(ours, name) == getattr(theirs, name), name
    again = MsgpackDecoder(vllm_engine.EngineCoreRequest).decode(enginecore.encode(ours))
    assert again == theirs


def test_what_we_add_for_our_own_engines_is_what_vllm_reads() -> None:
    ours = enginecore.decode_request(encode_as_vllm(full_request())[0])
    enginecore.hand_off_after_first_token(ours)
    handed = MsgpackDecoder(vllm_engine.EngineCoreRequest).decode(enginecore.encode(ours))
    assert handed.sampling_params.max_tokens == 1
    assert handed.sampling_params.min_tokens == 1
    assert handed.sampling_params.extra_args["mine"] == 1
    assert handed.sampling_params.extra_args["kv_transfer_params"]["do_remote_decode"] is True

    ours = enginecore.decode_request(encode_as_vllm(full_request())[0])
    manifest = enginecore.encode_manifest({"do_remote_prefill": True, "remote_block_ids": [[1]]})
    enginecore.resume_from(ours, [11, 12], manifest)
    resumed = MsgpackDecoder(vllm_engine.EngineCoreRequest).decode(enginecore.encode(ours))
    extra = resumed.sampling_params.extra_args
    assert enginecore.resumed_output_token_ids(extra) == [11, 12]
    assert extra["kv_transfer_params"] == {"do_remote_prefill": True, "remote_block_ids": [[1]]}


def test_a_clients_internal_arguments_are_removed() -> None:
    ours = enginecore.decode_request(encode_as_vllm(full_request())[0])
    assert ours.sampling_params is not None
    ours.sampling_params["extra_args"] = {
        "kv_transfer_params": {"do_remote_prefill": True},
        "baton_output_token_ids": [1],
        "mine": 1,
    }
    removed = enginecore.strip_internal_arguments(ours)
    assert sorted(removed) == ["baton_output_token_ids", "kv_transfer_params"]
    assert ours.sampling_params["extra_args"] == {"mine": 1}
    assert enginecore.strip_internal_arguments(ours) == []


def big_logprobs() -> LogprobsLists:
    rows, width = 3, 2000
    return LogprobsLists(
        logprob_token_ids=np.arange(rows * width, dtype=np.int32).reshape(rows, width),
        logprobs=np.linspace(-9, 0, rows * width, dtype=np.float32).reshape(rows, width),
        sampled_token_ranks=np.arange(rows, dtype=np.int32),
        cu_num_generated_tokens=None,
    )


def full_outputs() -> vllm_engine.EngineCoreOutputs:
    outputs = [
        vllm_engine.EngineCoreOutput(
            request_id=f"r{index}",
            new_token_ids=[index, index + 1],
            new_logprobs=big_logprobs(),
            finish_reason=vllm_engine.FinishReason.LENGTH,
            stop_reason="stop",
            events=[vllm_engine.EngineCoreEvent.new_event(vllm_engine.EngineCoreEventType.QUEUED)],
            kv_transfer_params={"remote_block_ids": [[1, 2]]},
            trace_headers={"t": "1"},
            prefill_stats=PrefillStats(10, 4, 6, 2, 4, 1),
            num_nans_in_logits=2,
            mm_cache_miss_hashes=["h"],
        )
        for index in range(2)
    ]
    return vllm_engine.EngineCoreOutputs(
        engine_index=0,
        outputs=outputs,
        scheduler_stats=SchedulerStats(num_running_reqs=3, kv_cache_usage=0.25),
        timestamp=7.0,
        finished_requests={"r0"},
    )


def test_outputs_with_large_logprobs_survive_reading_cutting_and_merging() -> None:
    theirs = full_outputs()
    ours = enginecore.decode_outputs(enginecore.only_frame(encode_as_vllm(theirs)))
    assert ours.scheduler_stats is not None
    assert ours.scheduler_stats["num_running_reqs"] == 3
    assert ours.outputs[0].prefill_stats == enginecore.PrefillStats(10, 4, 6, 2, 4, 1)
    parts = [enginecore.encode(output) for output in ours.outputs]
    assert enginecore.decode_output(parts[1]).request_id == "r1"
    merged = enginecore.relay_outputs(parts, timestamp_s=7.0)
    again = MsgpackDecoder(vllm_engine.EngineCoreOutputs).decode(merged)
    assert again.timestamp == 7.0
    for mine, original in zip(again.outputs, theirs.outputs, strict=True):
        for name in original.__struct_fields__:
            if name != "new_logprobs":
                assert getattr(mine, name) == getattr(original, name), name
        assert np.array_equal(mine.new_logprobs.logprobs, original.new_logprobs.logprobs)
        assert np.array_equal(
            mine.new_logprobs.logprob_token_ids, original.new_logprobs.logprob_token_ids
        )


def test_a_message_of_several_frames_is_refused_not_misread() -> None:
    frames = encode_as_vllm(full_outputs(), threshold_bytes=256)
    assert len(frames) > 1
    with pytest.raises(ProtocolError, match="VLLM_MSGPACK_ZERO_COPY_THRESHOLD"):
        enginecore.only_frame(frames)


def test_utility_calls_and_answers() -> None:
    call = (0, 42, "get_supported_tasks", [])
    ours = enginecore.decode_utility(encode_as_vllm(call)[0])
    assert (ours.client_index, ours.call_id, ours.method, ours.args) == (
        0,
        42,
        "get_supported_tasks",
        [],
    )
    decoder = MsgpackDecoder(vllm_engine.EngineCoreOutputs)
    answer = decoder.decode(enginecore.utility_reply(42, ["generate"])).utility_output
    assert (answer.call_id, answer.failure_message) == (42, None)
    assert isinstance(answer.result, UtilityResult)
    assert answer.result.result == ["generate"]
    failed = decoder.decode(enginecore.utility_reply(43, None, "no such method")).utility_output
    assert (failed.call_id, failed.failure_message, failed.result) == (43, "no such method", None)


def test_aborts_and_errors() -> None:
    assert enginecore.decode_ids(encode_as_vllm(["a", "b"])[0]) == ["a", "b"]
    assert MsgpackDecoder().decode(enginecore.encode(["a", "b"])) == ["a", "b"]
    merged = enginecore.relay_outputs([enginecore.error_output("r")], 0.0)
    (output,) = MsgpackDecoder(vllm_engine.EngineCoreOutputs).decode(merged).outputs
    assert output.request_id == "r"
    assert output.finish_reason == vllm_engine.FinishReason.ERROR


def test_ready_survives() -> None:
    values = {
        field.name: 8 if "int" in str(field.type) else "x"
        for field in dataclasses.fields(vllm_engine.EngineCoreReadyResponse)
        if field.default is dataclasses.MISSING
    }
    theirs = vllm_engine.EngineCoreReadyResponse(**{**values, "supports_lora": False})
    ours = enginecore.decode_ready(msgspec.msgpack.encode(theirs))
    assert msgspec.msgpack.decode(enginecore.encode(ours)) == dataclasses.asdict(theirs)


def test_our_handshake_is_vllms() -> None:
    ours = {"addresses": {"inputs": ["i"], "outputs": ["o"]}, "parallel_config": {}}
    read = msgspec.msgpack.decode(msgspec.msgpack.encode(ours), type=EngineHandshakeMetadata)
    assert read == EngineHandshakeMetadata(EngineZmqAddresses(["i"], ["o"]), {})


def test_the_sampling_parameters_that_are_checked_are_vllms() -> None:
    theirs = {field.encode_name for field in msgspec.structs.fields(SamplingParams)}
    ours = {field.encode_name for field in msgspec.structs.fields(sampling.SamplingParams)}
    assert ours <= theirs
    constraints = {field.name for field in dataclasses.fields(StructuredOutputsParams)}
    checked = {field.encode_name for field in msgspec.structs.fields(sampling.StructuredOutputs)}
    assert checked == constraints
    params = enginecore.decode_request(encode_as_vllm(full_request())[0]).sampling_params
    assert params is not None
    sampling.check(params)
