"""By how much a prediction must stay below what was promised, as all routers together have seen it:
pure.

Each router learns from its own requests and tells what it has learned; what holds at each is the
mean, weighted by how much each has seen lately. Else a router that begins, or has little to do,
while others have learned that predictions are too long would let in hardly anything, and hardly
anything is what it would learn from (docs/adr/0009).
"""

from __future__ import annotations

import math
from typing import Final, NamedTuple

from engine.learned_times import Factor
from router.core.caution import Caution

FADES_S: Final = 60.0
"""What was seen so long ago weighs 1/e of what is seen now."""
LEAST_SEEN: Final = 0.01
"""Who has seen less than that of late says nothing."""


class LearnedMargin(NamedTuple):
    """What one router has learned of one latency."""

    seen: float = 0.0
    """Predictions that were held against what came of them; those of long ago count for less."""
    log_mean: float = 0.0
    log_variance: float = 0.0
    """Of measured over predicted, see `Factor`."""
    caution_spreads: float = 0.0


class Learned(NamedTuple):
    """What one router has learned."""

    ttft: LearnedMargin
    tpot: LearnedMargin


class Known(NamedTuple):
    """What holds at a moment."""

    factor: float
    """Measured over predicted, the median."""
    spread: float
    caution_spreads: float

    def times(self, surer: float) -> float:
        """What a prediction is multiplied with; `surer`: by how many spreads more than usual."""
        return self.factor * math.exp((surer + self.caution_spreads) * self.spread)


class _Heard(NamedTuple):
    at_s: float
    learned: LearnedMargin


class SharedMargin:
    """Of one latency."""

    def __init__(self, newest_weight: float) -> None:
        self.factor = Factor(newest_weight=newest_weight)
        self.caution = Caution()
        """What this router has learned itself."""
        self._seen = 0.0
        self._seen_s = 0.0
        self._others: dict[str, _Heard] = {}
        """By router."""

    def observe(self, now_s: float, measured_s: float, predicted_s: float, *, used: float) -> None:
        """Take one pair in: see `Factor.observe`."""
        before = self.factor.observations
        self.factor.observe(measured_s, predicted_s, used=used)
        if self.factor.observations > before:
            self._seen = self._faded(now_s) + 1.0
            self._seen_s = now_s

    def hear(self, now_s: float, router_id: str, learned: LearnedMargin) -> None:
        """Take what another router has learned, instead of what it said before."""
        self._others[router_id] = _Heard(now_s, learned)
        for other, heard in list(self._others.items()):
            if _fade(heard.learned.seen, now_s - heard.at_s) < LEAST_SEEN:
                del self._others[other]

    def learned(self, now_s: float) -> LearnedMargin:
        """What others are told."""
        factor = self.factor
        return LearnedMargin(
            self._faded(now_s), factor.log_mean, factor.log_variance, self.caution.spreads
        )

    def known(self, now_s: float) -> Known:
        """What holds now."""
        if self._others:
            said = [(self._faded(now_s), self.learned(now_s))]
            said += [
                (_fade(heard.learned.seen, now_s - heard.at_s), heard.learned)
                for heard in self._others.values()
            ]
            seen = sum(weight for weight, _ in said)
            if seen >= LEAST_SEEN:
                log_mean = sum(weight * each.log_mean for weight, each in said) / seen
                log_variance = sum(weight * each.log_variance for weight, each in said) / seen
                caution = sum(weight * each.caution_spreads for weight, each in said) / seen
                return Known(math.exp(log_mean), math.sqrt(log_variance), caution)
        return Known(self.factor.value, self.factor.spread, self.caution.spreads)

    def _faded(self, now_s: float) -> float:
        return _fade(self._seen, now_s - self._seen_s)


def _fade(seen: float, for_s: float) -> float:
    return seen * math.exp(-for_s / FADES_S)
