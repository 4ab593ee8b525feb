"""How sure the gate must be: as sure as it takes for few of those that it lets in to be late.

How far predictions are off, and which way, depends on the load, and their spread says it badly: at
a load that an engine carries well most of those that are refused for a wide margin would have been
in time. So the margin follows what becomes of those that are let in: with each that is late it
grows, and with each that is not it shrinks by so much less that it stands still when the promised
share is late. That is adaptive conformal inference (Gibbs and Candes, arXiv 2106.00170, equation 2)
with spreads in the place of quantiles: whatever the predictions are worth, over a long time the
share that is late comes to what was asked for, as long as a margin within the limits can do it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

LATE_SHARE: Final = 0.005
"""Of those that were let in and that a wider margin would have kept out, for each of the two
latencies."""
STEP: Final = 0.05
"""By how many spreads a late one widens the margin."""
FIRST: Final = 0.5
LEAST: Final = 0.0
"""Of normal priority, who is more likely late than not is never let in."""
MOST: Final = 2.5


@dataclass(slots=True)
class Caution:
    """For one latency."""

    spreads: float = FIRST
    """By how many of its spreads a prediction must stay below what was promised."""

    def observe(self, late: bool) -> None:
        """What became of one that was let in is known."""
        spreads = self.spreads + STEP * (late - LATE_SHARE)
        self.spreads = min(MOST, max(LEAST, spreads))
