"""llm-d's router: its built-in scorers, and the guide's "sticky until saturated".

Source: llm-d/llm-d-router @ebab6879 `pkg/epp`; llm-d/llm-d `guides/optimized-baseline` @0a3b0c93,
`guides/pd-disaggregation` @83bb7c18.

Sees: queue length q_i and KV use u_i, scraped every 50 ms; its own uncached prompt tokens in
flight I_i, from dispatch to first chunk; requests in flight n_i; a prefix index, c_i. The precise
one, fed by engines' events, is taken for both (the view's); the approximate one is left out.

(a) built-in:  2 * (qmax - q_i) / (qmax - qmin) + 2 * (1 - u_i) + 3 * c_i / L,  most wins; the
    first term is 1 if all q are equal.
(b) guide: S = those with c_i / L >= 0.80, all if there is none. With TTFT_i = I_i / tokens per
    second: if the least TTFT in S exceeds the least outside by more than 18 s, all. Of these the
    most of 1 - min(1, (I_i + L - c_i) / 4,194,304).

Random among equals. With a prefill pool: a decode worker, then the decider, then a prefill worker.
The decider keeps a request on the decode worker if L < T or L - c_decode < T. T is the knob
`remote_from_tokens`; 0 is the guide's "always remote" (upstream's code takes 0 for "never").
(a) scores both pools alike; (b) scores prefill workers, and (nmax - n_i) / nmax decode workers.

Ignores: output lengths, transfers, joint choice; (b) the decode work.

Deviations: tokens per second are those of a 4,096-token prefill by the engine model, for both pools
(upstream: 15,928 and 33,821, measured on Qwen3-32B, two H100); the scorer for requests without hits
that goes with the precise index, flow control and the latency predictor are left out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar, Final

from engine.base import EngineLoad
from router.core.candidates import Candidate
from router.core.workers import Worker
from simulator.baselines.policy import Ask, Choice, Part, PeerPolicy, least
from simulator.baselines.sampling import Sampled
from simulator.baselines.setup import Setup

SCRAPE_PERIOD_S: Final = 0.05
TYPICAL_PREFILL_TOKENS: Final = 4096
TOKEN_LOAD_LIMIT: Final = 4_194_304

BUILTIN_KNOBS: Final = {
    "queue_weight": 2.0,
    "kv_weight": 2.0,
    "prefix_weight": 3.0,
    "remote_from_tokens": 0.0,
}


class _Llmd(PeerPolicy):
    """Decode first, then the decider."""

    def __init__(self, setup: Setup, knobs: dict[str, float]) -> None:
        super().__init__(setup)
        self._remote_from_tokens = knobs["remote_from_tokens"]

    @property
    def split_above_tokens(self) -> int | None:
        """See `PeerPolicy`."""
        limit = self._remote_from_tokens
        return int(limit) if 0 < limit < math.inf else None

    def split(
        self, ask: Ask, prefill: Sequence[Worker], decode: Sequence[Worker]
    ) -> tuple[Choice | None, Choice | None]:
        """See `PeerPolicy`."""
        second = self.choose(ask, decode, Part.DECODE)
        if second.uncached_tokens < self._remote_from_tokens:
            return None, second
        return self.choose(ask, prefill, Part.PREFILL), second


class LlmdBuiltin(_Llmd):
    """Queue, KV use and prefix, weighted."""

    compared: ClassVar = ("waiting", "kv_use", "cached_tokens")

    def __init__(self, setup: Setup) -> None:
        knobs = setup.read(BUILTIN_KNOBS)
        super().__init__(setup, knobs)
        self._queue_weight = knobs["queue_weight"]
        self._kv_weight = knobs["kv_weight"]
        self._prefix_weight = knobs["prefix_weight"]
        self._loads = Sampled[EngineLoad](SCRAPE_PERIOD_S, lambda worker: worker.load)

    def choose(self, ask: Ask, workers: Sequence[Worker], part: Part) -> Choice:
        """See `PeerPolicy`."""
        samples = self._loads.at(ask.now_s, ask.view.pool)
        loads = [samples[worker.id] for worker in workers]
        waiting = [load.waiting for load in loads]
        most, spread = max(waiting), max(waiting) - min(waiting)
        cached = ask.cached_blocks()
        prompt_tokens, role = max(1, ask.shape.prompt_tokens), part.role
        candidates = []
        for worker, load in zip(workers, loads, strict=True):
            kv_use = load.kv_blocks_used / load.kv_blocks_total if load.kv_blocks_total else 0.0
            tokens = ask.tokens(cached.get(worker.id, 0))
            score = (
                self._queue_weight * ((most - load.waiting) / spread if spread else 1.0)
                + self._kv_weight * (1 - kv_use)
                + self._prefix_weight * tokens / prompt_tokens
            )
            numbers = (load.waiting, kv_use, tokens)
            candidates.append(Candidate(worker.id, role, -score, numbers))
        chosen = least(candidates, self._rng)
        return Choice(chosen, candidates, _uncached_tokens(ask, cached.get(chosen, 0)))


class LlmdGuide(_Llmd):
    """Where the prefix is, until its queue is too long; then the least tokens to compute."""

    compared: ClassVar = ("uncached_tokens", "cached_tokens", "requests")

    def __init__(self, setup: Setup) -> None:
        typical_s = setup.prefill_s(TYPICAL_PREFILL_TOKENS, 0)
        tokens_per_s = TYPICAL_PREFILL_TOKENS / typical_s
        knobs = setup.read(
            {
                "affinity_share": 0.8,
                "max_ttft_gap_s": 18.0,
                "tokens_per_s": tokens_per_s,
                "prefill_tokens_per_s": tokens_per_s,
                "remote_from_tokens": 0.0,
            }
        )
        super().__init__(setup, knobs)
        self._affinity_share = knobs["affinity_share"]
        self._max_ttft_gap_s = knobs["max_ttft_gap_s"]
        self._tokens_per_s = {
            Part.WHOLE: knobs["tokens_per_s"],
            Part.PREFILL: knobs["prefill_tokens_per_s"],
        }

    def choose(self, ask: Ask, workers: Sequence[Worker], part: Part) -> Choice:
        """See `PeerPolicy`."""
        if part is Part.DECODE:
            return self._fewest_requests(ask, workers)
        cached = ask.cached_blocks()
        prompt_tokens, role = ask.shape.prompt_tokens, part.role
        candidates = []
        for worker in workers:
            count = self.counts.at(worker.id)
            tokens = ask.tokens(cached.get(worker.id, 0))
            load = (count.uncached_tokens + prompt_tokens - tokens) / TOKEN_LOAD_LIMIT
            numbers = (count.uncached_tokens, tokens, count.in_flight)
            candidates.append(Candidate(worker.id, role, min(1.0, load), numbers))
        kept = self._sticky(candidates, prompt_tokens, self._tokens_per_s[part])
        chosen = least(kept, self._rng)
        return Choice(chosen, kept, _uncached_tokens(ask, cached.get(chosen, 0)))

    def _sticky(
        self, candidates: list[Candidate], prompt_tokens: int, tokens_per_s: float
    ) -> list[Candidate]:
        wanted_tokens = self._affinity_share * prompt_tokens
        inside = [each for each in candidates if each.numbers[1] >= wanted_tokens]
        if not inside or len(inside) == len(candidates):
            return candidates
        outside = [each.numbers[0] for each in candidates if each.numbers[1] < wanted_tokens]
        gap_tokens = min([each.numbers[0] for each in inside]) - min(outside)
        return candidates if gap_tokens > self._max_ttft_gap_s * tokens_per_s else inside

    def _fewest_requests(self, ask: Ask, workers: Sequence[Worker]) -> Choice:
        requests = [self.counts.in_flight(worker.id) for worker in workers]
        most = max(requests)
        role = Part.DECODE.role
        candidates = [
            Candidate(worker.id, role, (count - most) / most if most else -1.0, (0, 0, count))
            for worker, count in zip(workers, requests, strict=True)
        ]
        chosen = least(candidates, self._rng)
        blocks = ask.cached_blocks().get(chosen, 0) if self._remote_from_tokens else 0
        return Choice(chosen, candidates, _uncached_tokens(ask, blocks))


def _uncached_tokens(ask: Ask, cached_blocks: int) -> int:
    return ask.shape.prompt_tokens - ask.tokens(cached_blocks)
