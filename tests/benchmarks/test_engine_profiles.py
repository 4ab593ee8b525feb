"""The simulator's profiles are what the fit gives."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import engine_model
from benchmarks.engine_profiles import ENGINES, report
from engine.profiles import PROFILES


def test_the_profiles_are_the_fit(shared: Path) -> None:
    lines = report(shared).splitlines()[2:]
    names = (
        "llama-3.1-8b-h100", "qwen3-32b-h100x2", "llama-3.1-70b-h100x4", "llama-3.1-70b-h100x8",
    )  # fmt: skip
    for name, engine, line in zip(names, ENGINES, lines, strict=True):
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        base, token, pair, request, context = map(float, cells[1:6])
        profile = PROFILES[name]
        assert profile.gpus == int(engine[1])
        if profile.kv_tokens_reported is None:
            assert profile.step_base_s * 1e3 == pytest.approx(base, rel=0.01)
        assert profile.prefill_token_s * 1e6 == pytest.approx(1.2 * token, rel=0.01)
        assert profile.prefill_pair_s * 1e9 == pytest.approx(1.2 * pair, rel=0.01)
        assert profile.decode_request_s * 1e6 == pytest.approx(request, rel=0.01)
        assert profile.decode_context_token_s * 1e9 == pytest.approx(context, rel=0.01)


@pytest.mark.parametrize("gpus", [2, 4, 8])
def test_what_was_measured_on_whole_engines_is_their_fit(shared: Path, gpus: int) -> None:
    sweeps = engine_model.read(shared / "perf" / "dynamo_planner_measured.csv")
    setup = engine_model.Setup("H100-SXM", "Llama-3.3-70B-Instruct-FP8", gpus)
    fitted = engine_model.fit(engine_model.split(sweeps[setup])[0]).timing
    profile = PROFILES[f"llama-3.3-70b-fp8-h100x{gpus}"]
    assert profile.gpus == gpus
    for name in (
        "step_base_s", "prefill_token_s", "prefill_pair_s", "decode_request_s",
        "decode_context_token_s",
    ):  # fmt: skip
        assert getattr(profile, name) == pytest.approx(getattr(fitted, name), rel=0.01), name
