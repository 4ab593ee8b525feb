"""The cheapest layout that serves a workload as promised, found by serving it on simulated ones.

As DistServe (Zhong et al., OSDI'24) plans: candidates are simulated, and the rate is met with the
fewest GPUs. It divides the wanted rate by one engine pair's goodput; here whole clusters are
simulated, since placement and prefix caches do not add up that way.

Three things are assumed, so that few runs decide: what some engines serve, more engines serve too;
a pool that is short of engines makes its own latency miss its SLO first; and splits of a number of
engines need no more than that to be compared. Boundary: which layouts are tried, in which order,
and which is best; `serve` runs them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

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
        return (self.layout.prefill + self.layout.decode) * self.layout.profile.gpus

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


def plan(profiles: Sequence[EngineProfile], gpus: int, serve: Serve) -> Plan:
    """Of colocated and split layouts of at most `gpus` GPUs; `profiles` are one model's degrees of
    tensor parallelism, of which at least one fits."""
    return _Search(sorted(profiles, key=lambda each: each.gpus), gpus, serve).run()


def most_runs(engines: int) -> int:
    """That the search for the fewest engines of a profile takes, of at most so many."""
    return (1 + (engines - 1).bit_length()) * _most_splits(engines) if engines else 0


def _most_splits(engines: int) -> int:
    """That are tried of a number of engines: none for prefill, and a bisection of the others."""
    return 1 + (engines - 1).bit_length()


class _Search:
    def __init__(self, profiles: Sequence[EngineProfile], gpus: int, serve: Serve) -> None:
        self._profiles = profiles
        self._gpus = gpus
        """Worth trying: no more than the cheapest so far."""
        self._serve = serve
        self._tried: dict[Layout, Trial] = {}
        self._left = 0
        """Runs that follow those of the number of engines that is being tried, at most."""

    def run(self) -> Plan:
        fewest: dict[EngineProfile, int] = {}
        for number, profile in enumerate(self._profiles):
            later = self._profiles[number + 1 :]
            after = sum(most_runs(self._gpus // each.gpus) for each in later)
            after += sum(map(_most_splits, fewest.values()))
            engines = self._fewest(profile, after)
            if engines is not None:
                fewest[profile] = engines
        cheapest = [each for each, count in fewest.items() if count * each.gpus == self._gpus]
        for number, profile in enumerate(cheapest, 1):
            self._left = _most_splits(fewest[profile]) * (len(cheapest) - number)
            for _ in self._splits(profile, fewest[profile]):
                pass
        tried = tuple(self._tried.values())
        meeting = [trial for trial in tried if trial.meets]
        if meeting:
            return Plan(tried, min(meeting, key=lambda each: (each.gpus, each.worse_share)))
        # Each was left after as many misses: the more it had served by then, the better.
        best = max(tried, key=lambda each: each.outcome.measured.good)
        whole = self._tried[best.layout] = self._serve(best.layout, True, 0)
        return Plan(tuple(self._tried.values()), whole)

    def _fewest(self, profile: EngineProfile, after: int) -> int | None:
        """Engines that serve as promised, by bisection; the most first: if they don't, none do."""
        low, high = 0, self._gpus // profile.gpus
        if not high:
            return None
        self._left = most_runs(high) - _most_splits(high) + after
        if not self._does(profile, high):
            return None
        while high - low > 1:
            middle = (low + high) // 2
            numbers = (high - low - 1).bit_length()
            self._left = numbers * _most_splits(high) + after
            if self._does(profile, middle):
                high = middle
            else:
                low = middle
        self._gpus = high * profile.gpus
        return high

    def _does(self, profile: EngineProfile, engines: int) -> bool:
        return any(trial.meets for trial in self._splits(profile, engines))

    def _splits(self, profile: EngineProfile, engines: int) -> Iterator[Trial]:
        """Colocated; then split, with more engines for the pool whose latency is the worse."""
        left = _most_splits(engines) - 1
        yield self._try(Layout(profile, 0, engines), left)
        low, high = 1, engines - 1
        while low <= high:
            prefill = (low + high) // 2
            left -= 1
            trial = self._try(Layout(profile, prefill, engines - prefill), left)
            yield trial
            if trial.ttft_share > trial.tpot_share:
                low = prefill + 1
            else:
                high = prefill - 1

    def _try(self, layout: Layout, left: int) -> Trial:
        trial = self._tried.get(layout)
        if trial is None:
            trial = self._tried[layout] = self._serve(layout, False, left + self._left)
        return trial
