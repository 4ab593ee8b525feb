"""One run: a workload on a cluster with a policy, and what came of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Final

from engine.spec import EngineTimes, PoolTimes
from protos.errors import ConfigError, nearest
from protos.ids import WorkerId
from router.core.costs import Slo, Weights
from router.core.events import Role
from router.core.gate import Promises
from router.core.joint import JointPlacement
from router.core.placement import Placement
from simulator.baselines import BASELINES, Setup
from simulator.cluster import Cluster, Layout
from simulator.measure import Measurement
from simulator.traces import TracedRequest

OURS: Final = "baton"


def _joint(setup: Setup, slo: Slo) -> Placement:
    return JointPlacement(setup.rng.randrange, setup.engines, slo, Weights(**setup.knobs))


def _peer(make: Callable[[Setup], Placement]) -> Callable[[Setup, Slo], Placement]:
    return lambda setup, slo: make(setup)


POLICIES: Final[dict[str, Callable[[Setup, Slo], Placement]]] = {
    OURS: _joint,
    **{name: _peer(make) for name, make in BASELINES.items()},
}


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a run."""

    measured: Measurement
    duration_s: float
    """Until its last request ended."""
    prompt_tokens: int
    cached_tokens: int
    """Of prompts, where they were computed or fetched from a cache to there."""
    busy: Mapping[WorkerId, float]
    """The share of the time in which each worker computed."""

    @property
    def hit_rate(self) -> float:
        """The share of prompt tokens that were not computed, since a cache had them."""
        return self.cached_tokens / self.prompt_tokens if self.prompt_tokens else 0.0


def policy_named(name: str) -> Callable[[Setup, Slo], Placement]:
    """Raises ConfigError for a name that is none."""
    made = POLICIES.get(name)
    if made is None:
        raise ConfigError(
            f"there is no policy {name!r}; did you mean {nearest(name, POLICIES)!r}? "
            f"There are {', '.join(POLICIES)}"
        )
    return made


def run(
    layout: Layout,
    policy: str,
    slo: Slo,
    requests: Iterable[TracedRequest],
    seed: int = 0,
    knobs: Mapping[str, float] | None = None,
    misses_allowed: int | None = None,
    watch: Callable[[Cluster], None] = lambda cluster: None,
    routers: int = 1,
) -> Outcome:
    """Serve a workload to its end, or until more requests were not served as promised than are
    allowed. The same arguments give the same outcome. `watch` is shown the cluster after every
    event."""
    make = policy_named(policy)
    placements = [make(setup_of(layout, seed, router, knobs), slo) for router in range(routers)]
    return serve(layout, placements, slo, requests, misses_allowed, watch)


def setup_of(
    layout: Layout, seed: int = 0, router: int = 0, knobs: Mapping[str, float] | None = None
) -> Setup:
    """What one router's policy is made from: each has chances of its own."""
    return Setup(
        rng=Random(f"{seed} {router}" if router else seed),
        engines=engines_of(layout),
        max_running_requests=layout.profile.max_running_requests,
        knobs=knobs or {},
    )


def engines_of(layout: Layout) -> PoolTimes:
    """What predictions start from: the engine model's own costs."""
    # Without a prefill pool engines that decode compute the prompts.
    pools = (Role.PREFILL if layout.prefill else Role.DECODE, Role.DECODE)
    profiles = [layout.profile_of(role) for role in pools]
    return PoolTimes(
        *(EngineTimes(each.timing(layout.block_tokens), each.max_step_tokens) for each in profiles)
    )


def serve(
    layout: Layout,
    placements: Sequence[Placement],
    slo: Slo,
    requests: Iterable[TracedRequest],
    misses_allowed: int | None = None,
    watch: Callable[[Cluster], None] = lambda cluster: None,
) -> Outcome:
    """As `run`, with a router for each of these policies."""
    measured = Measurement(slo)
    promises = Promises(slo.ttft_s, slo.tpot_s)
    cluster = Cluster(layout, placements, measured.observe, measured.refuse, promises)

    def enough() -> bool:
        watch(cluster)
        missed = measured.requests - measured.good
        return misses_allowed is not None and missed > misses_allowed

    cluster.run(requests, enough)
    workers = cluster.workers.values()
    return Outcome(
        measured=measured,
        duration_s=cluster.ended_s,
        prompt_tokens=cluster.prompt_tokens,
        cached_tokens=sum(worker.cached_tokens for worker in workers),
        busy={worker.id: worker.busy_s / max(cluster.ended_s, 1e-9) for worker in workers},
    )
