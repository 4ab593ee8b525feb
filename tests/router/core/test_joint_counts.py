"""Joint placement: what it counts of requests, and that it counts everything back."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protos.enginecore import ENGINE_TAG
from protos.ids import Incarnation, WorkerId
from router.core.costs import Slo
from router.core.events import Role, Shape, WorkerUp
from router.core.placement import Reason
from tests.router.core.joint_bench import BLOCK_TOKENS, Bench, predicted


def test_what_can_be_fetched_is_not_computed_again() -> None:
    bench = Bench("p1", "d1", "d2")
    decision = bench.place(tokens=12_800, output_tokens=1, fetchable=True)
    assert (decision.reason, decision.prefill) == (Reason.RESUME, None)
    assert predicted(decision, "d1")["prefill_s"] == 0
    assert not bench.policy.forecasts[WorkerId(decision.worker or "")].prefills
    bench.first_token(1)
    assert bench.policy.forecasts[WorkerId(decision.worker or "")].running == 1
    bench.ended(1)
    assert bench.policy.forecasts[WorkerId(decision.worker or "")].idle


def test_what_a_former_router_placed_counts() -> None:
    bench = Bench("p1", "d1", "d2")
    workers = {worker.id: worker for worker in bench.pool}
    for number in range(40):
        shape = Shape(2000, None, output_tokens=number % 2)
        bench.policy.adopted(bench.now_s, bench.key(100 + number), workers[WorkerId("d1")], shape)
    shape = Shape(2000, None)
    bench.policy.adopted(bench.now_s, bench.key(99), workers[WorkerId("p1")], shape)
    forecast = bench.policy.forecasts[WorkerId("d1")]
    assert (forecast.decodes, forecast.running) == (40, 20)
    decision = bench.place(tokens=128, max_tokens=400)
    assert decision.worker == "d2"
    for number in range(40):  # Some get their first token, some go on and are found again.
        if number % 2 == 0:
            bench.first_token(100 + number)
        else:
            again = Shape(2000, None, output_tokens=7)
            bench.policy.adopted(
                bench.now_s, bench.key(100 + number), workers[WorkerId("d1")], again
            )
    assert (forecast.decodes, forecast.running) == (40, 40)
    for number in range(-1, 40):
        bench.ended(100 + number)
    assert forecast.idle
    assert forecast.running_context_tokens == pytest.approx(0, abs=1e-6)


def test_what_a_former_router_placed_and_nobody_ends_is_taken_off() -> None:
    bench = Bench("d1")
    (worker,) = bench.pool
    shape = Shape(2000, 100, output_tokens=5)
    bench.policy.adopted(bench.now_s, bench.key(99), worker, shape)
    bench.now_s += 600.0
    bench.place()
    assert bench.policy.forecasts[WorkerId("d1")].decodes == 1


events = st.lists(
    st.tuples(
        st.sampled_from(["place", "first", "end", "lose"]),
        st.integers(1, 30),
        st.integers(1, 20_000),
    ),
    max_size=120,
)


@settings(deadline=None, max_examples=200)
@given(events, st.sampled_from([("d1", "d2"), ("p1", "p2", "d1")]))
def test_all_that_is_counted_goes_when_all_have_ended(
    story: list[tuple[str, int, int]], names: tuple[str, ...]
) -> None:
    bench = Bench(*names)
    rng = Random(len(story))
    for what, number, tokens in story:
        bench.now_s += rng.random()
        if what == "place":
            decision = bench.place(tokens, prefix=number % 3)
            assert {decision.worker, decision.prefill} - {None} <= set(names)
        elif what == "first":
            bench.first_token(number)
        else:
            bench.ended(number, 5 if what == "end" else None)
    for number in range(1, 130):
        bench.ended(number, None)
    for forecast in bench.policy.forecasts.values():
        assert forecast.idle
        assert (forecast.running, forecast.coming_tokens) == (0, 0)
        assert forecast.context_tokens == pytest.approx(0, abs=1e-6)
        assert forecast.running_context_tokens == pytest.approx(0, abs=1e-6)
        assert forecast.queue_s(bench.now_s) == 0


def test_what_must_be_over_is_taken_off() -> None:
    """Three requests of which nothing is heard: one computed, one not, one split."""
    bench = Bench("p1", "d1", slo=Slo(ttft_s=2.0, tpot_s=0.02))
    bench.place(tokens=128, prefix=1, max_tokens=2000)
    bench.first_token(1)
    bench.place(tokens=128, prefix=2, max_tokens=2000, prompt_logprobs=True)
    assert bench.place(tokens=25_600, prefix=3, max_tokens=2000).prefill == "p1"
    assert sum(len(each.prefills) for each in bench.policy.forecasts.values()) == 2
    bench.now_s += 70
    for number in range(4, 7):  # Each question looks at two.
        bench.place(tokens=128, prefix=9, max_tokens=1)
        bench.ended(number, None)
    assert not any(each.prefills for each in bench.policy.forecasts.values())
    assert bench.policy.forecasts[WorkerId("d1")].decodes == 3
    bench.now_s += 60
    for number in range(7, 10):
        bench.place(tokens=128, prefix=9, max_tokens=1)
        bench.ended(number, None)
    assert all(each.idle for each in bench.policy.forecasts.values())
    assert bench.policy.forecasts[WorkerId("p1")].coming_tokens == 0


def test_what_is_late_yet_comes_goes_on() -> None:
    bench = Bench("p1", "d1", slo=Slo(ttft_s=2.0, tpot_s=0.02))
    bench.place(tokens=25_600, max_tokens=10_000)
    bench.now_s += 100
    for number in range(2, 4):
        bench.place(tokens=128, prefix=9, max_tokens=1)
        bench.ended(number, None)
    assert not bench.policy.forecasts[WorkerId("p1")].prefills
    bench.first_token(1)
    bench.first_token(1)
    decode = bench.policy.forecasts[WorkerId("d1")]
    assert (decode.running, decode.decodes, decode.coming_tokens) == (1, 1, 0)
    assert bench.policy.forecasts[WorkerId("p1")].coming_tokens == 0
    bench.ended(1)
    assert all(each.idle for each in bench.policy.forecasts.values())


def test_workers_that_are_gone_are_forgotten() -> None:
    bench = Bench("d1")
    for number in range(1, 60):
        name = WorkerId(f"gone{number}")
        up = WorkerUp(name, Incarnation(1), Role.DECODE, ENGINE_TAG, BLOCK_TOKENS, 3000, 131_072)
        gone = bench.pool.attach(up)
        bench.place(prefix=number)
        bench.ended(number, None)
        bench.pool.remove(gone)
    assert len(bench.policy.forecasts) < 25
