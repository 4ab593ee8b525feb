"""What a router process is started with."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.spec import EngineTimes, PoolTimes, SimulatedTiming
from router import settings
from router.settings import JointSettings, RouterSettings

JOINT = JointSettings(
    ttft_slo_s=1.5,
    tpot_slo_s=0.04,
    engines=PoolTimes(
        prefill=EngineTimes(SimulatedTiming(step_base_s=0.01, prefill_pair_s=1e-9), 4096),
        decode=EngineTimes(SimulatedTiming(step_base_s=0.02), 512),
    ),
)


@pytest.mark.parametrize("joint", [None, JOINT])
def test_it_reads_what_was_written(tmp_path: Path, joint: JointSettings | None) -> None:
    written = RouterSettings(
        router_id="r",
        link_token="secret",
        expect_prefill=True,
        joint=joint,
        local_prefill_max_tokens=32,
        served_model_names=["tiny"],
        promised_ttft_s=2.0,
        index_block_tokens=128,
    )
    path = tmp_path / "router.json"
    settings.save(path, written)
    assert settings.load_router(path) == written
    assert path.stat().st_mode & 0o077 == 0
