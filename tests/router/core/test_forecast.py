"""What is on its way to one worker: queues and shares of its time."""

from __future__ import annotations

import math

import pytest

from protos.ids import RequestKey, WorkerId
from router.core.columns import Columns
from router.core.events import Role
from router.core.forecast import LARGEST_SHARE, Forecast, Part
from tests.router.core.joint_bench import Bench


def test_a_share_decays_over_its_window() -> None:
    bench, forecast = Bench("d1"), Forecast()
    workers = bench.pool.usable(Role.DECODE)
    columns = Columns((), workers, lambda _: forecast)
    assert columns.prefill_share(0.0, 10.0) == [0.0]
    forecast.add_prefill(0.0, RequestKey("0:a"), part(0.4), 10.0)
    columns.write(WorkerId("d1"), forecast)
    # Of the window there has been one second.
    seen = 0.4 * math.exp(-0.1) / (10 * (1 - math.exp(-0.1)))
    assert columns.prefill_share(1.0, 10.0) == pytest.approx([seen])
    forecast.add_prefill(1000.0, RequestKey("0:b"), part(5.0), 10.0)
    columns.write(WorkerId("d1"), forecast)
    assert columns.prefill_share(1000.0, 10.0) == pytest.approx([0.5])
    assert columns.prefill_share(1010.0, 10.0) == pytest.approx([0.5 / math.e])
    forecast.add_prefill(1010.0, RequestKey("0:c"), part(99.0), 10.0)
    columns.write(WorkerId("d1"), forecast)
    assert columns.prefill_share(1010.0, 10.0) == pytest.approx([LARGEST_SHARE])
    assert columns.queue_s(1010.0) == pytest.approx([forecast.queue_s(1010.0)])


def part(occupies_s: float) -> Part:
    return Part(WorkerId("d"), occupies_s=occupies_s)


def queued(*seconds: float) -> Forecast:
    """Prompts a, b, c... that were placed at 100 s."""
    forecast = Forecast()
    for name, occupies_s in zip("abcd", seconds, strict=False):
        forecast.add_prefill(100.0, RequestKey(name), part(occupies_s), 10.0)
    return forecast


def test_lateness_counts_once() -> None:
    forecast = queued(1.0)
    forecast.add_prefill(103.0, RequestKey("b"), part(1.0), 10.0)
    forecast.end_prefill(103.5, RequestKey("a"))
    assert forecast.queue_s(103.5) == pytest.approx(1.0)


def test_one_that_leaves_the_middle_moves_those_behind_it() -> None:
    forecast = queued(1.0, 2.0, 1.0)
    forecast.end_prefill(100.1, RequestKey("b"))
    assert forecast.queue_s(100.1) == pytest.approx(1.9)
    assert forecast.prefills[RequestKey("a")].due_s == 101.0
    assert forecast.prefills[RequestKey("c")].due_s == 102.0


def test_one_that_leaves_half_done_saves_the_other_half() -> None:
    forecast = queued(10.0, 1.0)
    forecast.end_prefill(109.0, RequestKey("a"))
    assert forecast.queue_s(109.0) == pytest.approx(1.0)
