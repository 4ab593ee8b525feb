"""What all peers' policies share: which requests are split, and that all are counted.

A policy chooses one worker of a pool for one part of a request. With a prefill pool every request
that can be split is, unless the policy has a rule of its own; without one, or if its part can't be
handed over, it is placed as a whole. A request that goes on does so on a decode worker; its prompt
is taken to be there or to be fetched if there is a prefill pool, and to be computed again if not.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from enum import Enum, auto
from random import Random
from typing import ClassVar, NamedTuple

from protos.ids import RequestKey, WorkerId
from router.core.candidates import Candidate
from router.core.events import PrefixFetch, Role, Shape
from router.core.placement import Decision, Reason, Uncounted, View, never_split_because
from router.core.workers import Worker
from simulator.baselines.counting import Counts
from simulator.baselines.setup import Setup


class Part(Enum):
    """What of a request a worker is chosen for."""

    WHOLE = auto()
    PREFILL = auto()
    DECODE = auto()

    @property
    def role(self) -> Role:
        """As candidates tell it."""
        return Role.PREFILL if self is Part.PREFILL else Role.DECODE


class Ask(NamedTuple):
    """A request to be placed."""

    now_s: float
    view: View
    shape: Shape

    def cached_blocks(self) -> dict[str, int]:
        """By worker, the blocks of the prompt's beginning that the fed index knows there."""
        return self.view.index.match(self.shape.addresses)

    def tokens(self, blocks: int) -> int:
        """What so many blocks of the prompt stand for."""
        return min(blocks * self.view.block_tokens, self.shape.prompt_tokens)


class Choice(NamedTuple):
    """A worker for a part, what was compared, and what its prompt costs there."""

    worker: WorkerId
    candidates: list[Candidate]
    uncached_tokens: int = 0
    prefill_ns: int = 0
    fetch: PrefixFetch | None = None
    """What of its prompt it gets from another."""


def least(candidates: Sequence[Candidate], rng: Random) -> WorkerId:
    """The one of least cost; random among equals."""
    lowest = min([each.cost for each in candidates])
    best = [each.worker for each in candidates if each.cost == lowest]
    return best[rng.randrange(len(best))] if len(best) > 1 else best[0]


def two_random(workers: Sequence[Worker], rng: Random) -> Sequence[Worker]:
    """Two distinct ones in random order, or the only one."""
    return rng.sample(workers, 2) if len(workers) > 1 else workers


class PeerPolicy(Uncounted, ABC):
    """A `Placement`: subclasses choose, this places and counts."""

    compared: ClassVar[tuple[str, ...]]
    """Names of the candidates' numbers."""

    def __init__(self, setup: Setup) -> None:
        self._rng = setup.rng
        self.counts = Counts()

    @abstractmethod
    def choose(self, ask: Ask, workers: Sequence[Worker], part: Part) -> Choice:
        """One of these workers, which are at least one and of one pool."""

    def split(
        self, ask: Ask, prefill: Sequence[Worker], decode: Sequence[Worker]
    ) -> tuple[Choice | None, Choice | None]:
        """Workers for prompt and generation. Without the first it runs whole on the second;
        without the second that one is chosen once the first token is made."""
        return (
            self.choose(ask, prefill, Part.PREFILL),
            self.choose(ask, decode, Part.DECODE),
        )

    @property
    def split_above_tokens(self) -> int | None:
        """What prompts are held against before they are split, if they are."""
        return None

    def place(self, now_s: float, view: View, key: RequestKey, shape: Shape) -> Decision | None:
        """See `Placement`."""
        self.ended(now_s, key)
        prefill = view.pool.usable(Role.PREFILL)
        decode = view.pool.usable(Role.DECODE)
        ask = Ask(now_s, view, shape)
        if not decode:
            return self._place_whole(ask, key, Reason.DECODE_DOWN, prefill) if prefill else None
        reason = never_split_because(view, shape, bool(prefill))
        if reason is None:
            return self._place_split(ask, key, prefill, decode)
        if reason is Reason.RESUME and prefill:
            return self._place_generation(ask, key, decode)
        return self._place_whole(ask, key, reason, decode)

    def first_token(self, now_s: float, key: RequestKey) -> None:
        """See `Placement`."""
        self.counts.first_token(key)

    def ended(self, now_s: float, key: RequestKey, output_tokens: int | None = None) -> None:
        """See `Placement`."""
        self.counts.ended(key)

    def count(self, ask: Ask, key: RequestKey, first: Choice | None, second: Choice | None) -> None:
        """The first computes the prompt and the second generates; both are the same for a request
        as a whole."""
        prompt_tokens, output_tokens = ask.shape.prompt_tokens, ask.shape.output_tokens
        self.counts.add(
            key,
            first and first.worker,
            second and second.worker,
            prompt_tokens + output_tokens,
            first.uncached_tokens if first else 0,
            first.prefill_ns if first else 0,
        )

    def _place_whole(
        self, ask: Ask, key: RequestKey, reason: Reason, workers: Sequence[Worker]
    ) -> Decision:
        choice = self.choose(ask, workers, Part.WHOLE)
        self.count(ask, key, choice, choice)
        return self._decision(ask, reason, choice.worker, None, choice.candidates, choice.fetch)

    def _place_generation(self, ask: Ask, key: RequestKey, decode: Sequence[Worker]) -> Decision:
        choice = self.choose(ask, decode, Part.DECODE)
        self.count(ask, key, None, choice)
        return self._decision(ask, Reason.RESUME, choice.worker, None, choice.candidates)

    def _place_split(
        self, ask: Ask, key: RequestKey, prefill: Sequence[Worker], decode: Sequence[Worker]
    ) -> Decision:
        first, second = self.split(ask, prefill, decode)
        if second is None:
            assert first is not None, "a policy chooses at least one worker"
            self.count(ask, key, first, None)
            return self._decision(
                ask, Reason.LONG_PROMPT, None, first.worker, first.candidates, first.fetch
            )
        if first is None:
            self.count(ask, key, second, second)
            return self._decision(ask, Reason.SHORT_PROMPT, second.worker, None, second.candidates)
        self.count(ask, key, first, second)
        candidates = first.candidates + second.candidates
        return self._decision(
            ask, Reason.LONG_PROMPT, second.worker, first.worker, candidates, first.fetch
        )

    def _decision(
        self,
        ask: Ask,
        reason: Reason,
        worker: WorkerId | None,
        prefill: WorkerId | None,
        candidates: list[Candidate],
        fetch: PrefixFetch | None = None,
    ) -> Decision:
        return Decision(
            reason, ask.shape.prompt_tokens, worker, prefill, self.compared, candidates,
            self.split_above_tokens, fetch=fetch,
        )  # fmt: skip
