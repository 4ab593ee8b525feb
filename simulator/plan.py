"""The cheapest layout that serves a workload as promised, found by serving it on simulated ones.

As DistServe (Zhong et al., OSDI'24) plans: candidates are simulated, and the rate is met with the
fewest GPUs. It divides the wanted rate by one engine pair's goodput; here whole clusters are
simulated, since placement and prefix caches do not add up that way.

Three things are assumed, so that few runs decide: what some engines serve, more engines serve too;
a pool that is short of engines makes its own latency miss its SLO first; and splits of a number of
GPUs need no more than that to be compared. Boundary: which layouts are tried, in which order, and
which is best; `serve` runs them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product

from engine.profiles import EngineProfile
from simulator.cluster import Layout
from simulator.experiment import Outcome
from simulator.measure import Latencies


@dataclass(frozen=True, slots=True)
class Goal:
    """How many requests are to be served as promised."""

    attainment: float
    """The share of them."""
    requests: int

    @property
    def misses_allowed(self) -> int:
        return math.floor(self.requests * (1 - self.attainment) + 1e-9)


@dataclass(frozen=True, slots=True)
class Trial:
    """A layout that was simulated."""

    layout: Layout
    goal: Goal
    outcome: Outcome

    @property
    def gpus(self) -> int:
        return self.layout.gpus

    @property
    def whole(self) -> bool:
        """Not left before its end, as runs are that miss too many."""
        return self.outcome.measured.requests == self.goal.requests

    @property
    def meets(self) -> bool:
        """Enough requests were served as promised."""
        missed = self.outcome.measured.requests - self.outcome.measured.good
        return self.whole and missed <= self.goal.misses_allowed

    @property
    def ttft_share(self) -> float:
        """Of the TTFT that is promised: what so many requests take at most."""
        measured = self.outcome.measured
        return _share(measured.ttft, self.goal.attainment, measured.slo.ttft_s, nothing=math.inf)

    @property
    def tpot_share(self) -> float:
        """The same of TPOT."""
        measured = self.outcome.measured
        return _share(measured.tpot, self.goal.attainment, measured.slo.tpot_s, nothing=0.0)

    @property
    def worse_share(self) -> float:
        """By which layouts of as many GPUs are compared."""
        return max(self.ttft_share, self.tpot_share)


def _share(latencies: Latencies, quantile: float, slo_s: float, nothing: float) -> float:
    return latencies.quantile_s(quantile) / slo_s if latencies.count else nothing


@dataclass(frozen=True, slots=True)
class Plan:
    """What was tried, in order, and what is best of it."""

    tried: tuple[Trial, ...]
    chosen: Trial
    """The cheapest that meets the SLOs; if none does, the one that served the most requests as
    promised."""


Serve = Callable[[Layout, bool, int], Trial]
"""Simulate a layout; to its end even if it misses too many; at most so many runs will follow."""


@dataclass(frozen=True, slots=True)
class Kind:
    """Layouts whose pools' engines have these degrees of tensor parallelism; colocated ones too, if
    it is the same."""

    prefill: EngineProfile
    decode: EngineProfile

    @property
    def unit_gpus(self) -> int:
        """Layouts of one size differ from those of the next by so many GPUs."""
        return min(self.prefill.gpus, self.decode.gpus)

    @property
    def is_alike(self) -> bool:
        """Both pools' engines are the same."""
        return self.prefill == self.decode

    @property
    def least_gpus(self) -> int:
        """Of any of its layouts."""
        return self.unit_gpus if self.is_alike else self.prefill.gpus + self.decode.gpus

    def splits(self, units: int) -> list[Layout]:
        """Of just so many GPUs, those with the fewest prefill engines first."""
        gpus, own = units * self.unit_gpus, None if self.is_alike else self.prefill
        found = []
        for prefill in range(1, gpus // self.prefill.gpus + 1):
            decode, rest = divmod(gpus - prefill * self.prefill.gpus, self.decode.gpus)
            if decode and not rest:
                found.append(Layout(self.decode, prefill, decode, prefill_profile=own))
        return found

    def most_trials(self, units: int) -> int:
        """Of layouts of a size: a bisection of the splits, and the colocated one."""
        return self.is_alike + len(self.splits(units)).bit_length()

    def most_runs(self, units: int) -> int:
        """That the search for the fewest GPUs takes, of at most so many."""
        return (1 + (units - 1).bit_length()) * self.most_trials(units) if units else 0


def kinds(prefill: Sequence[EngineProfile], decode: Sequence[EngineProfile]) -> list[Kind]:
    """Of a model's degrees of tensor parallelism, those that either pool's engines may have: what
    they make, alike pools first, and fewer GPUs an engine. A hand-off needs one degree to be a
    multiple of the other, and so does `Kind.unit_gpus`."""
    pairs = sorted(
        product(prefill, decode),
        key=lambda pair: (pair[0] != pair[1], pair[0].gpus, pair[1].gpus),
    )
    return [Kind(*pair) for pair in pairs if _divides(pair[0].gpus, pair[1].gpus)]


def _divides(first: int, second: int) -> bool:
    """One of them, no matter which, divides the other."""
    return max(first, second) % min(first, second) == 0


def plan(tried: Sequence[Kind], gpus: int, serve: Serve) -> Plan:
    """Of layouts of at most `gpus` GPUs, of these kinds; at least one of them fits."""
    return _Search(tried, gpus, serve).run()


class _Search:
    def __init__(self, tried: Sequence[Kind], gpus: int, serve: Serve) -> None:
        self._kinds = tried
        self._gpus = gpus
        """Worth trying: no more than the cheapest so far."""
        self._serve = serve
        self._tried: dict[Layout, Trial] = {}
        self._left = 0
        """Runs that follow those of the size that is being tried, at most."""

    def run(self) -> Plan:
        fewest: dict[Kind, int] = {}
        for number, kind in enumerate(self._kinds):
            later = self._kinds[number + 1 :]
            after = sum(each.most_runs(self._gpus // each.unit_gpus) for each in later)
            after += sum(each.most_trials(units) for each, units in fewest.items())
            units = self._fewest(kind, after)
            if units is not None:
                fewest[kind] = units
        cheapest = [each for each, units in fewest.items() if units * each.unit_gpus == self._gpus]
        for number, kind in enumerate(cheapest, 1):
            self._left = sum(each.most_trials(fewest[each]) for each in cheapest[number:])
            for _ in self._layouts(kind, fewest[kind]):
                pass
        tried = tuple(self._tried.values())
        meeting = [trial for trial in tried if trial.meets]
        if meeting:
            return Plan(tried, min(meeting, key=lambda each: (each.gpus, each.worse_share)))
        # Each was left after as many misses: the more it had served by then, the better.
        best = max(tried, key=lambda each: each.outcome.measured.good)
        whole = self._tried[best.layout] = self._serve(best.layout, True, 0)
        return Plan(tuple(self._tried.values()), whole)

    def _fewest(self, kind: Kind, after: int) -> int | None:
        """Units of GPUs that serve as promised, by bisection; the most first: if they don't, none
        do."""
        low, high = 0, self._gpus // kind.unit_gpus
        if not high:
            return None
        self._left = kind.most_runs(high) - kind.most_trials(high) + after
        if not self._does(kind, high):
            return None
        while high - low > 1:
            middle = (low + high) // 2
            sizes = (high - low - 1).bit_length()
            self._left = sizes * kind.most_trials(high) + after
            if self._does(kind, middle):
                high = middle
            else:
                low = middle
        self._gpus = high * kind.unit_gpus
        return high

    def _does(self, kind: Kind, units: int) -> bool:
        return any(trial.meets for trial in self._layouts(kind, units))

    def _layouts(self, kind: Kind, units: int) -> Iterator[Trial]:
        """Colocated; then split, with more engines for the pool whose latency is the worse."""
        left = kind.most_trials(units)
        if kind.is_alike:
            left -= 1
            yield self._try(Layout(kind.decode, 0, units), left)
        splits = kind.splits(units)
        low, high = 0, len(splits) - 1
        while low <= high:
            middle = (low + high) // 2
            left -= 1
            trial = self._try(splits[middle], left)
            yield trial
            if trial.ttft_share > trial.tpot_share:
                low = middle + 1
            else:
                high = middle - 1

    def _try(self, layout: Layout, left: int) -> Trial:
        trial = self._tried.get(layout)
        if trial is None:
            trial = self._tried[layout] = self._serve(layout, False, left + self._left)
        return trial
