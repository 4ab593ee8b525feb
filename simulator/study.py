"""One workload, policy and SLO, run on one layout after another, at one speed or another."""

from __future__ import annotations

from dataclasses import dataclass

from router.core.costs import Slo
from simulator.cluster import Layout
from simulator.experiment import Outcome, run
from simulator.progress import Bar
from simulator.question import Workload, gpus_of
from simulator.workloads import sped_up


@dataclass(frozen=True, slots=True)
class Study:
    """See the module."""

    workload: Workload
    policy: str
    slo: Slo
    seed: int
    requests: int
    """How many there are."""
    last_s: float
    """When the last one arrives."""
    bar: Bar
    routers: int = 1

    def run(
        self, layout: Layout, *, factor: float = 1.0, misses_allowed: int | None = None,
        runs_after: int = 0,
    ) -> Outcome:  # fmt: skip
        """The requests `factor` times as fast; at most so many runs will follow."""
        at = f" at {factor:g} times the rate" if factor != 1 else ""
        self.bar.begin(f"{in_words(layout)}{at}", runs_after)
        requests = sped_up(self.bar.watched(self.workload.requests(), self.requests), factor)
        outcome = run(
            layout, self.policy, self.slo, requests, self.seed, misses_allowed=misses_allowed,
            routers=self.routers,
        )  # fmt: skip
        self.bar.end()
        return outcome


def in_words(layout: Layout) -> str:
    """`1 prefill and 3 decode engines`; what they run on, if that differs."""
    if not layout.prefill:
        return f"{layout.decode} engine{'s' * (layout.decode > 1)} for both"
    decode = f"{layout.decode} decode engine{'s' * (layout.decode > 1)}"
    if (other := layout.prefill_profile) is None:
        return f"{layout.prefill} prefill and {decode}"
    prefill = f"{layout.prefill} prefill engine{'s' * (layout.prefill > 1)}"
    gpus, decode_gpus = gpus_of(other.gpus), gpus_of(layout.profile.gpus)
    return f"{prefill} of {gpus} and {decode} of {decode_gpus}"
