"""The engine model corrected by what engines do: pure, and it knows its own error.

A profile says how a time depends on the work; the engines at hand say by what factor it is off.
It is tracked as exponentially weighted mean and variance of its logarithm (West 1979, the
incremental form), so that a time twice too long and one half too short weigh the same, and a
prediction's spread is a factor too. Where measurements come late, the factor has moved on from what
it was when their predictions were made: what those were off by is what the spread then is of, as an
exponentially weighted mean square.

What a time may cost grows with its square, and a spread makes squares dearer than the median's. If
ln x is normal with mean ln m and standard deviation s, then ln x^2 is normal with mean 2 ln m and
standard deviation 2 s; a lognormal's mean is e to (mean + variance / 2) (Johnson, Kotz and
Balakrishnan, Continuous Univariate Distributions 1, chapter 14), so E[x] = m exp(s^2 / 2) and
E[x^2] = m^2 exp(2 s^2).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Final

WEIGHT: Final = 0.05
"""Of the newest observation, once there have been some, unless a factor is told another."""
PROFILE_WEIGHT: Final = 0.25
"""What the profile counts for, against observations that say all: so little that a wrong one is
left behind at once, and enough that one which says little does not replace it."""
FIRST_SPREAD: Final = 0.2
"""Of a factor of which nothing was seen: the profile's own error (benchmarks/results)."""
LARGEST_VARIANCE: Final = 0.5
"""Of a logarithm, as it is used: what is spread wider shows that the model lacks something."""
LARGEST_FACTOR: Final = 1000.0
"""What is further off is taken for that: a CPU is about 1,000 times slower than a GPU."""


@dataclass(slots=True)
class Factor:
    """Measured over predicted."""

    observations: int = 0
    log_mean: float = 0.0
    log_variance: float = FIRST_SPREAD * FIRST_SPREAD
    _weight: float = PROFILE_WEIGHT
    """Of all that was seen, the older the less."""
    newest_weight: float = WEIGHT

    @property
    def value(self) -> float:
        """The median."""
        return math.exp(self.log_mean)

    @property
    def spread(self) -> float:
        """Of the logarithm, its standard deviation, or how far predictions were off: 0.1 is about
        10 %."""
        return math.sqrt(self.log_variance)

    @property
    def mean(self) -> float:
        """E[x]: see the module."""
        return self.value * math.exp(min(self.log_variance, LARGEST_VARIANCE) / 2)

    @property
    def square_over_median(self) -> float:
        """E[x^2] over the square of the median: see the module."""
        return math.exp(2 * min(self.log_variance, LARGEST_VARIANCE))

    def observe(
        self, measured_s: float, predicted_s: float, weight: float = 1.0, used: float | None = None
    ) -> None:
        """Take one pair in; both above 0, else it says nothing. It counts by its weight, from 0 to
        1: how much of what was measured is what was predicted. `used`: the median when that was
        predicted, where that is some time ago."""
        if measured_s <= 0 or predicted_s <= 0 or weight <= 0:
            return
        ratio = min(max(measured_s / predicted_s, 1 / LARGEST_FACTOR), LARGEST_FACTOR)
        error = math.log(ratio) - self.log_mean
        first = not self.observations
        self.observations += 1
        # The first ones count as in a plain mean.
        self._weight = min(self._weight + min(1.0, weight), 1 / self.newest_weight)
        part = min(1.0, weight) / self._weight
        self.log_mean += part * error
        if first:
            return  # It tells how far off the profile is, and nothing of a spread.
        if used is None:
            self.log_variance = (1 - part) * (self.log_variance + part * error * error)
        else:
            off = math.log(ratio / used)
            self.log_variance += part * (off * off - self.log_variance)


@dataclass(slots=True)
class LearnedTimes:
    """What is learned of all workers' engines, which are alike."""

    prefill: Factor = field(default_factory=Factor)
    """Of the time that prompts' tokens take, beside that of the steps that compute them."""
    step: Factor = field(default_factory=Factor)
    """Of steps that decode."""
    transfer: Factor = field(default_factory=Factor)
    """Of the time from a hand-off until the request is in a step."""
    first_token: Factor = field(default_factory=Factor)
    """Of whole times to the first token, as predicted with the others: its spread says how far to
    trust them. Single prompts' is no measure of it, for a queue's errors even out."""
