"""Joint placement: what it learns from what workers do."""

from __future__ import annotations

import math

import pytest

from engine.base import EngineLoad
from engine.learned_times import FIRST_SPREAD, PROFILE_WEIGHT
from protos.ids import WorkerId
from router.core.costs import Slo
from router.core.placement import Decision
from router.core.workers import Worker
from tests.router.core.joint_bench import Bench, predicted


def predicted_part(decision: Decision, name: str) -> float:
    """A number that only one of the parts compared has."""
    at = decision.compared.index(name)
    (found,) = [each.numbers[at] for each in decision.candidates if each.numbers[at]]
    return found


def test_lengths_are_learned_from_whole_outputs() -> None:
    bench = Bench("d1")
    for number in range(1, 200):
        bench.place(tokens=128, kind="tools")
        bench.first_token(number)
        bench.ended(number, 10 if number % 2 else None)
    share = predicted(bench.place(tokens=12_800, kind="tools"), "d1")["tpot_s"]
    other = predicted(bench.place(tokens=12_800, kind="chat"), "d1")["tpot_s"]
    assert share < other


@pytest.mark.parametrize("true", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("at_once", [1, 30, 200])
def test_the_learned_factor_is_that_of_the_engine(true: float, at_once: int) -> None:
    """However many prompts were placed before the first of them told anything."""
    bench = Bench("d1", kv_blocks=30_000)
    for prefix in range(at_once):
        bench.place(tokens=12_800, prefix=prefix)
    work_s = 12_800 * (20e-6 + 6400 * 1e-9)
    for number in range(1, at_once + 1):
        bench.now_s += true * work_s + 2 * 0.006
        bench.first_token(number)
    bench.place(tokens=12_800, prefix=999)
    bench.now_s += 1.0
    bench.first_token(at_once + 1)
    # Bases are predicted as they were when each was placed, with what was to decode there.
    assert bench.policy.learned.prefill.value == pytest.approx(true, rel=0.2)


def decoding(bench: Bench, tokens: int = 1280) -> Worker:
    """A worker that decodes one request, and nothing waits there."""
    bench.place(tokens=tokens)
    bench.now_s += 0.1
    bench.first_token(1)
    (worker,) = bench.pool
    return worker


def test_steps_that_only_decode_tell_how_long_those_take() -> None:
    bench = Bench("d1")
    worker = decoding(bench)
    bench.now_s += 50  # Prompts' share of the time is past.
    before_s = predicted(bench.place(tokens=128, prefix=1), "d1")["tpot_s"]
    bench.ended(2, None)
    step_s = 0.006 + 13e-6 + (1280 + 128) * 43e-9
    worker.load = EngineLoad(running=1, step_time_s=3 * step_s)
    for _ in range(100):
        bench.policy.stepped(bench.now_s, worker)
    assert bench.policy.learned.step.value == pytest.approx(3, rel=0.01)
    bench.now_s += 50
    after_s = predicted(bench.place(tokens=128, prefix=1), "d1")["tpot_s"]
    assert after_s == pytest.approx(3 * before_s, rel=0.02)


def test_steps_beside_prompts_tell_nothing() -> None:
    bench = Bench("d1")
    worker = decoding(bench)
    bench.place(tokens=12_800, prefix=1)
    worker.load = EngineLoad(running=2, step_time_s=0.4)
    bench.policy.stepped(bench.now_s, worker)
    assert bench.policy.learned.step.observations == 0


def test_what_runs_before_it_is_told_of_is_taken_to_be_like_the_rest() -> None:
    bench = Bench("d1")
    worker = decoding(bench)
    ten_s = 0.006 + 10 * (13e-6 + (1280 + 128) * 43e-9)
    worker.load = EngineLoad(running=10, step_time_s=ten_s)
    bench.policy.stepped(bench.now_s, worker)
    assert bench.policy.learned.step.value == pytest.approx(1)


def test_hand_offs_tell_how_long_transfers_take() -> None:
    bench = Bench("p1", "d1", slo=Slo(ttft_s=2.0, tpot_s=0.008))
    for number in range(8):
        bench.place(tokens=128, prefix=number, output_tokens=1)  # It goes on as a whole.
        bench.now_s += 0.1
        bench.first_token(number + 1)
    decoding = bench.policy.forecasts[WorkerId("d1")]
    before_s = 0.006 + 8 * 13e-6 + decoding.context_tokens * 43e-9
    decision = bench.place(tokens=12_800, prefix=9)
    assert (decision.prefill, decision.worker) == ("p1", "d1")
    assert predicted_part(decision, "transfer_s") == pytest.approx(
        (2e-3 + 100 * 0.4e-3 + before_s / 2) * math.exp(FIRST_SPREAD**2 / 2)
    )
    bench.now_s += 1.0
    bench.first_token(9)
    step_s = before_s + 13e-6 + (12_800 + 128) * 43e-9
    moved_s = 2e-3 + 100 * 0.4e-3 + step_s / 2
    bench.now_s += 2 * moved_s + step_s
    bench.first_token(9)
    weight = moved_s / (moved_s + step_s)
    learned = 2 ** (weight / (weight + PROFILE_WEIGHT))
    assert bench.policy.learned.transfer.value == pytest.approx(learned)
