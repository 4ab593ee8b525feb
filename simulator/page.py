"""A run's curves as one HTML file that needs nothing else.

How TTFT and TPOT are distributed, and how busy each worker was.
"""

from __future__ import annotations

import html
import math
from typing import Final

from simulator.experiment import Outcome
from simulator.measure import Latencies

_WIDTH: Final = 560
_HEIGHT: Final = 260
_LEFT: Final = 48
_BOTTOM: Final = 36
_STYLE: Final = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 76rem; padding: 0 1rem;
  color: #1b1f24; background: #fff }
h1 { font-size: 1.4rem } h2 { font-size: 1.05rem; margin: 1.5rem 0 .3rem }
main { display: flex; flex-wrap: wrap; gap: 2rem }
svg text { font-size: 12px; fill: #57606a } .curve { fill: none; stroke: #0b5cad; stroke-width: 2 }
.axis { stroke: #d0d7de } .slo { stroke: #b42318; stroke-dasharray: 4 3 } .bar { fill: #0b5cad }
@media (prefers-color-scheme: dark) { body { color: #e6edf3; background: #0d1117 }
  svg text { fill: #9198a1 } .curve { stroke: #58a6ff } .bar { fill: #58a6ff }
  .axis { stroke: #3d444d } }
"""


def render(title: str, outcome: Outcome) -> str:
    """The page."""
    measured = outcome.measured
    parts = [
        ("Time to first token", _curve(measured.ttft, measured.slo.ttft_s)),
        ("Time per output token", _curve(measured.tpot, measured.slo.tpot_s)),
        ("Share of the time that each worker computed", _bars(outcome)),
    ]
    body = "".join(f"<section><h2>{name}</h2>{picture}</section>" for name, picture in parts)
    summary = (
        f"{measured.requests:,} requests, {measured.attainment:.1%} within both SLOs, "
        f"{outcome.hit_rate:.1%} of prompt tokens cached."
    )
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{_STYLE}</style><h1>{html.escape(title)}</h1><p>{summary}</p><main>{body}</main>"
        "</html>\n"
    )


def _curve(latencies: Latencies, slo_s: float) -> str:
    """Share of requests at most that slow, over a logarithmic axis."""
    points = latencies.curve()
    if not points:
        return "<p>Nothing was measured.</p>"
    low = math.floor(math.log10(min(points[0][0], slo_s)))
    high = max(low + 1, math.ceil(math.log10(max(points[-1][0], slo_s))))

    def x(seconds: float) -> float:
        return _LEFT + (math.log10(seconds) - low) / (high - low) * (_WIDTH - _LEFT)

    def y(share: float) -> float:
        return (1 - share) * (_HEIGHT - _BOTTOM) + 4

    marks = "".join(
        f'<line class="axis" x1="{x(10.0**power):.1f}" y1="{y(1):.1f}" x2="{x(10.0**power):.1f}" '
        f'y2="{y(0):.1f}"/><text x="{x(10.0**power):.1f}" y="{_HEIGHT - 12}" '
        f'text-anchor="middle">{_time(10.0**power)}</text>'
        for power in range(low, high + 1)
    )
    marks += "".join(
        f'<line class="axis" x1="{_LEFT}" y1="{y(share):.1f}" x2="{_WIDTH}" y2="{y(share):.1f}"/>'
        f'<text x="{_LEFT - 6}" y="{y(share) + 4:.1f}" text-anchor="end">{share:.0%}</text>'
        for share in (0, 0.25, 0.5, 0.75, 0.9, 1)
    )
    path = " ".join(f"{x(seconds):.1f},{y(share):.1f}" for seconds, share in points)
    at = x(slo_s)
    slo = (
        f'<line class="slo" x1="{at:.1f}" y1="{y(1):.1f}" x2="{at:.1f}" y2="{y(0):.1f}"/>'
        f'<text x="{at:.1f}" y="{_HEIGHT - 24}" text-anchor="end">SLO </text>'
    )
    return _svg(f'{marks}<polyline class="curve" points="{path}"/>{slo}', _HEIGHT)


def _bars(outcome: Outcome) -> str:
    rows = []
    for number, (worker, share) in enumerate(outcome.busy.items()):
        top = 18 * number
        rows.append(
            f'<text x="92" y="{top + 13}" text-anchor="end">{html.escape(worker)}</text>'
            f'<rect class="bar" x="100" y="{top + 3}" width="{share * 400:.1f}" height="12"/>'
            f'<text x="{106 + share * 400:.1f}" y="{top + 13}">{share:.0%}</text>'
        )
    return _svg("".join(rows), 18 * len(rows))


def _svg(content: str, height: int) -> str:
    return (
        f'<svg width="{_WIDTH}" height="{height}" viewBox="0 0 {_WIDTH} {height}">{content}</svg>'
    )


def _time(seconds: float) -> str:
    return f"{seconds:g} s" if seconds >= 1 else f"{seconds * 1e3:g} ms"
