"""By how much a prediction must stay below what was promised, as all routers together have seen it:
pure.

Each router learns from its own requests and tells what it has learned; what holds at each is the
mean, weighted by how much each has seen lately. Else a router that begins, or has little to do,
while others have learned that predictions are too long would let in hardly anything, and hardly
anything is what it would learn from (docs/adr/0009).
"""

from __future__ import annotations

import math
from operator import mul
from typing import Final, NamedTuple

from engine.learned_times import Factor
from router.core.caution import Caution

FADES_S: Final = 60.0
"""What was seen so long ago weighs 1/e of what is seen now."""
LEAST_SHARE: Final = 0.001
"""A word that weighs less of all words is dropped."""
BEGAN_ANEW: Final = 0.5
"""A router that says to have seen less than such a share of what it said before has begun anew."""


class LearnedMargin(NamedTuple):
    """What one router has learned of one latency."""

    seen: float = 0.0
    """Predictions that were held against what came of them; those of long ago count for less."""
    log_mean: float = 0.0
    log_variance: float = 0.0
    """Of measured over predicted, see `Factor`."""
    judged: float = 0.0
    """Requests that were late or were not, counted as those seen are."""
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


class _Count:
    """How much there was, what was long ago faded."""

    def __init__(self) -> None:
        self._count = 0.0
        self._at_s = 0.0

    def add(self, now_s: float) -> None:
        self._count = self.faded(now_s) + 1.0
        self._at_s = now_s

    def faded(self, now_s: float) -> float:
        return self._count * _fade(now_s - self._at_s)


class _Heard(NamedTuple):
    at_s: float
    learned: LearnedMargin

    def faded(self, now_s: float) -> LearnedMargin:
        fade, said = _fade(now_s - self.at_s), self.learned
        return said._replace(seen=fade * said.seen, judged=fade * said.judged)


class SharedMargin:
    """Of one latency."""

    def __init__(self, newest_weight: float) -> None:
        self.factor = Factor(newest_weight=newest_weight)
        self.caution = Caution()
        """What this router has learned itself."""
        self.news = 0
        """How often it has learned something."""
        self._seen, self._judged = _Count(), _Count()
        self._others: dict[str, _Heard] = {}
        """By router."""
        self._former: dict[str, _Heard] = {}
        """What routers said before they began anew."""

    def observe(self, now_s: float, measured_s: float, predicted_s: float, *, used: float) -> None:
        """Take one pair in: see `Factor.observe`."""
        before = self.factor.observations
        self.factor.observe(measured_s, predicted_s, used=used)
        if self.factor.observations > before:
            self._seen.add(now_s)
            self.news += 1

    def judge(self, now_s: float, *, late: bool) -> None:
        """What became of one that was let in is known."""
        self.caution.observe(late)
        self._judged.add(now_s)
        self.news += 1

    def hear(self, now_s: float, router_id: str, learned: LearnedMargin, age_s: float) -> None:
        """Take what another router has learned, and said so long ago, instead of what it said
        before."""
        heard, before = _Heard(now_s - age_s, learned), self._others.get(router_id)
        if before is not None:
            if heard.at_s < before.at_s:
                return  # Another worker was told it earlier.
            if _has_begun_anew(before.faded(now_s), heard.faded(now_s)):
                self._former[router_id] = before
        self._others[router_id] = heard
        words = [self.learned(now_s), *self._said(now_s)]
        least_seen = LEAST_SHARE * sum(each.seen for each in words)
        least_judged = LEAST_SHARE * sum(each.judged for each in words)
        for said in (self._others, self._former):
            for other, word in list(said.items()):
                faded = word.faded(now_s)
                if faded.seen < least_seen and faded.judged < least_judged:
                    del said[other]

    def learned(self, now_s: float) -> LearnedMargin:
        """What others are told."""
        return LearnedMargin(
            self._seen.faded(now_s), self.factor.log_mean, self.factor.log_variance,
            self._judged.faded(now_s), self.caution.spreads,
        )  # fmt: skip

    def known(self, now_s: float) -> Known:
        """What holds now."""
        if not self._others:
            return Known(self.factor.value, self.factor.spread, self.caution.spreads)
        words = [self.learned(now_s), *self._said(now_s)]
        factor, spread, caution = self.factor.value, self.factor.spread, self.caution.spreads
        if seen := sum(each.seen for each in words):
            mean = sum(each.seen * each.log_mean for each in words) / seen
            # About the mean of all: of who disagrees nobody is sure.
            squares = ((each.log_mean - mean) ** 2 + each.log_variance for each in words)
            variance = sum(map(mul, (each.seen for each in words), squares)) / seen
            factor, spread = math.exp(mean), math.sqrt(variance)
        if judged := sum(each.judged for each in words):
            caution = sum(each.judged * each.caution_spreads for each in words) / judged
        return Known(factor, spread, caution)

    def _said(self, now_s: float) -> list[LearnedMargin]:
        said = (*self._others.values(), *self._former.values())
        return [each.faded(now_s) for each in said]


def _has_begun_anew(before: LearnedMargin, now: LearnedMargin) -> bool:
    return now.seen < BEGAN_ANEW * before.seen or now.judged < BEGAN_ANEW * before.judged


def _fade(for_s: float) -> float:
    return math.exp(-for_s / FADES_S)
