"""Joint placement: the times that it predicts of workers, and expects of what waits."""

from __future__ import annotations

import pytest

from engine.base import EngineLoad, PlacedWork
from engine.spec import EngineTimes, PoolTimes, SimulatedTiming
from protos.ids import WorkerId
from router.core.backlog import Before
from router.core.events import Role, Shape
from router.core.joint import JointPlacement
from router.core.placement import Decision, Expected
from tests.router.core.joint_bench import ENGINE, SLO, Bench, predicted

NOTHING = Before()
NO_TIME = SimulatedTiming(
    step_base_s=0.0,
    prefill_token_s=0.0,
    prefill_pair_s=0.0,
    decode_request_s=0.0,
    decode_context_token_s=0.0,
    transfer_block_s=0.0,
)


def test_an_idle_worker_is_predicted_by_the_profile() -> None:
    decision = Bench("d1").place(tokens=1280)
    numbers = predicted(decision, "d1")
    prefill_s = 1280 * 20e-6 + 1280 * 640 * 1e-9 + 0.006
    assert numbers["ttft_s"] == pytest.approx(prefill_s)
    assert numbers["queue_s"] == 0
    # One decode of the prompt and half of the 256 tokens that are expected.
    assert numbers["tpot_s"] == pytest.approx(0.006 + 13e-6 + (1280 + 128) * 43e-9)


def test_what_waits_is_waited_for_and_shrinks_with_time() -> None:
    bench = Bench("d1")
    first_s = predicted(bench.place(tokens=8192), "d1")["ttft_s"]
    bench.now_s += first_s / 4
    queue_s = predicted(bench.place(), "d1")["queue_s"]
    assert queue_s == pytest.approx(first_s * 3 / 4)


def test_prompts_share_a_steps_base() -> None:
    bench = Bench("d1")
    alone_s = predicted(bench.place(tokens=1024, prefix=0), "d1")["ttft_s"]
    for prefix in range(1, 7):
        bench.place(tokens=1024, prefix=prefix)
    together_s = predicted(bench.place(tokens=1024, prefix=7), "d1")["ttft_s"]
    assert together_s == pytest.approx(8 * (alone_s - 0.006) + 0.006 + 0.006 * 7 / 8)


def test_an_overdue_prompt_is_taken_to_end_now() -> None:
    bench = Bench("d1")
    bench.place(tokens=12_800)
    bench.now_s += 60
    assert predicted(bench.place(), "d1")["queue_s"] == 0


def test_first_tokens_move_what_waits_behind() -> None:
    bench = Bench("d1")
    first_s = predicted(bench.place(tokens=12_800, prefix=0), "d1")["ttft_s"]
    second = predicted(bench.place(tokens=12_800, prefix=1), "d1")
    bench.now_s += first_s / 2  # Twice as fast as predicted.
    bench.first_token(1)
    queue_s = predicted(bench.place(prefix=2), "d1")["queue_s"]
    assert queue_s == pytest.approx(second["prefill_s"], rel=0.02)


def expected(bench: Bench, tokens: int, before: Before = NOTHING) -> Expected:
    shape = Shape(tokens, None)
    found = bench.policy.expect(bench.now_s, bench.view, shape, before)
    assert found is not None
    return found


def test_an_idle_worker_is_expected_to_serve_at_once() -> None:
    bench = Bench("d1")
    for tokens in (128, 100_000):  # However long the prompt: its tokens come after it.
        found = expected(bench, tokens)
        assert found.ttft_s == pytest.approx(found.alone_ttft_s)
        assert found.tpot_s == pytest.approx(found.alone_tpot_s, rel=0.02)


def test_what_waits_is_expected_to_go_first() -> None:
    bench = Bench("d1", "d2")
    alone = expected(bench, 1280)
    behind = expected(bench, 1280, Before(work_s=3.0, requests=4))
    assert behind.ttft_s == pytest.approx(alone.ttft_s + 1.5)
    each_s = 13e-6 + (1280 + 128) * 43e-9
    assert behind.tpot_s - alone.tpot_s == pytest.approx(2 * each_s, rel=0.05)


