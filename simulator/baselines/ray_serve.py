"""Ray Serve's PrefixCacheAffinityRouter.

Source: ray 2.60.0, `llm/_internal/serve/routing_policies/prefix_aware`.

Sees: ongoing requests of each replica, and one tree of the prompts that it routed.

If the most ongoing requests exceed the fewest by more than `imbalanced_threshold` (upstream's
default is infinite: never), power of two choices. Else the replicas that have the longest match, if
that is at least 0.10 of the prompt; else those with the smallest part of the tree. Of these the
fewest ongoing requests. The prompt is inserted when it is routed; nothing is evicted (upstream's
default). With a prefill pool, each pool has a router and a tree of its own, always remote.

Ignores: tokens in work, KV use, what engines evict, deadlines.

Deviations: the tree is of blocks, not of characters; equals are broken at random (upstream: the
order of a set); lengths are always current; no replica refuses.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import ClassVar, Final

from protos.ids import WorkerId
from router.core.candidates import Candidate
from router.core.events import Role
from router.core.workers import Worker
from simulator.baselines.policy import Ask, Choice, Part, PeerPolicy, least, two_random
from simulator.baselines.sent_prefixes import SentPrefixes
from simulator.baselines.setup import Setup

KNOBS: Final = {"imbalanced_threshold": math.inf, "match_rate_threshold": 0.1}


class RayPrefix(PeerPolicy):
    """Longest match, fewest requests."""

    compared: ClassVar = ("requests", "matched_tokens", "sent_blocks")

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        knobs = setup.read(KNOBS)
        self._imbalanced_threshold = knobs["imbalanced_threshold"]
        self._match_rate_threshold = knobs["match_rate_threshold"]
        self._sent: defaultdict[Role, SentPrefixes] = defaultdict(SentPrefixes)

    def choose(self, ask: Ask, workers: Sequence[Worker], part: Part) -> Choice:
        """See `PeerPolicy`."""
        sent = self._sent[workers[0].role]
        matched = sent.match(ask.shape.addresses, workers)
        in_flight = self.counts.in_flight
        requests = [in_flight(worker.id) for worker in workers]
        balanced = max(requests) - min(requests) <= self._imbalanced_threshold
        chosen_from = (
            self._affine(ask, sent, matched, workers)
            if balanced
            else two_random(workers, self._rng)
        )
        role = part.role
        candidates = [
            Candidate(
                worker.id, role, count := in_flight(worker.id),
                (count, ask.tokens(matched.get(worker.id, 0)), sent.blocks_of(worker.id)),
            )
            for worker in chosen_from
        ]  # fmt: skip
        if balanced:
            chosen = least(candidates, self._rng)
        else:
            chosen = min(candidates, key=lambda each: each.cost).worker
        sent.send(chosen, ask.shape.addresses)
        return Choice(chosen, candidates)

    def _affine(
        self, ask: Ask, sent: SentPrefixes, matched: dict[WorkerId, int], workers: Sequence[Worker]
    ) -> Sequence[Worker]:
        longest = max(matched.values(), default=0)
        if ask.tokens(longest) >= self._match_rate_threshold * ask.shape.prompt_tokens:
            return [worker for worker in workers if matched.get(worker.id, 0) == longest]
        sizes = [sent.blocks_of(worker.id) for worker in workers]
        smallest = min(sizes)
        return [each for each, size in zip(workers, sizes, strict=True) if size == smallest]
