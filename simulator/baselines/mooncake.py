"""Mooncake's Conductor, Algorithm 1.

Source: FAST'25 section 4.1-4.2 and arXiv 2407.00079v3 section 6-8. The published repository has no
scheduler.

Sees: a map of all blocks (the index of the view), the predicted queue of each prefill worker, and
what decodes where; all are taken for current.

    TTFT_i = T_x + predicted prefill of the queue at i + T_prefill(L, prefix)

Least TTFT for prefill, the first of equals. Predictions are the engine model's, a prompt's steps
one after the other; a queue is the prompts placed at i that have no first token, each in full.
Decode: the least predicted time between tokens, of the requests and contexts counted at i together
with this one. A context is the prompt and what was generated when it was placed.

Ignores: output lengths, KV on decode workers, later moves.

Deviations:

- Where the longest match anywhere exceeds c_i by more than the factor theta, upstream has i fetch
  the difference (T_x, hot-spot replication). The simulated cluster moves no blocks between prefill
  workers, so T_x = 0 and every worker computes from its own c_i. theta is a knob (unpublished; 4)
  and decides only what candidates tell as `would_fetch`.
- Rejection, early or not, is no part of placement and is left out.
- Upstream is for disaggregated clusters only. Whole requests are placed by TTFT.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Final

from engine.latency_model import StepWork
from router.core.candidates import Candidate
from router.core.workers import Worker
from simulator.baselines.policy import Ask, Choice, Part, PeerPolicy
from simulator.baselines.setup import Setup

KNOBS: Final = {"theta": 4.0}
_NS_PER_S: Final = 1_000_000_000


class Mooncake(PeerPolicy):
    """Least predicted time to first token, then least predicted time between tokens.

    Deviates from Algorithm 1: no prefix is fetched from another prefill worker, so all candidates
    compute from what they have themselves, whatever theta is.
    """

    compared: ClassVar = (
        "queue_s",
        "prefill_s",
        "cached_tokens",
        "would_fetch",
        "requests",
        "context_tokens",
    )

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self._theta = setup.read(KNOBS)["theta"]
        self._setup = setup

    def choose(self, ask: Ask, workers: Sequence[Worker], part: Part) -> Choice:
        """See `PeerPolicy`."""
        if part is Part.DECODE:
            return self._least_time_between_tokens(ask, workers)
        cached = ask.cached_blocks()
        longest = max(cached.values(), default=0)
        role = part.role
        predicted_s: dict[int, float] = {}
        candidates = []
        for worker in workers:
            blocks = cached.get(worker.id, 0)
            prefill_s = predicted_s.get(blocks)
            if prefill_s is None:
                prefill_s = predicted_s[blocks] = self._prefill_s(ask, blocks)
            count = self.counts.at(worker.id)
            queue_s = count.prefill_ns / _NS_PER_S
            numbers = (
                queue_s, prefill_s, ask.tokens(blocks), longest > self._theta * blocks,
                count.in_flight, count.context_tokens,
            )  # fmt: skip
            candidates.append(Candidate(worker.id, role, queue_s + prefill_s, numbers))
        chosen = min(candidates, key=lambda each: each.cost)
        prefill_s = predicted_s[cached.get(chosen.worker, 0)]
        return Choice(chosen.worker, candidates, prefill_ns=round(prefill_s * _NS_PER_S))

    def _prefill_s(self, ask: Ask, blocks: int) -> float:
        return self._setup.prefill_s(ask.shape.prompt_tokens, ask.tokens(blocks))

    def _least_time_between_tokens(self, ask: Ask, workers: Sequence[Worker]) -> Choice:
        tokens = ask.shape.prompt_tokens + ask.shape.output_tokens
        step_s, role = self._setup.times.step_s, Part.DECODE.role
        work = StepWork()
        candidates = []
        for worker in workers:
            count = self.counts.at(worker.id)
            work.decode_requests = count.in_flight + 1
            work.decode_context_tokens = count.context_tokens + tokens
            numbers = (0.0, 0.0, 0, 0, count.in_flight, count.context_tokens)
            candidates.append(Candidate(worker.id, role, step_s(work), numbers))
        return Choice(min(candidates, key=lambda each: each.cost).worker, candidates)
