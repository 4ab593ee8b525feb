"""What a run gave its clients: latencies, and how many requests got what was promised.

Memory is the same for any number of requests: latencies are counted in bins 2 % wide.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from typing import Final

from router.core.costs import Slo
from router.core.events import End, Ended

_BIN: Final = math.log(1.02)
_LEAST_S: Final = 1e-5


@dataclass(slots=True)
class Latencies:
    """A distribution of seconds."""

    count: int = 0
    sum_s: float = 0.0
    _bins: Counter[int] = field(default_factory=Counter)

    def observe(self, value_s: float) -> None:
        """Count one."""
        self.count += 1
        self.sum_s += value_s
        self._bins[round(math.log(max(value_s, _LEAST_S)) / _BIN)] += 1

    @property
    def mean_s(self) -> float:
        return self.sum_s / self.count if self.count else math.nan

    def quantile_s(self, share: float) -> float:
        """The value that this share is at most, to 1 %."""
        left = share * self.count
        for number in sorted(self._bins):
            left -= self._bins[number]
            if left <= 0:
                return math.exp(number * _BIN)
        return math.nan

    def curve(self) -> list[tuple[float, float]]:
        """(seconds, share at most that), ascending."""
        points, below = [], 0
        for number in sorted(self._bins):
            below += self._bins[number]
            points.append((math.exp(number * _BIN), below / self.count))
        return points


@dataclass(slots=True)
class Measurement:
    """Of all requests of a run. One that failed, or was refused, was not served as promised."""

    slo: Slo
    ttft: Latencies = field(default_factory=Latencies)
    tpot: Latencies = field(default_factory=Latencies)
    requests: int = 0
    good: int = 0
    failed: int = 0
    output_tokens: int = 0

    def observe(self, ended: Ended) -> None:
        """Count a request; one of a single token has no time between tokens."""
        self.requests += 1
        self.output_tokens += ended.output_tokens
        ttft_s, tpot_s = ended.time_to_first_token_s, ended.time_per_output_token_s
        if ended.end is not End.COMPLETE or ttft_s is None:
            self.failed += 1
            return
        self.ttft.observe(ttft_s)
        if tpot_s is not None:
            self.tpot.observe(tpot_s)
        self.good += ttft_s <= self.slo.ttft_s and (tpot_s is None or tpot_s <= self.slo.tpot_s)

    @property
    def attainment(self) -> float:
        """The share of requests that were served as promised."""
        return self.good / self.requests if self.requests else math.nan
