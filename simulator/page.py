"""A report as one HTML file that needs nothing else."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Final

from simulator.figures import WIDTH, Anchor, Figure, Point, Stroke

_STYLE: Final = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 76rem; padding: 0 1rem;
  color: #1b1f24; background: #fff }
h1 { font-size: 1.4rem } h2 { font-size: 1.05rem; margin: 1.5rem 0 .3rem }
main { display: flex; flex-wrap: wrap; gap: 2rem }
svg text { font-size: 12px; fill: #57606a } polyline { fill: none; stroke-width: 1 }
.curve { stroke: #0b5cad; stroke-width: 2 } .axis { stroke: #d0d7de }
.limit { stroke: #b42318; stroke-dasharray: 4 3 } .bar { fill: #0b5cad }
@media (prefers-color-scheme: dark) { body { color: #e6edf3; background: #0d1117 }
  svg text { fill: #9198a1 } .curve { stroke: #58a6ff } .bar { fill: #58a6ff }
  .axis { stroke: #3d444d } }
"""


def render(title: str, summary: str, figures: Sequence[Figure]) -> str:
    """The page."""
    body = "".join(
        f"<section><h2>{html.escape(figure.title)}</h2>{_svg(figure)}</section>"
        for figure in figures
    )
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{_STYLE}</style><h1>{html.escape(title)}</h1><p>{html.escape(summary)}</p>"
        f"<main>{body}</main></html>\n"
    )


def _svg(figure: Figure) -> str:
    canvas = _Svg()
    figure.draw(canvas)
    size = f'width="{WIDTH}" height="{figure.height}" viewBox="0 0 {WIDTH} {figure.height}"'
    return f"<svg {size}>{''.join(canvas.parts)}</svg>"


class _Svg:
    """A `figures.Canvas`."""

    def __init__(self) -> None:
        self.parts: list[str] = []

    def line(self, points: Sequence[Point], stroke: Stroke) -> None:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        self.parts.append(f'<polyline class="{stroke}" points="{path}"/>')

    def bar(self, x: float, y: float, width: float, height: float) -> None:
        self.parts.append(
            f'<rect class="bar" x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}"/>'
        )

    def text(self, x: float, y: float, text: str, anchor: Anchor) -> None:
        self.parts.append(
            f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{html.escape(text)}</text>'
        )
