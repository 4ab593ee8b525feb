"""What a report shows: a run's distributions and loads, and what became of other rates.

Drawn on a `Canvas`, of which a page and a picture each have their own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final, Literal, Protocol

from protos.ids import WorkerId
from simulator.experiment import Outcome
from simulator.measure import Latencies

WIDTH: Final = 560
_HEIGHT: Final = 260
_LEFT: Final = 64
_RIGHT: Final = WIDTH - 16
_TOP: Final = 8
_BOTTOM: Final = _HEIGHT - 44
_BAR: Final = 18
_TICKS: Final = 6

Stroke = Literal["axis", "curve", "limit"]
Anchor = Literal["start", "middle", "end"]
Point = tuple[float, float]


class Canvas(Protocol):
    """Pixels from the upper left; a text's y is its baseline."""

    def line(self, points: Sequence[Point], stroke: Stroke) -> None:
        """From point to point."""

    def bar(self, x: float, y: float, width: float, height: float) -> None:
        """A filled rectangle."""

    def text(self, x: float, y: float, text: str, anchor: Anchor) -> None:
        """In small letters."""


@dataclass(frozen=True, slots=True)
class AtRate:
    """What came of the workload at another rate."""

    offered_rps: float
    good_rps: float
    """Requests that met both SLOs."""
    hit_rate: float


@dataclass(frozen=True, slots=True)
class Figure:
    """One of a report's."""

    title: str
    height: int
    draw: Callable[[Canvas], None]


def figures(outcome: Outcome, rates: Sequence[AtRate]) -> list[Figure]:
    """All of a report's; those over the rate only if there are several rates."""
    measured = outcome.measured
    drawn = [
        Figure(f"{name}: share of requests", _HEIGHT, partial(_distribution, latencies, slo_s))
        for name, latencies, slo_s in (
            ("Time to first token", measured.ttft, measured.slo.ttft_s),
            ("Time per output token", measured.tpot, measured.slo.tpot_s),
        )
        if latencies.count
    ]
    if len(rates) > 1:
        drawn += [
            Figure("Requests/s within both SLOs, by requests/s", _HEIGHT, partial(_goodput, rates)),
            Figure("Prompt tokens cached, by requests/s", _HEIGHT, partial(_hit_rate, rates)),
        ]
    busy = Figure(
        "Share of the time that each worker computed",
        _BAR * len(outcome.busy) + 6,
        partial(_bars, outcome.busy),
    )
    return [*drawn, busy]


def _distribution(latencies: Latencies, slo_s: float, canvas: Canvas) -> None:
    """Share of requests at most that slow, over a logarithmic axis."""
    points = latencies.curve()
    low = math.floor(math.log10(min(points[0][0], slo_s)))
    high = max(low + 1, math.ceil(math.log10(max(points[-1][0], slo_s))))

    def x(seconds: float) -> float:
        return _across((math.log10(seconds) - low) / (high - low))

    powers = [10.0**power for power in range(low, high + 1)]
    _grid(canvas, [(x(power), _time(power)) for power in powers], _shares())
    canvas.line([(x(seconds), _down(share)) for seconds, share in points], "curve")
    _limit(canvas, x(slo_s), "SLO")


def _goodput(rates: Sequence[AtRate], canvas: Canvas) -> None:
    highest = max(each.offered_rps for each in rates)
    ticks = _ticks(highest)
    _grid(
        canvas,
        [(_across(tick / highest), f"{tick:g}") for tick in ticks],
        [(_down(tick / highest), f"{tick:g}") for tick in ticks],
    )
    canvas.line([(_across(0), _down(0)), (_across(1), _down(1))], "limit")
    canvas.text(_across(0.5) - 8, _down(0.5) - 8, "all", "end")
    canvas.line(
        [(_across(each.offered_rps / highest), _down(each.good_rps / highest)) for each in rates],
        "curve",
    )


def _hit_rate(rates: Sequence[AtRate], canvas: Canvas) -> None:
    highest = max(each.offered_rps for each in rates)
    ticks = [(_across(tick / highest), f"{tick:g}") for tick in _ticks(highest)]
    _grid(canvas, ticks, _shares())
    canvas.line(
        [(_across(each.offered_rps / highest), _down(each.hit_rate)) for each in rates], "curve"
    )


def _bars(busy: Mapping[WorkerId, float], canvas: Canvas) -> None:
    for number, (worker, share) in enumerate(busy.items()):
        top = _BAR * number
        canvas.text(92, top + 13, worker, "end")
        canvas.bar(100, top + 3, share * 400, 12)
        canvas.text(106 + share * 400, top + 13, f"{share:.0%}", "start")


def _grid(
    canvas: Canvas, across: Sequence[tuple[float, str]], down: Sequence[tuple[float, str]]
) -> None:
    for x, text in across:
        canvas.line([(x, _TOP), (x, _BOTTOM)], "axis")
        canvas.text(x, _BOTTOM + 18, text, "middle")
    for y, text in down:
        canvas.line([(_LEFT, y), (_RIGHT, y)], "axis")
        canvas.text(_LEFT - 6, y + 4, text, "end")


def _limit(canvas: Canvas, x: float, text: str) -> None:
    canvas.line([(x, _TOP), (x, _BOTTOM)], "limit")
    canvas.text(x, _BOTTOM + 34, text, "middle")


def _shares() -> list[tuple[float, str]]:
    return [(_down(share), f"{share:.0%}") for share in (0, 0.25, 0.5, 0.75, 0.9, 1)]


def _across(share: float) -> float:
    return _LEFT + share * (_RIGHT - _LEFT)


def _down(share: float) -> float:
    return _BOTTOM - share * (_BOTTOM - _TOP)


def _ticks(highest: float) -> list[float]:
    """Round numbers from 0 to it."""
    power = 10.0 ** math.floor(math.log10(highest / _TICKS))
    step = next(power * digit for digit in (1, 2, 5, 10) if power * digit * _TICKS >= highest)
    return [step * number for number in range(int(highest / step + 1e-9) + 1)]


def _time(seconds: float) -> str:
    return f"{seconds:g} s" if seconds >= 1 else f"{seconds * 1e3:g} ms"