def test_where_no_cache_has_room_that_is_waited_for() -> None:
    """Within the time that an output takes all that run are over, each in its turn."""
    bench = Bench("d1", "d2")
    for name in ("d1", "d2"):
        worker = bench.pool.get(WorkerId(name))
        assert worker is not None
        worker.others = PlacedWork(
            decodes=100, context_tokens=380_000, running=100, running_context_tokens=380_000
        )
        bench.policy.stepped(bench.now_s, worker)
        worker.load = EngineLoad(running=100, kv_blocks_used=3000, kv_blocks_total=3000)
    tokens = 3840 - 128  # With half of its output, as much as each of those takes.
    output_s = expected(bench, tokens).tpot_s * 256
    alone = expected(bench, tokens)
    waits_s = alone.ttft_s - alone.alone_ttft_s
    assert waits_s == pytest.approx(output_s / 100, rel=0.1)
    behind = expected(bench, tokens, Before(requests=100))
    # As many leave each of the two as half of those that wait.
    assert behind.ttft_s - alone.ttft_s == pytest.approx(output_s / 2, rel=0.1)
    short = expected(bench, 128, Before(work_s=100 * 128 * 20e-6, requests=100))
    assert short.ttft_s < alone.ttft_s + output_s / 10, "they are like it"
    worker.load = EngineLoad(running=100, kv_blocks_used=2500, kv_blocks_total=3000)
    assert expected(bench, tokens).ttft_s == pytest.approx(alone.alone_ttft_s, rel=0.01)


def test_a_few_long_ones_do_not_make_many_short_ones_wait() -> None:
    bench = Bench("p1", "d1")
    worker = bench.pool.get(WorkerId("d1"))
    assert worker is not None
    worker.others = PlacedWork(
        decodes=1, context_tokens=100_000, running=1, running_context_tokens=100_000
    )
    bench.policy.stepped(bench.now_s, worker)
    worker.load = EngineLoad(running=1, kv_blocks_used=782, kv_blocks_total=3000)
    found = expected(bench, 512, Before(work_s=12 * 0.016, requests=12))
    assert found.ttft_s < 0.3


def test_of_those_that_decode_some_will_have_ended() -> None:
    bench = Bench("d1")
    for number in range(40):
        bench.place(tokens=1280, prefix=number)
        bench.now_s += 1.0
        bench.first_token(number + 1)
    bench.now_s += 60.0
    soon = expected(bench, 1280)
    later = expected(bench, 1280, Before(work_s=60.0))
    assert soon.alone_tpot_s < later.tpot_s < soon.tpot_s


def test_nothing_is_expected_of_nobody() -> None:
    bench = Bench()
    shape = Shape(128, None)
    assert bench.policy.expect(bench.now_s, bench.view, shape, NOTHING) is None


def test_steps_that_take_no_time_leave_something_to_compare() -> None:
    pool = Bench("d1")
    no_time = EngineTimes(NO_TIME, max_step_tokens=8192)
    policy = JointPlacement(lambda n: 0, PoolTimes(no_time, no_time), SLO)
    assert policy.expect(0.0, pool.view, Shape(128, None), NOTHING) is not None
    assert policy.place(0.0, pool.view, pool.key(1), Shape(128, None)) is not None


def test_each_pools_engines_are_predicted_by_their_own_times() -> None:
    wide = SimulatedTiming(
        step_base_s=0.003, prefill_token_s=10e-6, decode_request_s=6e-6, transfer_block_s=0.1e-3
    )
    pools = PoolTimes(prefill=EngineTimes(wide, max_step_tokens=1024), decode=ENGINE)
    unlike = Bench("p1", "d1", engines=pools).place(tokens=2560)
    alike = Bench("p1", "d1").place(tokens=2560)
    prefill_s = predicted(unlike, "p1", Role.PREFILL)["prefill_s"]
    assert prefill_s == pytest.approx(2560 * 10e-6 + 3 * 0.003)
    assert prefill_s < predicted(alike, "p1", Role.PREFILL)["prefill_s"]
    # Who decodes also fetches.
    assert both_parts(unlike, "d1") == both_parts(alike, "d1")


def both_parts(decision: Decision, worker: str) -> list[dict[str, float]]:
    """What was compared of a worker that would do all of it, and of the one that only decodes."""
    return [
        dict(zip(decision.compared, each.numbers, strict=True))
        for each in decision.candidates
        if (each.worker, each.role) == (worker, Role.DECODE)
    ]


def test_what_others_gave_a_pool_is_priced_by_its_own_times() -> None:
    slow = EngineTimes(SimulatedTiming(prefill_token_s=1e-3), max_step_tokens=8192)
    bench = Bench("p1", "d1", engines=PoolTimes(prefill=slow, decode=ENGINE))
    for name in ("p1", "d1"):
        worker = bench.pool.get(WorkerId(name))
        assert worker is not None
        worker.others = PlacedWork(prompts=1, prompt_tokens=1000)
        bench.policy.stepped(bench.now_s, worker)
    decision = bench.place(tokens=1280)
    assert predicted(decision, "p1", Role.PREFILL)["queue_s"] > 1.0
    whole, _ = both_parts(decision, "d1")
    assert 0.02 < whole["queue_s"] < 0.1
