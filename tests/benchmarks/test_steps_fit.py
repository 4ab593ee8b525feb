"""Costs that are fitted to what engines take."""

from __future__ import annotations

from dataclasses import asdict, replace

import pytest

from benchmarks.steps_fit import Measured, fit, mean, report
from engine.latency_model import StepTimes, StepWork
from engine.spec import SimulatedTiming

BLOCK_TOKENS = 128
TIMING = SimulatedTiming(
    step_base_s=2e-3, prefill_token_s=20e-6, prefill_pair_s=5e-9, decode_request_s=100e-6,
    decode_context_token_s=50e-9, transfer_block_s=1e-3, transfer_base_s=7e-3,
)  # fmt: skip


WAKE_S = 5e-3
CONTENTION = 1.5


def measured(transfer_base_s: float = TIMING.transfer_base_s) -> Measured:
    """Engines that are just as the model."""
    times = StepTimes(TIMING)

    def prompt_s(tokens: int, slower: float = 1.0) -> float:
        work = StepWork()
        work.add_prefill(tokens, 0)
        return WAKE_S + slower * times.step_s(work)

    def decode_s(requests: int, context_tokens: int) -> float:
        return times.step_s(
            StepWork(decode_requests=requests, decode_context_tokens=requests * context_tokens)
        )

    return Measured(
        prompts={tokens: prompt_s(tokens) for tokens in (128, 512, 2048)},
        decodes={each: decode_s(*each) for each in ((1, 128), (1, 4096), (8, 512), (16, 128))},
        fetches={blocks * BLOCK_TOKENS: transfer_base_s + blocks * 1e-3 for blocks in (1, 4, 16)},
        beside={512: prompt_s(512, CONTENTION)},
        block_tokens=BLOCK_TOKENS, kv_tokens=100_000, max_step_tokens=4096,
        max_running_requests=256, max_model_len_tokens=8192,
    )  # fmt: skip


def test_the_model_is_found_again() -> None:
    fitted, wake_s, contention = fit(measured())
    found = asdict(fitted.timing(BLOCK_TOKENS))
    assert wake_s == pytest.approx(WAKE_S)
    assert contention == pytest.approx(CONTENTION)
    assert found == pytest.approx(asdict(TIMING))
    assert (fitted.kv_tokens, fitted.max_step_tokens) == (100_000, 4096)


def test_no_cost_is_below_nothing() -> None:
    assert fit(measured(transfer_base_s=-0.5e-3)).profile.transfer_base_s == 0


def test_an_engine_without_another_fetches_nothing() -> None:
    given = replace(measured(), fetches={}, beside={})
    found = fit(given)
    assert found.contention is None
    assert "transfer" not in report(given)
    timing = found.profile.timing(BLOCK_TOKENS)
    assert timing.transfer_base_s == 0
    assert timing.transfer_block_s == pytest.approx(0, abs=1e-9)


def test_no_engine_is_quicker_beside_another() -> None:
    assert fit(replace(measured(), beside={512: WAKE_S})).contention == 1


def test_measurements_are_averaged_point_by_point() -> None:
    one = measured()
    points = ("prompts", "decodes", "fetches", "beside")
    slower = {
        name: {point: factor * took_s for point, took_s in getattr(one, name).items()}
        for factor, name in enumerate(points, start=3)
    }
    both = mean([one, replace(one, **slower)])
    for factor, name in enumerate(points, start=3):
        expected = {n: (1 + factor) / 2 * took_s for n, took_s in getattr(one, name).items()}
        assert getattr(both, name) == pytest.approx(expected)


def test_the_report_holds_each_point_beside_its_fit() -> None:
    given = measured()
    text = report(given)
    assert "| step of 16 x 128 tokens | 3.70 | 3.70 | " in text
    # 5 ms and one and a half times 2 + 512 x 0.02 + 512 x 256 x 5e-6.
    assert "| prompt of 512 tokens while the other engine decodes | 24.34 | 24.34 | " in text
    assert "| fetch of 512 tokens | 11.00 | 11.00 | " in text
