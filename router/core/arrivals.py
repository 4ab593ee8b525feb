"""What keeps coming: how often, and how long its prompts take. Pure."""

from __future__ import annotations

import math
from typing import Final

WINDOW_S: Final = 10.0
"""Of what is longer ago, less than a third counts."""
LEAST_SEEN_S: Final = 1.0
"""A rate of less time than this says nothing."""
WEIGHT: Final = 0.02
"""Of the newest prompt's time."""


class Arrivals:
    """Of all requests that were placed, exponentially averaged."""

    def __init__(self) -> None:
        self.prefill_s = 0.0
        """Mean time of a prompt, once its turn has come."""
        self._seen = 0
        self._decayed = 0.0
        self._at_s = 0.0
        self._began_s = math.inf

    def observe(self, now_s: float, prefill_s: float) -> None:
        """One was placed."""
        self._seen += 1
        self.prefill_s += max(WEIGHT, 1 / self._seen) * (prefill_s - self.prefill_s)
        self._decayed = self._left(now_s) + 1
        self._at_s = now_s
        self._began_s = min(self._began_s, now_s)

    def per_s(self, now_s: float) -> float:
        """How many come per second."""
        seen_s = max(LEAST_SEEN_S, now_s - self._began_s)
        return self._left(now_s) / (WINDOW_S * -math.expm1(-seen_s / WINDOW_S))

    def _left(self, now_s: float) -> float:
        return self._decayed * math.exp((self._at_s - now_s) / WINDOW_S)
