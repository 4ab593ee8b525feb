"""The core on a virtual clock: what each step plans and tells."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

from engine.base import EngineStep
from engine.latency_model import StepTimes
from engine.simulated.core import SimulatedCore, StepPlan
from engine.simulated.request import (
    FIRST_TOKEN_ID,
    VOCABULARY_TOKENS,
    Manifest,
    SimulatedRequest,
)
from engine.simulated.scheduler import SimulatedLimits
from engine.spec import SimulatedTiming
from protos.enginecore import (
    FINISH_ERROR,
    FINISH_LENGTH,
    FINISH_STOP,
    EngineOutput,
    EngineRequest,
    PrefillStats,
    encode_manifest,
    hand_off_after_first_token,
    resume_from,
)
from protos.errors import ConfigError
from tests.contract.engine_contract import make_request

TIMING = SimulatedTiming(
    step_base_s=1.0, prefill_token_s=0.01, decode_request_s=0.1, transfer_block_s=2.0
)


def make_core(timing: SimulatedTiming = TIMING, **limits: Any) -> SimulatedCore:
    values: dict[str, Any] = {
        "engine_id": "worker-a",
        "block_size_tokens": 4,
        "kv_blocks": 64,
        "max_model_len_tokens": 128,
        "max_running_requests": 8,
        "max_step_tokens": 32,
        "kv_lease_s": 30.0,
    }
    return SimulatedCore(SimulatedLimits(**(values | limits)), StepTimes(timing))


def tokens(count: int, first: int = 100) -> list[int]:
    return list(range(first, first + count))


def step(core: SimulatedCore, now_s: float) -> tuple[StepPlan, EngineStep]:
    plan = core.start_step(now_s)
    assert plan is not None
    done = core.finish_step(now_s + plan.duration_s)
    core.check_integrity()
    return plan, done


def run_until_idle(core: SimulatedCore, now_s: float = 0.0) -> tuple[list[EngineOutput], float]:
    """All outputs, and when nothing was left, not even a lease."""
    outputs: list[EngineOutput] = []
    while True:
        plan = core.start_step(now_s)
        if plan is None:
            wake_s = core.wake_s()
            if wake_s is None:
                return outputs, now_s
            now_s = wake_s
            continue
        now_s += plan.duration_s
        outputs += core.finish_step(now_s).outputs
        core.check_integrity()


def text(outputs: Iterable[EngineOutput], request_id: str) -> list[int]:
    return [
        token
        for output in outputs
        if output.request_id == request_id
        for token in output.new_token_ids
    ]


def generate(request: EngineRequest, **limits: Any) -> tuple[list[int], EngineOutput]:
    """A request's tokens and last output, alone on an engine of its own."""
    core = make_core(**limits)
    core.add(request)
    outputs, _ = run_until_idle(core)
    return text(outputs, request.request_id), outputs[-1]


def test_decodes_go_first_and_prompts_get_the_rest_in_chunks() -> None:
    core = make_core()
    core.add(make_request("a", tokens(8), max_tokens=9))
    assert step(core, 0.0)[0] == StepPlan(8, 0, 1.0 + 8 * 0.01)
    core.add(make_request("b", tokens(40, 300)))
    assert step(core, 2.0)[0] == StepPlan(31, 1, 1.0 + 31 * 0.01 + 0.1)
    plan, done = step(core, 4.0)
    assert (plan.prefill_tokens, plan.decode_requests) == (9, 1)
    assert [output.request_id for output in done.outputs] == ["a", "b"]
    assert (done.load.running, done.load.waiting, done.load.kv_blocks_used) == (2, 0, 13)


def test_no_more_run_than_may_and_lower_priority_values_go_first() -> None:
    core = make_core(max_running_requests=1)
    requests = [
        make_request(name, tokens(4, 100 + 10 * i), max_tokens=1) for i, name in enumerate("abc")
    ]
    requests[2].priority = -1
    for request in requests:
        core.add(request)
    outputs, _ = run_until_idle(core)
    assert [output.request_id for output in outputs] == ["c", "a", "b"]


