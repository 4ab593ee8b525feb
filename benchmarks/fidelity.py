"""How far a simulation is from what it simulates: the same requests, seen by clients of both.

Pure. Runs come in pairs, live and simulated, and a pair gives one difference of each measure.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

from benchmarks.report import table


@dataclass(frozen=True, slots=True)
class Seen:
    """What clients saw in one run."""

    ttft_s: Sequence[float]
    tpot_s: Sequence[float]
    """Of requests with more than one token."""
    hit_rate: float
    """The share of prompt tokens that were cached where their prompts were computed."""


class Pair(NamedTuple):
    """One workload, served twice."""

    live: Seen
    simulated: Seen


class Bounds(NamedTuple):
    """By how much the simulation may be off."""

    share: float
    """Of the live times."""
    points: float
    """Of the hit rate, in percent."""


@dataclass(frozen=True, slots=True)
class Compared:
    """One measure over all pairs."""

    name: str
    unit: str
    live: list[float]
    simulated: list[float]
    bound: float
    """Of the difference; in percent, or points where the unit is percent."""

    @property
    def differences(self) -> list[float]:
        """Of each pair: simulated against live, in percent, or points where the unit is that."""
        pairs = zip(self.live, self.simulated, strict=True)
        if self.unit == "%":
            return [simulated - live for live, simulated in pairs]
        return [100 * (simulated / live - 1) for live, simulated in pairs]

    @property
    def difference(self) -> float:
        """The median over the pairs."""
        return statistics.median(self.differences)

    @property
    def within(self) -> bool:
        return abs(self.difference) <= self.bound


def p90(values: Sequence[float]) -> float:
    """The value that nine of ten are at most."""
    return statistics.quantiles(values, n=10, method="inclusive")[-1]


_TIMES: Final[dict[str, Callable[[Seen], float]]] = {
    "TTFT, mean": lambda seen: statistics.fmean(seen.ttft_s),
    "TTFT, p90": lambda seen: p90(seen.ttft_s),
    "TPOT, mean": lambda seen: statistics.fmean(seen.tpot_s),
    "TPOT, p90": lambda seen: p90(seen.tpot_s),
}


def compare(pairs: Sequence[Pair], bounds: Bounds) -> list[Compared]:
    """All measures."""

    def compared(
        name: str, unit: str, of: Callable[[Seen], float], scale: float, bound: float
    ) -> Compared:
        live = [scale * of(pair.live) for pair in pairs]
        return Compared(name, unit, live, [scale * of(pair.simulated) for pair in pairs], bound)

    share, points = 100 * bounds.share, bounds.points
    times = [compared(name, "ms", of, 1e3, share) for name, of in _TIMES.items()]
    return [*times, compared("hit rate", "%", lambda seen: seen.hit_rate, 100, points)]


def compared_table(compared: Sequence[Compared]) -> str:
    """Markdown: medians over the pairs, with their spread."""
    rows = []
    for each in compared:
        unit = " points" if each.unit == "%" else " %"
        rows.append(
            (
                f"{each.name}, {each.unit}",
                _spread(each.live),
                _spread(each.simulated),
                _spread(each.differences, "+") + unit,
                f"{each.bound:g}{unit}",
                "met" if each.within else "**missed**",
            )
        )
    return table(("measure", "live", "simulated", "difference", "bound", "verdict"), rows)


def _spread(values: Sequence[float], sign: str = "") -> str:
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle:{sign}.1f} ({low:{sign}.1f} to {high:{sign}.1f})"
