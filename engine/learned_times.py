"""The engine model corrected by what engines do: pure, and it knows its own error.

A profile says how a time depends on the work; the engines at hand say by what factor it is off.
It is tracked as exponentially weighted mean and variance of its logarithm (West 1979, the
incremental form), so that a time twice too long and one half too short weigh the same, and a
prediction's spread is a factor too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

WEIGHT: Final = 0.05
"""Of the newest observation, once there have been some."""
FIRST_SPREAD: Final = 0.2
"""Of a factor of which nothing was seen: the profile's own error (benchmarks/results)."""
LARGEST_FACTOR: Final = 1000.0
"""What is further off is taken for that: a CPU is about 1,000 times slower than a GPU."""


@dataclass(slots=True)
class Factor:
    """Measured over predicted."""

    observations: int = 0
    log_mean: float = 0.0
    log_variance: float = FIRST_SPREAD * FIRST_SPREAD

    @property
    def value(self) -> float:
        """The median."""
        return math.exp(self.log_mean)

    @property
    def spread(self) -> float:
        """Standard deviation of the logarithm: 0.1 is about 10 %."""
        return math.sqrt(self.log_variance)

    def observe(self, measured_s: float, predicted_s: float) -> None:
        """Take one pair in; both above 0, else it says nothing."""
        if measured_s <= 0 or predicted_s <= 0:
            return
        ratio = min(max(measured_s / predicted_s, 1 / LARGEST_FACTOR), LARGEST_FACTOR)
        error = math.log(ratio) - self.log_mean
        self.observations += 1
        # The first ones count as in a plain mean, so that a wrong profile is left behind at once.
        weight = max(WEIGHT, 1 / (self.observations + 1)) if self.observations > 1 else 1.0
        self.log_mean += weight * error
        if self.observations > 1:
            self.log_variance = (1 - weight) * (self.log_variance + weight * error * error)
