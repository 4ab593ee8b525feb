"""The router's own figures in Prometheus' text."""

from __future__ import annotations

from protos.ids import RequestKey
from router.core.events import End, Ended
from router.metrics import LinkBytes, Measured, exposition
from tests.router.core.driving import Drive


def test_how_far_off_predictions_were() -> None:
    measured = Measured()
    for ttft, tpot in ((0.45, 1.05), (2.5, 1.0), (None, None)):
        key = RequestKey("0:a")
        end = Ended(key, End.COMPLETE, ttft_to_predicted=ttft, tpot_to_predicted=tpot)
        measured.observe(end)
    lines = exposition(Drive().core, measured, {}, "tiny", 0, LinkBytes()).decode().splitlines()
    ttft, tpot = (
        f"baton_time_{what}_to_predicted_ratio" for what in ("to_first_token", "per_output_token")
    )
    for line in (
        f'{ttft}_bucket{{le="0.33"}} 0.0',
        f'{ttft}_bucket{{le="0.5"}} 1.0',
        f'{ttft}_bucket{{le="3.0"}} 2.0',
        f"{ttft}_count 2.0",
        f"{ttft}_sum 2.95",
        f'{tpot}_bucket{{le="1.0"}} 1.0',
        f'{tpot}_bucket{{le="1.1"}} 2.0',
    ):
        assert line in lines
