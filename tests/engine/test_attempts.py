"""What a worker keeps, fences and sends again."""

from __future__ import annotations

import tracemalloc
from itertools import islice
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.attempts import Attempts
from engine.outputs import Output
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
    attempt = attempts.record(
        EngineOutput(
            request.request_id,
            [7],
            finish_reason=enginecore.FINISH_LENGTH,
            kv_transfer_params={"remote_block_ids": [[1]]},
            prefill_stats=PrefillStats(10, 10),
        )
    )
    assert attempt is not None
    assert attempt.ended
    (message,) = attempt.take_unsent()
    assert message.finish == worker_pb2.NOT_FINISHED
    assert message.manifest == enginecore.encode_manifest({"remote_block_ids": [[1]]})
    assert message.prompt_use is not None
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
    assert recorded.outputs[0].finish == worker_pb2.LENGTH


def test_a_stop_at_the_first_token_of_a_hand_off_ends_the_request() -> None:
    attempts = Attempts(MAX_MODEL_LEN_TOKENS)
    request, _ = attempts.submit("r", submit(hand_off=True))
    assert request is not None
    recorded = attempts.record(
        EngineOutput(request.request_id, [7], finish_reason=enginecore.FINISH_STOP, stop_reason=7)
    )
    assert recorded is not None
    (message,) = recorded.outputs
    assert (message.finish, message.manifest) == (worker_pb2.STOP, b"")


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
    (message,) = recorded.outputs
    assert message.first_position == 2
    assert enginecore.decode_output(message.payload).prefill_stats is None


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


TURNS = st.lists(
    st.one_of(
        st.tuples(st.just("step"), st.integers(1, 3)),
        st.tuples(st.just("read"), st.integers(1, 5)),
        st.tuples(st.just("lose"), st.integers(0, 5)),
        st.tuples(st.just("ask"), st.just(0)),
    ),
    max_size=40,
)


@given(TURNS)
def test_whoever_attaches_can_always_get_every_token_once_in_order(
    turns: list[tuple[str, int]],
) -> None:
    """A router that reads as it likes, breaks off anywhere, with outputs sent that it never got,
    and asks from what it has, ends with the whole output."""
    attempts = Attempts(MAX_MODEL_LEN_TOKENS)
    request, _ = attempts.submit("r", submit(1))
    assert request is not None
    attempt = attempts.find("r", "0:a", 1)
    assert attempt is not None
    got: list[int] = []
    made, held_back = 0, False
    for turn, count in [*turns, ("step", 1), ("lose", 0), ("ask", 0), ("read", 1000)]:
        if turn == "step":
            tokens = list(range(made, made + count))
            assert attempts.record(EngineOutput(request.request_id, tokens)) is attempt
            made += count
            assert attempt.has_unsent is not held_back
        elif turn == "lose":
            list(islice(attempt.take_unsent(), count))
            (held,) = attempts.hold_back("r")
            assert held.next_position == made
            held_back = True
        elif turn == "ask":
            attempts.resend(attempt, len(got))
            held_back = False
        else:
            for output in islice(attempt.take_unsent(), count):
                got += list(output.token_ids)[len(got) - output.first_position :]
    assert got == list(range(made))
    assert not attempt.has_unsent


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


def made_of(attempts: Attempts, *made: EngineOutput) -> list[Output]:
    """What goes out at once of all that was recorded."""
    request, _ = attempts.submit("r", submit(1))
    assert request is not None
    for output in made:
        output.request_id = request.request_id
        attempt = attempts.record(output)
    assert attempt is not None
    return list(attempt.take_unsent())


def test_tokens_that_wait_together_go_out_as_one_output() -> None:
    attempts = Attempts(MAX_MODEL_LEN_TOKENS)
    (output,) = made_of(
        attempts,
        EngineOutput("", [5]),
        EngineOutput("", [6, 7]),
        EngineOutput("", [8], finish_reason=enginecore.FINISH_STOP, stop_reason=8),
    )
    assert (output.first_position, output.token_ids) == (0, [5, 6, 7, 8])
    assert output.finish == worker_pb2.STOP
    front = enginecore.decode_output(output.payload)
    assert (front.request_id, front.new_token_ids) == ("a", [5, 6, 7, 8])
    assert (front.finish_reason, front.stop_reason) == (enginecore.FINISH_STOP, 8)


