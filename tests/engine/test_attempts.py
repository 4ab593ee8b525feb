"""What a worker keeps, fences and sends again."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.attempts import Attempts
from protos import enginecore, worker_pb2
from protos.enginecore import EngineOutput, EngineRequest, PrefillStats

MAX_MODEL_LEN_TOKENS = 100


def submit(
    attempt: int = 1,
    *,
    key: str = "0:a",
    prompt_tokens: int = 10,
    output_token_ids: list[int] | None = None,
    hand_off: bool = False,
    manifest: bytes = b"",
    **sampling: Any,
) -> worker_pb2.Submit:
    request = EngineRequest(
        "a",
        list(range(prompt_tokens)),
        None,
        {"max_tokens": 8, **sampling},
        None,
        1.0,
        None,
        None,
        3,
    )
    return worker_pb2.Submit(
        request_key=key,
        attempt=attempt,
        engine_tag=enginecore.ENGINE_TAG,
        engine_request=enginecore.encode(request),
        output_token_ids=output_token_ids or [],
        manifest=manifest,
        hand_off=hand_off,
    )


def test_a_later_attempt_fences_an_earlier_one_and_a_repeated_one_adds_nothing() -> None:
    attempts = Attempts(MAX_MODEL_LEN_TOKENS)
    first, aborted = attempts.submit("r", submit(1))
    assert first is not None
    assert aborted == []
    assert attempts.submit("r", submit(1)) == (None, [])
    second, aborted = attempts.submit("r", submit(2))
    assert second is not None
    assert aborted == [first.request_id]
    assert attempts.submit("r", submit(1)) == (None, [])


def test_a_handed_off_output_goes_on_for_the_front_and_carries_the_manifest() -> None:
    attempts = Attempts(MAX_MODEL_LEN_TOKENS)
    request, _ = attempts.submit("r", submit(hand_off=True, min_tokens=5))
    assert request is not None
    assert request.sampling_params is not None
    assert (request.sampling_params["max_tokens"], request.sampling_params["min_tokens"]) == (1, 1)
    recorded = attempts.record(
        EngineOutput(
            request.request_id,
            [7],
            finish_reason=enginecore.FINISH_LENGTH,
            kv_transfer_params={"remote_block_ids": [[1]]},
            prefill_stats=PrefillStats(10, 10),
        )
    )
    assert recorded is not None
    attempt, message = recorded
    assert attempt.ended
    assert message.finish == worker_pb2.NOT_FINISHED
    assert message.manifest == enginecore.encode_manifest({"remote_block_ids": [[1]]})
    assert message.prompt_use.computed_tokens == 10
    front = enginecore.decode_output(message.payload)
    assert (front.request_id, front.finish_reason, front.kv_transfer_params) == ("a", None, None)


@pytest.mark.parametrize(("prompt_tokens", "sampling"), [(10, {"max_tokens": 1}), (99, {})])
def test_a_request_that_ends_with_its_first_token_is_not_handed_off(
    prompt_tokens: int, sampling: dict[str, Any]
) -> None:
    attempts = Attempts(MAX_MODEL_LEN_TOKENS)
    request, _ = attempts.submit(
        "r", submit(hand_off=True, prompt_tokens=prompt_tokens, **sampling)
    )
    assert request is not None
    assert request.sampling_params is not None
    assert "extra_args" not in request.sampling_params
    recorded = attempts.record(
        EngineOutput(request.request_id, [7], finish_reason=enginecore.FINISH_LENGTH)
    )
    assert recorded is not None
    assert recorded[1].finish == worker_pb2.LENGTH


def test_a_stop_at_the_first_token_of_a_hand_off_ends_the_request() -> None:
    attempts = Attempts(MAX_MODEL_LEN_TOKENS)
    request, _ = attempts.submit("r", submit(hand_off=True))
    assert request is not None
    recorded = attempts.record(
        EngineOutput(request.request_id, [7], finish_reason=enginecore.FINISH_STOP, stop_reason=7)
    )
    assert recorded is not None
    assert (recorded[1].finish, recorded[1].manifest) == (worker_pb2.STOP, b"")


def test_resumed_output_starts_where_it_was_left_and_repeats_no_prompt_figures() -> None:
    attempts = Attempts(MAX_MODEL_LEN_TOKENS)
    manifest = enginecore.encode_manifest({"do_remote_prefill": True})
    request, _ = attempts.submit("r", submit(2, output_token_ids=[5, 6], manifest=manifest))
    assert request is not None
    assert request.sampling_params is not None
    extra = request.sampling_params["extra_args"]
    assert enginecore.resumed_output_token_ids(extra) == [5, 6]
    assert extra["kv_transfer_params"] == {"do_remote_prefill": True}
    recorded = attempts.record(
        EngineOutput(request.request_id, [7], prefill_stats=PrefillStats(10, 0))
    )
    assert recorded is not None
    assert recorded[1].first_position == 2
    assert enginecore.decode_output(recorded[1].payload).prefill_stats is None


def test_an_aborted_attempt_is_held_as_such_until_it_is_forgotten() -> None:
    attempts = Attempts(MAX_MODEL_LEN_TOKENS)
    request, _ = attempts.submit("r", submit(1))
    assert request is not None
    assert attempts.abort("r", "0:a", 1) == request.request_id
    (held,) = attempts.hold_back("r")
    assert (held.ended, held.aborted) == (True, True)
    assert attempts.forget("r", "0:a", 1) is None
    assert attempts.abort("r", "0:a", 1) is None


def test_forgetting_what_has_not_ended_names_what_to_abort() -> None:
    attempts = Attempts(MAX_MODEL_LEN_TOKENS)
    request, _ = attempts.submit("r", submit(1))
    assert request is not None
    assert attempts.forget("r", "0:a", 1) == request.request_id
    assert attempts.forget("r", "0:a", 1) is None
    assert attempts.record(EngineOutput(request.request_id, [1])) is None
    assert len(attempts) == 0


@pytest.mark.parametrize("prompt_tokens", [0, MAX_MODEL_LEN_TOKENS, 5000])
def test_a_prompt_that_does_not_fit_never_reaches_the_engine(prompt_tokens: int) -> None:
    attempts = Attempts(MAX_MODEL_LEN_TOKENS)
    with pytest.raises(ValueError, match="context of 100 tokens"):
        attempts.submit("r", submit(1, prompt_tokens=prompt_tokens))
    assert len(attempts) == 0


def test_a_request_that_cannot_be_read_raises_and_leaves_nothing() -> None:
    attempts = Attempts(MAX_MODEL_LEN_TOKENS)
    broken = submit(1)
    broken.engine_request = b"\x93nonsense"
    with pytest.raises(msgspec.DecodeError):
        attempts.submit("r", broken)
    assert len(attempts) == 0


@given(
    steps=st.lists(st.integers(1, 3), min_size=1, max_size=12),
    breaks=st.lists(st.integers(0, 12), max_size=4),
)
def test_whoever_attaches_can_always_get_every_token_once_in_order(
    steps: list[int], breaks: list[int]
) -> None:
    """A router that breaks off anywhere and asks from what it has ends with the whole output."""
    attempts = Attempts(MAX_MODEL_LEN_TOKENS)
    request, _ = attempts.submit("r", submit(1))
    assert request is not None
    got: list[int] = []
    token = 0
    for index, size in enumerate(steps):
        tokens = list(range(token, token + size))
        token += size
        recorded = attempts.record(EngineOutput(request.request_id, tokens))
        assert recorded is not None
        attempt, message = recorded
        if attempt.live:
            got += message.token_ids
        if index in breaks:
            (held,) = attempts.hold_back("r")
            assert held.next_position == token
        elif not attempt.live:
            for output in attempts.resend(attempt, len(got)):
                got += list(output.token_ids)[len(got) - output.first_position :]
    found = attempts.find("r", "0:a", 1)
    assert found is not None
    for output in attempts.resend(found, len(got)):
        got += list(output.token_ids)[len(got) - output.first_position :]
    assert got == list(range(token))


def test_token_ids_that_the_model_does_not_have_are_refused() -> None:
    attempts = Attempts(MAX_MODEL_LEN_TOKENS, vocabulary_tokens=10)
    assert attempts.submit("r", submit(1, prompt_tokens=10))[0] is not None
    with pytest.raises(ValueError, match="token id 10 is not among the model's 10 tokens"):
        attempts.submit("r", submit(1, key="0:b", prompt_tokens=11))
    with pytest.raises(ValueError, match="token id 12 is not among the model's 10 tokens"):
        attempts.submit("r", submit(1, key="0:c", prompt_tokens=5, allowed_token_ids=[3, 12]))


@pytest.mark.parametrize(
    "sampling",
    [
        {"structured_outputs": {"json": 5}},
        {"structured_outputs": {"json": []}},
        {"structured_outputs": {"json": True}},
        {"structured_outputs": {}},
        {"structured_outputs": {"regex": "a", "json_object": True}},
        {"min_tokens": None},
        {"temperature": "hot"},
        {"bad_words": 3},
    ],
)
def test_sampling_parameters_that_would_end_the_engine_are_refused(
    sampling: dict[str, Any],
) -> None:
    """vLLM decodes requests outside of any `try`: its input thread would die of these."""
    attempts = Attempts(MAX_MODEL_LEN_TOKENS)
    with pytest.raises(ValueError, match="sampling parameters are wrong"):
        attempts.submit("r", submit(1, hand_off=True, **sampling))
    assert len(attempts) == 0
