"""How far simulated runs are: a bar on standard error, on a terminal only, with an estimate."""

from __future__ import annotations

from collections.abc import Iterator
from types import TracebackType
from typing import Final, Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from simulator.traces import TracedRequest

_PARTS: Final = 100
"""Of a run, in which it moves."""


class Bar:
    """Of several runs of the same requests; can be entered again."""

    def __init__(self, console: Console) -> None:
        self._ended_runs = 0
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TextColumn("about"),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task("", total=None)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def begin(self, text: str, runs_after: int) -> None:
        """A run begins; at most so many will follow it."""
        self._progress.update(self._task, description=text, total=self._ended_runs + 1 + runs_after)

    def watched(self, requests: Iterator[TracedRequest], count: int) -> Iterator[TracedRequest]:
        """The run's requests, while the bar moves."""
        part = max(1, count // _PARTS)
        for number, request in enumerate(requests):
            if number % part == 0:
                self._progress.update(self._task, completed=self._ended_runs + number / count)
            yield request

    def end(self) -> None:
        """The run is over."""
        self._ended_runs += 1
        self._progress.update(self._task, completed=self._ended_runs)
