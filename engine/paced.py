"""A call that is made soon after it is wanted, and not too often."""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class Paced:
    """Calls `act` once for all that wanted it, at most once in an interval. For one event loop."""

    def __init__(self, act: Callable[[], None], interval_s: float) -> None:
        self._act = act
        self._interval_s = interval_s
        self._timer: asyncio.TimerHandle | None = None
        self._next_s = 0.0

    def want(self) -> None:
        """At once if the last call was long enough ago, else as soon as it is."""
        if self._timer is None:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_at(max(loop.time(), self._next_s), self._fire)

    def stop(self) -> None:
        """What is wanted now is not done any more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _fire(self) -> None:
        self._timer = None
        self._next_s = asyncio.get_running_loop().time() + self._interval_s
        self._act()