def test_the_first_outputs_prompt_figures_survive_a_merge() -> None:
    attempts = Attempts(MAX_MODEL_LEN_TOKENS)
    (output,) = made_of(
        attempts,
        EngineOutput("", [5], prefill_stats=PrefillStats(10, 10)),
        EngineOutput("", [6]),
    )
    assert output.prompt_use is not None
    assert output.prompt_use.prompt_tokens == 10
    stats = enginecore.decode_output(output.payload).prefill_stats
    assert stats is not None
    assert stats.num_prompt_tokens == 10


def test_outputs_with_logprobs_go_out_one_by_one() -> None:
    attempts = Attempts(MAX_MODEL_LEN_TOKENS)
    logprobs = msgspec.Raw(msgspec.msgpack.encode([1, 2]))
    outputs = made_of(
        attempts,
        EngineOutput("", [5]),
        EngineOutput("", [6], new_logprobs=logprobs),
        EngineOutput("", [7], new_logprobs=logprobs),
        EngineOutput("", [8]),
        EngineOutput("", [9]),
    )
    assert [output.token_ids for output in outputs] == [[5], [6], [7], [8, 9]]


def test_what_was_sent_merged_is_sent_again_from_any_position() -> None:
    attempts = Attempts(MAX_MODEL_LEN_TOKENS)
    made_of(attempts, *(EngineOutput("", [token]) for token in range(6)))
    attempt = attempts.find("r", "0:a", 1)
    assert attempt is not None
    attempts.hold_back("r")
    attempts.resend(attempt, 3)
    (again,) = attempt.take_unsent()
    assert (again.first_position, again.token_ids) == (3, [3, 4, 5])


def test_what_is_kept_of_one_stream_keeps_nothing_of_its_neighbours() -> None:
    """Parts of a decoded message are views of all of it."""
    steps, neighbour_bytes = 100, 100_000
    attempts = Attempts(10_000)
    request, _ = attempts.submit("r", submit(1, logprobs=1))
    assert request is not None
    logprobs = msgspec.Raw(msgspec.msgpack.encode(bytes(10)))
    own = EngineOutput(request.request_id, [1], new_logprobs=logprobs)
    much = msgspec.Raw(msgspec.msgpack.encode(bytes(neighbour_bytes)))
    neighbour = EngineOutput("b", [1], new_logprobs=much)
    step = enginecore.encode(enginecore.EngineOutputs(outputs=[own, neighbour]))
    tracemalloc.start()
    for _ in range(steps):
        for output in enginecore.decode_outputs(bytes(bytearray(step))).outputs:
            attempts.record(output)
    kept_bytes, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert kept_bytes < steps * neighbour_bytes / 10
    kept = next(iter(attempts.of_router("r"))).outputs
    assert len(kept) == steps
    assert all(output.made is not None and output.made.new_logprobs == logprobs for output in kept)


def test_a_grammar_that_does_not_compile_is_its_clients_fault() -> None:
    attempts = Attempts(MAX_MODEL_LEN_TOKENS)
    guided, _ = attempts.submit("r", submit(1, structured_outputs={"json": "{}"}))
    free, _ = attempts.submit("r", submit(1, key="0:b"))
    assert guided is not None
    assert free is not None
    for request, finish in ((guided, worker_pb2.REFUSED), (free, worker_pb2.ERROR)):
        failed = EngineOutput(request.request_id, [], finish_reason=enginecore.FINISH_ERROR)
        attempt = attempts.record(failed)
        assert attempt is not None
        (output,) = attempt.outputs
        assert output.finish == finish
        assert output.error
    others = attempts.work.others("another router")
    assert others is None or others.computed_tokens == 0


def test_a_guided_request_that_fails_later_is_not() -> None:
    attempts = Attempts(MAX_MODEL_LEN_TOKENS)
    guided, _ = attempts.submit("r", submit(1, structured_outputs={"json": "{}"}))
    assert guided is not None
    attempts.record(EngineOutput(guided.request_id, [7]))
    attempt = attempts.record(
        EngineOutput(guided.request_id, [], finish_reason=enginecore.FINISH_ERROR)
    )
    assert attempt is not None
    assert attempt.outputs[-1].finish == worker_pb2.ERROR
