"""The bar: on a terminal only, and as far as the runs are."""

from __future__ import annotations

import io

from rich.console import Console

from simulator.progress import Bar
from simulator.traces import TracedRequest

REQUESTS = [TracedRequest(float(number), 10, 1) for number in range(200)]


def shown(terminal: bool) -> str:
    """What two runs of four print, the second half-way."""
    file = io.StringIO()
    bar = Bar(Console(file=file, force_terminal=terminal, width=100))
    with bar:
        bar.begin("the first", 3)
        assert list(bar.watched(iter(REQUESTS), 200)) == REQUESTS
        bar.end()
        bar.begin("the second", 2)
        half = bar.watched(iter(REQUESTS), 200)
        assert [next(half) for _ in range(101)] == REQUESTS[:101]
    return file.getvalue()


def test_a_terminal_sees_how_far_it_is() -> None:
    told = shown(terminal=True)
    assert "the second" in told
    assert "38%" in told  # 1.5 of 4.


def test_nothing_else_sees_it() -> None:
    assert shown(terminal=False).strip() == ""