def test_requests_that_share_a_prefix_share_blocks_even_within_a_step() -> None:
    core = make_core()
    core.add(make_request("a", tokens(9), max_tokens=1))
    core.add(make_request("b", tokens(9), max_tokens=1))
    plan, done = step(core, 0.0)
    assert (plan.prefill_tokens, plan.decode_requests) == (9, 1)
    assert [output.prefill_stats for output in done.outputs] == [
        PrefillStats(9, 9, 0, 0, 0, 8),
        PrefillStats(9, 1, 8, 8, 0, 0),
    ]
    assert done.counters == {
        "vllm:prompt_tokens_total": 18,
        'vllm:prompt_tokens_by_source_total{source="local_compute"}': 10,
        'vllm:prompt_tokens_by_source_total{source="local_cache_hit"}': 8,
        "vllm:generation_tokens_total": 2,
        "vllm:prefix_cache_queries_total": 18,
        "vllm:prefix_cache_hits_total": 8,
        'vllm:request_success_total{finished_reason="length"}': 2,
    }


def test_the_last_block_of_a_cached_prompt_is_computed() -> None:
    core = make_core()
    core.add(make_request("a", tokens(8), max_tokens=1))
    step(core, 0.0)
    core.add(make_request("b", tokens(8), max_tokens=1))
    assert step(core, 2.0)[0].prefill_tokens == 4


def test_salts_keep_caches_apart() -> None:
    core = make_core()
    for salt in ("one", "two"):
        request = make_request(salt, tokens(9), max_tokens=1)
        request.cache_salt = salt
        core.add(request)
    assert step(core, 0.0)[0].prefill_tokens == 18


def test_the_latest_is_preempted_and_its_text_stays_the_same() -> None:
    limits = {"kv_blocks": 6, "max_model_len_tokens": 24}
    requests = [
        make_request(name, tokens(7, first), max_tokens=10)
        for name, first in (("a", 100), ("b", 200))
    ]
    core = make_core(**limits)
    for request in requests:
        core.add(request)
    counters: dict[str, float] = {}
    outputs: list[EngineOutput] = []
    now_s = 0.0
    while plan := core.start_step(now_s):
        now_s += plan.duration_s
        done = core.finish_step(now_s)
        core.check_integrity()
        outputs += done.outputs
        for name, n in done.counters.items():
            counters[name] = counters.get(name, 0) + n
    assert counters["vllm:num_preemptions_total"] == 1
    assert counters["vllm:prompt_tokens_total"] == 14
    assert [output.request_id for output in outputs if output.finish_reason is not None] == [
        "a",
        "b",
    ]
    for request in requests:
        assert text(outputs, request.request_id) == generate(request)[0]


def test_the_preempted_go_before_those_that_came_later() -> None:
    core = make_core(kv_blocks=6, max_model_len_tokens=24)
    for name, first in (("a", 100), ("b", 200), ("c", 300)):
        core.add(make_request(name, tokens(7, first), max_tokens=10))
    core.add(make_request("d", tokens(17, 400), max_tokens=1))
    outputs, _ = run_until_idle(core)
    ends = [output.request_id for output in outputs if output.finish_reason is not None]
    assert ends == ["a", "b", "c", "d"]


def test_lengths_end_by_parameters_or_by_the_context() -> None:
    assert len(generate(make_request("a", tokens(8), max_tokens=None))[0]) == 120
    defaulted = make_request("a", tokens(8))
    assert defaulted.sampling_params is not None
    # As a front encodes vLLM's default of 16.
    del defaulted.sampling_params["max_tokens"]
    assert len(generate(defaulted)[0]) == 16


@pytest.mark.parametrize(
    "request_",
    [
        make_request("a", tokens(128)),
        make_request("a", []),
        make_request("a", [-5]),
        make_request("a", tokens(4), extra_args={"kv_transfer_params": {"do_remote_prefill": 1}}),
    ],
    ids=["too long", "empty", "no token id", "no manifest"],
)
def test_what_cant_be_served_ends_with_an_error(request_: EngineRequest) -> None:
    core = make_core()
    core.add(request_)
    plan, done = step(core, 0.0)
    assert plan == StepPlan(0, 0, 0.0)
    assert [output.finish_reason for output in done.outputs] == [FINISH_ERROR]
    assert core.start_step(1.0) is None


def test_ids_stay_in_the_vocabulary_and_off_the_end_of_sequence() -> None:
    free = generate(make_request("a", tokens(8), max_tokens=100))[0]
    assert all(FIRST_TOKEN_ID <= t < FIRST_TOKEN_ID + VOCABULARY_TOKENS for t in free)
    assert len(set(free)) > 90
    masked = generate(make_request("a", tokens(8), max_tokens=100, _eos_token_id=free[0]))[0]
    assert free[0] not in masked


