"""The engine model against measured GPUs, and the fit against an engine that is known."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.engine_model import Fitted, Point, fit, quality, read, split
from engine.spec import SimulatedTiming

WITHIN = 0.1
TIMING = SimulatedTiming(
    step_base_s=0.01,
    prefill_token_s=50e-6,
    prefill_pair_s=2e-9,
    decode_request_s=70e-6,
    decode_context_token_s=30e-9,
)


def swept(known: Fitted) -> list[Point]:
    """What a sweep of an engine with these costs would measure."""
    prompts = [Point("prefill", tokens, 1, 0.0) for tokens in range(100, 16_000, 1000)]
    decodes = [
        Point("decode", tokens, requests, 0.0)
        for tokens in (350, 8000, 60_000)
        for requests in (1, 2, 8, 40)
    ]
    return [each._replace(measured_s=known.predicted_s(each)) for each in prompts + decodes]


@pytest.mark.parametrize("prompts_cached", [False, True])
def test_the_costs_of_a_known_engine_are_found(prompts_cached: bool) -> None:
    known = Fitted(TIMING, 0.005, prompts_cached)
    found = fit(swept(known), prompts_cached)
    assert found.first_token_s == pytest.approx(0.005, rel=1e-6)
    for name in TIMING.__slots__:
        assert getattr(found.timing, name) == pytest.approx(getattr(TIMING, name), rel=1e-6), name


def test_no_cost_is_negative() -> None:
    points = swept(Fitted(TIMING, 0.0))
    # Ever less with more context, which nothing real does.
    odd = [
        each._replace(measured_s=0.05 - 1e-9 * each.tokens * each.requests)
        if each.phase == "decode"
        else each
        for each in points
    ]
    found = fit(odd, prompts_cached=True)
    assert found.timing.decode_context_token_s == 0.0
    assert all(getattr(found.timing, name) >= 0 for name in TIMING.__slots__)


def test_measured_gpus_are_predicted(shared: Path) -> None:
    """What was held out, on average within a tenth, of each engine and phase."""
    sweeps = read(shared / "perf" / "dynamo_planner_measured.csv")
    assert [(setup.gpu, setup.tp) for setup in sweeps] == [
        ("H100-SXM", 8),
        ("H100-SXM", 4),
        ("H100-SXM", 2),
        ("H200-SXM", 1),
    ]
    for setup, points in sweeps.items():
        to_fit, held_out = split(points)
        found = fit(to_fit)
        for phase in ("prefill", "decode"):
            of_phase = [each for each in held_out if each.phase == phase]
            assert quality(found, of_phase).mean <= WITHIN, (setup, phase)
