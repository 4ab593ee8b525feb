"""Policies that know no more than which workers there are and what they were given.

- random, round_robin: what most gateways do unless told otherwise.
- least_loaded: fewest requests in flight, as counted here; random among equals.
- power_of_two: two distinct random workers, fewer in flight wins, the first of the two if equal.
  Ray Serve's default (2.60.0, `serve/_private/request_router/pow_2_router.py`).

Left out of Ray's: a queue length is cached there for up to 10 s and probed if it is older, replicas
of the caller's own node come first, and a replica at `max_ongoing_requests` refuses. Counts here
are always current and no worker refuses.

With a prefill pool each pool is chosen from by itself. All ignore prompts, caches and times.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from router.core.candidates import Candidate
from router.core.events import Role
from router.core.workers import Worker
from simulator.baselines.policy import Ask, Choice, Part, PeerPolicy, least, two_random
from simulator.baselines.setup import Setup


class _Simple(PeerPolicy):
    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        setup.read({})


class RandomWorker(_Simple):
    """Any worker."""

    compared: ClassVar = ()

    def choose(self, ask: Ask, workers: Sequence[Worker], part: Part) -> Choice:
        """See `PeerPolicy`."""
        worker = workers[self._rng.randrange(len(workers))].id
        return Choice(worker, [Candidate(worker, part.role, 0.0, ())])


class RoundRobin(_Simple):
    """Each worker of a pool in turn, in the order of their names."""

    compared: ClassVar = ()

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self._turns = dict.fromkeys(Role, 0)

    def choose(self, ask: Ask, workers: Sequence[Worker], part: Part) -> Choice:
        """See `PeerPolicy`."""
        pool = workers[0].role
        worker = workers[self._turns[pool] % len(workers)].id
        self._turns[pool] += 1
        return Choice(worker, [Candidate(worker, part.role, 0.0, ())])


class LeastLoaded(_Simple):
    """The fewest requests in flight."""

    compared: ClassVar = ("requests",)

    def choose(self, ask: Ask, workers: Sequence[Worker], part: Part) -> Choice:
        """See `PeerPolicy`."""
        role, in_flight = part.role, self.counts.in_flight
        candidates = [
            Candidate(worker.id, role, requests := in_flight(worker.id), (requests,))
            for worker in workers
        ]
        return Choice(least(candidates, self._rng), candidates)


class PowerOfTwo(_Simple):
    """The less loaded of two random ones."""

    compared: ClassVar = ("requests",)

    def choose(self, ask: Ask, workers: Sequence[Worker], part: Part) -> Choice:
        """See `PeerPolicy`."""
        candidates = []
        for worker in two_random(workers, self._rng):
            requests = self.counts.in_flight(worker.id)
            candidates.append(Candidate(worker.id, part.role, requests, (requests,)))
        return Choice(min(candidates, key=lambda each: each.cost).worker, candidates)