def test_text_depends_on_prompt_seed_and_output() -> None:
    def run(prompt: list[int], **sampling: Any) -> list[int]:
        return generate(make_request("a", prompt, **sampling))[0]

    plain = run(tokens(8))
    assert run(tokens(8)) == plain
    assert run(tokens(8), seed=1) != plain
    assert run([*tokens(7), 1]) != plain
    # Output that is passed off as prompt is not a resume.
    assert run([*tokens(8), *plain[:4]]) != plain[4:]


def test_a_hand_off_is_fetched_while_others_run() -> None:
    source, target = make_core(), make_core(engine_id="worker-b")
    request = make_request("a", tokens(9))
    whole = generate(request)[0]
    hand_off_after_first_token(request)
    source.add(request)
    [first] = step(source, 0.0)[1].outputs
    assert first.kv_transfer_params is not None
    assert first.kv_transfer_params["remote_num_tokens"] == 9

    resumed = make_request("a2", tokens(9))
    resume_from(resumed, first.new_token_ids, encode_manifest(first.kv_transfer_params))
    target.add(resumed)
    assert target.start_step(0.0) is None
    assert target.wake_s() == 3 * TIMING.transfer_block_s
    target.add(make_request("b", tokens(4, 500), max_tokens=1))
    plan, done = step(target, 1.0)
    assert plan.prefill_tokens == 4
    assert done.load.waiting == 1
    plan, done = step(target, 6.0)
    assert (plan.prefill_tokens, plan.decode_requests) == (0, 1)
    [second] = done.outputs
    assert second.prefill_stats == PrefillStats(9, 0, 9, 0, 9, 0)
    rest, _ = run_until_idle(target, 8.0)
    assert [*first.new_token_ids, *second.new_token_ids, *text(rest, "a2")] == whole


def test_what_is_cached_here_is_not_fetched() -> None:
    core = make_core()
    core.add(make_request("a", tokens(9), max_tokens=1))
    step(core, 0.0)
    request = make_request("b", tokens(9))
    hand_off_after_first_token(request)
    core.add(request)
    [first] = step(core, 2.0)[1].outputs
    assert first.kv_transfer_params is not None
    resumed = make_request("c", tokens(9))
    resume_from(resumed, first.new_token_ids, encode_manifest(first.kv_transfer_params))
    core.add(resumed)
    assert core.start_step(4.0) is None
    assert core.wake_s() == 4.0 + TIMING.transfer_block_s
    [second] = step(core, 6.0)[1].outputs
    assert second.prefill_stats == PrefillStats(9, 0, 9, 8, 1, 0)


def test_a_prefix_is_fetched_and_the_rest_computed() -> None:
    source, target = make_core(), make_core(engine_id="worker-b")
    source.add(make_request("a", tokens(9), max_tokens=1))
    step(source, 0.0)
    wanted = SimulatedRequest.read(make_request("b", [*tokens(8), *tokens(5, 900)]), 1, 128)
    assert source.lend(wanted.block_hashes(3, 4)) == 2
    wanted.source = Manifest("worker-a", "", (), 8, wanted.digest(8))
    target.enter(wanted)
    assert target.start_step(0.0) is None
    assert target.wake_s() == 2 * TIMING.transfer_block_s
    plan, done = step(target, 4.0)
    assert (plan.prefill_tokens, plan.decode_requests) == (5, 0)
    assert done.outputs[0].prefill_stats == PrefillStats(13, 5, 8, 0, 8, 4)
    # It is in this cache now, and may be lent on.
    assert target.lend(wanted.block_hashes(3, 4)) == 3


def test_what_is_lent_was_used_just_now() -> None:
    core = make_core(kv_blocks=4, max_model_len_tokens=16)
    read = {}
    for name, first in (("a", 100), ("b", 200)):
        request = make_request(name, tokens(7, first), max_tokens=1)
        read[name] = SimulatedRequest.read(request, 1, 16).block_hashes(1, 4)
        core.add(request)
        run_until_idle(core)
    assert core.lend(read["a"]) == 1
    core.add(make_request("c", tokens(11, 300), max_tokens=1))
    run_until_idle(core)
    assert (core.lend(read["a"]), core.lend(read["b"])) == (1, 0)


def test_blocks_of_other_tokens_are_recomputed() -> None:
    source, target = make_core(), make_core()
    other = make_request("a", tokens(9, 300))
    hand_off_after_first_token(other)
    source.add(other)
    [first] = step(source, 0.0)[1].outputs
    assert first.kv_transfer_params is not None
    resumed = make_request("b", tokens(9))
    whole = generate(resumed)[0]
    resume_from(resumed, whole[:1], encode_manifest(first.kv_transfer_params))
    target.add(resumed)
    assert target.start_step(0.0) is None
    plan, done = step(target, 6.0)
    assert plan.prefill_tokens == 10
    assert done.counters["baton:kv_verification_failures_total"] == 1
    [second] = done.outputs
    assert second.prefill_stats == PrefillStats(9, 9, 0, 0, 0, 8)
    assert second.new_token_ids == whole[1:2]


