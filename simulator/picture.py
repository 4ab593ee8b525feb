"""A report as a PNG file."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from PIL import Image, ImageDraw, ImageFont

from simulator.figures import WIDTH, Anchor, Figure, Point, Stroke

_SCALE: Final = 2
"""Pixels of the file for one of a figure's."""
_FINER: Final = 2
"""Drawn so many times larger, so that slanted lines come out smooth."""
_MARGIN: Final = 24
_TITLE: Final = 28
_INK: Final = "#57606a"
_STROKES: Final[dict[Stroke, tuple[str, float]]] = {
    "axis": ("#d0d7de", 1.0),
    "curve": ("#0b5cad", 2.0),
    "limit": ("#b42318", 1.0),
}
_DASH: Final = (4.0, 3.0)
_ANCHORS: Final[dict[Anchor, str]] = {"start": "ls", "middle": "ms", "end": "rs"}


def write(path: Path, title: str, summary: str, figures: Sequence[Figure]) -> None:
    """Two figures to a row."""
    rows = [figures[first : first + 2] for first in range(0, len(figures), 2)]
    heights = [_TITLE + max(figure.height for figure in row) + _MARGIN for row in rows]
    head = _MARGIN + 2 * _TITLE
    canvas = _Image(2 * WIDTH + 3 * _MARGIN, head + sum(heights))
    canvas.text(_MARGIN, _MARGIN + 16, title, "start", size=20, ink="#1b1f24")
    canvas.text(_MARGIN, _MARGIN + _TITLE + 12, summary, "start", size=13)
    top = head
    for row, height in zip(rows, heights, strict=True):
        for column, figure in enumerate(row):
            left = _MARGIN + column * (WIDTH + _MARGIN)
            canvas.move(left, top)
            canvas.text(0, 16, figure.title, "start", size=14, ink="#1b1f24")
            canvas.move(left, top + _TITLE)
            figure.draw(canvas)
        top += height
    canvas.save(path)


class _Image:
    """A `figures.Canvas` whose origin can be moved."""

    def __init__(self, width: int, height: int) -> None:
        self._size = (width * _SCALE, height * _SCALE)
        self._finer = _SCALE * _FINER
        self._image = Image.new("RGB", (width * self._finer, height * self._finer), "white")
        self._draw = ImageDraw.Draw(self._image)
        self.move(0, 0)

    def move(self, left: float, top: float) -> None:
        """What is drawn from now on is drawn from here."""
        self._left, self._top = left, top

    def save(self, path: Path) -> None:
        self._image.resize(self._size, Image.Resampling.LANCZOS).save(path, "PNG")

    def line(self, points: Sequence[Point], stroke: Stroke) -> None:
        ink, width = _STROKES[stroke]
        for part in _dashes(points) if stroke == "limit" else (points,):
            self._draw.line(
                [self._at(*point) for point in part], ink, round(width * self._finer), "curve"
            )

    def bar(self, x: float, y: float, width: float, height: float) -> None:
        corners = [self._at(x, y), self._at(x + width, y + height)]
        self._draw.rectangle(corners, _STROKES["curve"][0])

    def text(
        self, x: float, y: float, text: str, anchor: Anchor, size: int = 12, ink: str = _INK
    ) -> None:
        font = ImageFont.load_default(size * self._finer)
        self._draw.text(self._at(x, y), text, ink, font, _ANCHORS[anchor])

    def _at(self, x: float, y: float) -> Point:
        return (self._left + x) * self._finer, (self._top + y) * self._finer


def _dashes(points: Sequence[Point]) -> Iterator[tuple[Point, Point]]:
    """Of a line of two points."""
    (x, y), (end_x, end_y) = points
    length = math.hypot(end_x - x, end_y - y)
    across, down = (end_x - x) / length, (end_y - y) / length
    at = 0.0
    while at < length:
        end = min(at + _DASH[0], length)
        yield (x + at * across, y + at * down), (x + end * across, y + end * down)
        at += sum(_DASH)
