"""How often prompts come, and how long they take. Pure.

What a prompt's time is worth depends on how many come after it. Exponentially averaged over a
window.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(slots=True)
class Arrivals:
    """Of one router."""

    window_s: float
    mean_s: float = 0.0
    """Of a worker's time, that a prompt takes."""
    _count: float = 0.0
    _work_s: float = 0.0
    _at_s: float = 0.0
    _began_s: float | None = None

    def add(self, now_s: float, occupies_s: float) -> None:
        """A prompt was placed that delays what comes after it by so much."""
        if self._began_s is None:
            self._began_s = self._at_s = now_s
        decay = math.exp((self._at_s - now_s) / self.window_s)
        self._count = self._count * decay + 1
        self._work_s = self._work_s * decay + occupies_s
        self._at_s = now_s
        self.mean_s = self._work_s / self._count

    def rate_rps(self, now_s: float) -> float | None:
        """Prompts per second; None while there has been less than a window: a cluster that has just
        begun to serve may get any number."""
        if self._began_s is None or (seen_s := now_s - self._began_s) < self.window_s:
            return None
        count = self._count * math.exp((self._at_s - now_s) / self.window_s)
        # Of what was before, nothing came.
        return count / (self.window_s * -math.expm1(-seen_s / self.window_s))
