"""NVIDIA Dynamo's KV router, and its conditional disaggregation.

Source: ai-dynamo 1.6.1; ai-dynamo/dynamo `lib/kv-router/src/scheduling/selector/default.rs`
@07a6c9ce, `overlap.rs` @13a4eeab, `conditional_disagg.rs` @088ca50b, and
`lib/llm/src/kv_router/prefill_router`.

Sees: engines' block events (the index of the view), and its own bookkeeping at dispatch, first
token and end. A_i = uncached tokens of the requests at i that have no first token, constant until
then; D_i = distinct prompt blocks of the live requests at i and of this one; n_i = requests at i.

    cost_i = s * max(0, (A_i + L) / B - credit_i) + D_i + w * n_i
    credit_i = k * f_i * cached blocks,  f_i = 1 / (1 + d * (A_i - min A) / L)

Least cost; random among equals. Defaults s=1, k=1, d=0, w=0.

With a prefill pool: the prefill worker first, by the same cost without D; the decode worker once
the first token is made, by D_i + w * n_i, its blocks being shared with no other request.

Conditional mode (experimental, off by default): a decode worker is looked for first, by
max(0, D_i - credit_i) + w * n_i. Of x = L - what is cached there, less than 2,048 tokens and less
than 0.7 of the prompt are computed there; else it is split as above, its decode worker chosen by
the same cost again, blocks shared.

Ignores: deadlines, output lengths, transfers, unequal hardware, interference in batches.

Deviations: a block is the index's, which may be larger than an engine's; host and disk tiers,
temperature, queue and busy filters (all off by default) are left out. Requests that can't be split
run whole on decode workers, by the whole cost.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar, Final

from protos.ids import RequestKey
from router.core.candidates import Candidate
from router.core.workers import Worker
from simulator.baselines.counting import LiveBlocks
from simulator.baselines.policy import Ask, Choice, Part, PeerPolicy, least
from simulator.baselines.setup import Setup

KNOBS: Final = {
    "s": 1.0,
    "k": 1.0,
    "d": 0.0,
    "w": 0.0,
}
CONDITIONAL_KNOBS: Final = {**KNOBS, "local_tokens": 2048.0, "local_share": 0.7}


class DynamoKv(PeerPolicy):
    """Prefill work and live blocks, less what is cached."""

    compared: ClassVar = ("uncached_tokens", "cached_blocks", "live_blocks", "requests")
    knobs: ClassVar = KNOBS
    decode_shares_blocks: ClassVar = False
    """Whether the blocks of a request that was handed over count once with others'."""

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        knobs = setup.read(self.knobs)
        self._prefill_scale = knobs["s"]
        self._credit = knobs["k"]
        self._credit_decay = knobs["d"]
        self._request_weight = knobs["w"]
        self.live = LiveBlocks()

    def choose(self, ask: Ask, workers: Sequence[Worker], part: Part) -> Choice:
        """See `PeerPolicy`."""
        if part is Part.DECODE:
            return self.choose_decode(ask, workers)
        cached = ask.cached_blocks()
        shape, block_tokens = ask.shape, ask.view.block_tokens
        counts = [self.counts.at(worker.id) for worker in workers]
        least_uncached = min([count.uncached_tokens for count in counts])
        decay = self._credit_decay / max(1, shape.prompt_tokens)
        live_blocks = self._live_with(ask, workers) if part is Part.WHOLE else [0] * len(workers)
        role, scale, weight = part.role, self._prefill_scale, self._request_weight
        candidates = []
        for worker, count, live in zip(workers, counts, live_blocks, strict=True):
            uncached = count.uncached_tokens
            blocks = cached.get(worker.id, 0)
            credit = self._credit * blocks / (1 + decay * (uncached - least_uncached))
            prefill = max(0.0, (uncached + shape.prompt_tokens) / block_tokens - credit)
            cost = scale * prefill + live + weight * count.in_flight
            numbers = (uncached, blocks, live, count.in_flight)
            candidates.append(Candidate(worker.id, role, cost, numbers))
        chosen = least(candidates, self._rng)
        tokens = ask.tokens(cached.get(chosen, 0))
        return Choice(chosen, candidates, shape.prompt_tokens - tokens)

    def choose_decode(self, ask: Ask, workers: Sequence[Worker]) -> Choice:
        """For what was computed elsewhere: by live blocks alone."""
        role, weight = Part.DECODE.role, self._request_weight
        candidates = []
        live_blocks = self.live.on_each(workers, _whole_blocks(ask))
        for worker, live in zip(workers, live_blocks, strict=True):
            requests = self.counts.in_flight(worker.id)
            numbers = (0, 0, live, requests)
            candidates.append(Candidate(worker.id, role, live + weight * requests, numbers))
        return Choice(least(candidates, self._rng), candidates)

    def split(
        self, ask: Ask, prefill: Sequence[Worker], decode: Sequence[Worker]
    ) -> tuple[Choice | None, Choice | None]:
        """The decode worker is chosen late."""
        return self.choose(ask, prefill, Part.PREFILL), None

    def count(self, ask: Ask, key: RequestKey, first: Choice | None, second: Choice | None) -> None:
        """Also its blocks, where it generates."""
        super().count(ask, key, first, second)
        if second is None:
            return
        shared = first is second or self.decode_shares_blocks
        addresses = ask.shape.addresses if shared else ()
        self.live.add(key, second.worker, addresses, _whole_blocks(ask) - len(addresses))

    def ended(self, now_s: float, key: RequestKey, output_tokens: int | None = None) -> None:
        """See `Placement`."""
        super().ended(now_s, key, output_tokens)
        self.live.ended(key)

    def _live_with(self, ask: Ask, workers: Sequence[Worker]) -> list[int]:
        """D_i: what is live once this request is there, common blocks once."""
        together = self.live.on_each(workers, _whole_blocks(ask))
        common = self.live.shared_with_each(workers, ask.shape.addresses)
        return [blocks - twice for blocks, twice in zip(together, common, strict=True)]


