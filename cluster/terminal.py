"""What `baton serve` shows: stages that run side by side, how long each took, and lines.

On a terminal a spinner per stage; elsewhere plain lines. Everything else that libraries print
goes to a log file meanwhile.
"""

from __future__ import annotations

import io
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer as Buffer


class _Shown(io.FileIO):
    """A terminal may be closed, and a pipe's reader leave. That nothing can be shown any more must
    neither end what serves nor be in the way of its end."""

    def write(self, data: Buffer) -> int:
        try:
            return super().write(data)
        except OSError:
            return memoryview(data).nbytes


class Terminal:
    """Stages by key. Safe to call in any order: ending an unknown stage shows nothing."""

    def __init__(self) -> None:
        shown = io.TextIOWrapper(io.BufferedWriter(_Shown(os.dup(1), "w")))
        self._console = Console(file=shown, highlight=False, soft_wrap=True)
        self._began_s: dict[str, float] = {}
        self._texts: dict[str, str] = {}
        self._bars: dict[str, TaskID] = {}
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
            redirect_stdout=False,
            redirect_stderr=False,
        )

    @contextmanager
    def shown(self, log: Path) -> Iterator[None]:
        """Show stages while inside; what anyone else prints goes to `log`."""
        sys.stdout.flush()
        sys.stderr.flush()
        kept = [os.dup(1), os.dup(2)]
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        for target in (1, 2):
            os.dup2(descriptor, target)
        os.close(descriptor)
        self._progress.start()
        try:
            yield
        finally:
            self._progress.stop()
            sys.stdout.flush()
            sys.stderr.flush()
            for target, saved in zip((1, 2), kept, strict=True):
                os.dup2(saved, target)
                os.close(saved)

    def begin(self, key: str, text: str) -> None:
        """A stage begins."""
        self._began_s[key] = time.monotonic()
        self._texts[key] = text
        if self._console.is_terminal:
            self._bars[key] = self._progress.add_task(escape(text), total=None)
        else:
            self.line(f"  … {text}")

    def update(self, key: str, detail: str) -> None:
        """Something to add to a stage's line; shown on a terminal only."""
        if key in self._bars:
            self._progress.update(
                self._bars[key], description=escape(f"{self._texts[key]}: {detail}")
            )

    def done(self, key: str, detail: str = "") -> None:
        """A stage has succeeded."""
        if key in self._began_s:
            took_s = time.monotonic() - self._began_s[key]
            text = self._end(key) + (f": {detail}" if detail else "")
            self._console.print(f"  [green]✓[/green] {escape(text)} [dim]{took_s:.1f} s[/dim]")

    def failed(self, key: str, reason: str) -> None:
        """A stage has failed."""
        if key in self._began_s:
            self._console.print(f"  [red]✗[/red] {escape(self._end(key))}: {escape(reason)}")

    def line(self, text: str) -> None:
        """A line of its own."""
        self._console.print(escape(text))

    def clear(self) -> None:
        """Forget stages under way."""
        for key in list(self._began_s):
            self._end(key)

    def _end(self, key: str) -> str:
        del self._began_s[key]
        if key in self._bars:
            self._progress.remove_task(self._bars.pop(key))
        return self._texts.pop(key)