def test_pinned_blocks_are_freed_by_the_lease() -> None:
    core = make_core()
    request = make_request("a", tokens(9))
    hand_off_after_first_token(request)
    core.add(request)
    _, done = step(core, 0.0)
    assert done.load.kv_blocks_used == 3
    assert core.start_step(20.0) is None
    assert core.wake_s() == pytest.approx(31.09)
    assert step(core, 31.1)[1].load.kv_blocks_used == 0
    assert core.wake_s() is None


def test_pinned_blocks_hold_up_others_only_until_the_lease_ends() -> None:
    core = make_core(kv_blocks=4, max_model_len_tokens=16)
    request = make_request("a", tokens(9))
    hand_off_after_first_token(request)
    core.add(request)
    step(core, 0.0)
    core.add(make_request("b", tokens(9, 300), max_tokens=2))
    outputs, _ = run_until_idle(core, 2.0)
    assert len(text(outputs, "b")) == 2


def test_abort_during_a_step_takes_the_request_out() -> None:
    core = make_core()
    core.add(make_request("a", tokens(9)))
    assert core.start_step(0.0) is not None
    core.abort(["a", "unknown"])
    done = core.finish_step(1.0)
    core.check_integrity()
    assert done.outputs == []
    assert done.load.kv_blocks_used == done.load.running == 0
    assert core.start_step(2.0) is None


def test_abort_of_a_refused_request_takes_its_error_back() -> None:
    core = make_core()
    core.add(make_request("a", []))
    core.abort(["a"])
    assert core.start_step(0.0) is None


def test_abort_of_an_idle_engine_tells_the_new_load_once() -> None:
    core = make_core()
    core.add(make_request("a", tokens(9)))
    step(core, 0.0)
    core.abort(["a"])
    plan, done = step(core, 2.0)
    assert plan.duration_s == 0
    assert done.load.running == 0
    assert core.start_step(2.0) is None


def test_a_resume_of_all_there_is_only_tells_the_end() -> None:
    whole, _ = generate(make_request("a", tokens(8), max_tokens=3))
    resumed = make_request("a", tokens(8), max_tokens=3)
    resume_from(resumed, whole, b"")
    assert generate(resumed)[1].finish_reason == FINISH_LENGTH
    stopped = make_request("a", tokens(8), stop_token_ids=[whole[1]])
    resume_from(stopped, whole[:2], b"")
    last = generate(stopped)[1]
    assert (last.new_token_ids, last.finish_reason, last.stop_reason) == ([], FINISH_STOP, whole[1])


def test_step_time_is_that_since_the_step_before_unless_idle_between() -> None:
    core = make_core()
    core.add(make_request("a", tokens(9), max_tokens=2))
    assert step(core, 0.0)[1].load.step_time_s == 0
    assert step(core, 1.5)[1].load.step_time_s == pytest.approx(1.5 + 1.1 - 1.09)
    assert core.start_step(5.0) is None
    core.add(make_request("b", tokens(9), max_tokens=1))
    assert step(core, 6.0)[1].load.step_time_s == 0


@pytest.mark.parametrize("limits", [{"kv_blocks": 31}, {"max_step_tokens": 7}])
def test_limits_that_cant_work_are_refused(limits: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=r"at least|can't hold"):
        make_core(**limits)


def test_a_step_costs_what_its_tokens_attend_to() -> None:
    timing = SimulatedTiming(
        step_base_s=1.0,
        prefill_token_s=0.0,
        prefill_pair_s=0.01,
        decode_request_s=0.0,
        decode_context_token_s=0.1,
    )
    core = make_core(timing, max_step_tokens=8)
    core.add(make_request("a", tokens(12), max_tokens=3))
    assert step(core, 0.0)[0].duration_s == pytest.approx(1.0 + 0.01 * 8 * 4)
    assert step(core, 2.0)[0].duration_s == pytest.approx(1.0 + 0.01 * 4 * (8 + 2))
    # The newest token attends to the prompt, then also to the one before it.
    assert step(core, 4.0)[0].duration_s == pytest.approx(1.0 + 0.1 * 12)
    assert step(core, 6.0)[0].duration_s == pytest.approx(1.0 + 0.1 * 13)