class DynamoConditional(DynamoKv):
    """Prompts of which little is new to a decode worker are computed there."""

    knobs: ClassVar = CONDITIONAL_KNOBS
    decode_shares_blocks: ClassVar = True

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        knobs = setup.read(self.knobs)
        self._local_tokens = knobs["local_tokens"]
        self._local_share = knobs["local_share"]

    @property
    def split_above_tokens(self) -> int | None:
        """See `PeerPolicy`: held against what is new of a prompt."""
        return int(self._local_tokens) if self._local_tokens < math.inf else None

    def choose_decode(self, ask: Ask, workers: Sequence[Worker]) -> Choice:
        """By live blocks, less what is cached."""
        cached = ask.cached_blocks()
        role, weight = Part.DECODE.role, self._request_weight
        candidates = []
        for worker, live in zip(workers, self._live_with(ask, workers), strict=True):
            blocks = cached.get(worker.id, 0)
            requests = self.counts.in_flight(worker.id)
            cost = max(0.0, live - self._credit * blocks) + weight * requests
            candidates.append(Candidate(worker.id, role, cost, (0, blocks, live, requests)))
        chosen = least(candidates, self._rng)
        new_tokens = ask.shape.prompt_tokens - ask.tokens(cached.get(chosen, 0))
        return Choice(chosen, candidates, new_tokens)

    def split(
        self, ask: Ask, prefill: Sequence[Worker], decode: Sequence[Worker]
    ) -> tuple[Choice | None, Choice | None]:
        """Local or late."""
        local = self.choose_decode(ask, decode)
        new_tokens = local.uncached_tokens
        if (
            new_tokens < self._local_tokens
            and new_tokens < self._local_share * ask.shape.prompt_tokens
        ):
            return None, local
        first, _ = super().split(ask, prefill, decode)
        assert first is not None, "a split request has a prefill worker"
        # With the decode workers that were held against it.
        return first._replace(candidates=first.candidates + local.candidates), None


def _whole_blocks(ask: Ask) -> int:
    """Of the prompt, those that nothing is known of included."""
    return max(len(ask.shape.addresses), ask.shape.prompt_tokens // ask.view.block_tokens)
