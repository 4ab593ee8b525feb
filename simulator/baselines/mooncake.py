"""Mooncake's Conductor, Algorithm 1.

Source: FAST'25 section 4.1-4.2 and arXiv 2407.00079v3 section 6-8. The published repository has no
scheduler.

Sees: a map of all blocks (the index of the view), the predicted queue of each prefill worker, and
what decodes where; all are taken for current.

With c_i the blocks of the prompt at i and best the most of them on any worker of the pool:

    prefix = best, T_x = predicted transfer of best - c_i    if best / c_i > theta
    prefix = c_i,  T_x = 0                                    otherwise
    TTFT_i = T_x + predicted prefill of the queue at i + T_prefill(L, prefix)

Least TTFT for prefill, the first of equals; it fetches what was counted as transferred, so that hot
prefixes are soon on several workers. Predictions are the engine model's, a prompt's steps one after
the other; a queue is the prompts placed at i that have no first token, each in full. Decode: the
least predicted time between tokens, of the requests and contexts counted at i together with this
one. A context is the prompt and what was generated when it was placed.

Ignores: output lengths, KV on decode workers, later moves.

Deviations:

- theta is unpublished ("adjusted manually"): a knob. Of those tried on the conversation trace 1 to
  4 serve it best (benchmarks/results/mooncake-scheduling.md). c_i = 0 is an infinite ratio.
- Transfers do not slow each other down here, so T_x knows no congestion of the sender.
- `mooncake` lets everything in; `mooncake_rejecting` turns away who has a predicted TTFT or time
  between tokens beyond its SLO, as Algorithm 1 does, once the prompt is known. What the paper's
  section on overload adds, the decode pool's load at the end of the prefill, is left out: it takes
  an unpublished constant.
- Upstream is for disaggregated clusters only. Whole requests are placed by TTFT.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Final

from engine.latency_model import StepWork
from protos.ids import WorkerId
from router.core.candidates import Candidate
from router.core.costs import Slo
from router.core.events import PrefixFetch, Role, Shape
from router.core.placement import View
from router.core.workers import Worker
from simulator.baselines.policy import Ask, Choice, Part, PeerPolicy
from simulator.baselines.setup import Setup

KNOBS: Final = {"theta": 4.0}
_NS_PER_S: Final = 1_000_000_000


class Mooncake(PeerPolicy):
    """Least predicted time to first token, then least predicted time between tokens."""

    compared: ClassVar = (
        "queue_s",
        "prefill_s",
        "transfer_s",
        "cached_tokens",
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
        best, holder = self._longest(ask, workers, cached)
        role = part.role
        predicted_s: dict[int, tuple[float, float]] = {}
        candidates = []
        for worker in workers:
            blocks = cached.get(worker.id, 0)
            times_s = predicted_s.get(blocks)
            if times_s is None:
                times_s = predicted_s[blocks] = self._times_s(ask, blocks, best)
            transfer_s, prefill_s = times_s
            count = self.counts.at(worker.id)
            queue_s = count.prefill_ns / _NS_PER_S
            numbers = (
                queue_s, prefill_s, transfer_s, ask.tokens(blocks), count.in_flight,
                count.context_tokens,
            )  # fmt: skip
            cost = transfer_s + queue_s + prefill_s
            candidates.append(Candidate(worker.id, role, cost, numbers))
        chosen = min(candidates, key=lambda each: each.cost).worker
        blocks = cached.get(chosen, 0)
        _, prefill_s = predicted_s[blocks]
        fetch = PrefixFetch(holder, best) if holder and self._fetches(blocks, best) else None
        return Choice(
            chosen, candidates, prefill_ns=round(prefill_s * _NS_PER_S), fetch=fetch
        )  # fmt: skip

    def _longest(
        self, ask: Ask, workers: Sequence[Worker], cached: dict[str, int]
    ) -> tuple[int, WorkerId | None]:
        """The most of its blocks on a worker of the pool, and which that is."""
        if ask.shape.output_tokens:
            return 0, None  # One that goes on is not given a prefix.
        best, holder = 0, None
        for worker in workers:
            if cached.get(worker.id, 0) > best:
                best, holder = cached[worker.id], worker.id
        return best, holder

    def _fetches(self, blocks: int, best: int) -> bool:
        return best > blocks and best > self._theta * blocks

    def _times_s(self, ask: Ask, blocks: int, best: int) -> tuple[float, float]:
        """Predicted transfer, and prefill after it."""
        transfer_s = 0.0
        if self._fetches(blocks, best):
            transfer_s = self._setup.prefill_times.transfer_s(best - blocks)
            blocks = best
        return transfer_s, self._setup.prefill_s(ask.shape.prompt_tokens, ask.tokens(blocks))

    def _least_time_between_tokens(self, ask: Ask, workers: Sequence[Worker]) -> Choice:
        tokens = ask.shape.prompt_tokens + ask.shape.output_tokens
        step_s, role = self._setup.decode_times.step_s, Part.DECODE.role
        work = StepWork()
        candidates = []
        for worker in workers:
            count = self.counts.at(worker.id)
            work.decode_requests = count.in_flight + 1
            work.decode_context_tokens = count.context_tokens + tokens
            numbers = (0.0, 0.0, 0.0, 0, count.in_flight, count.context_tokens)
            candidates.append(Candidate(worker.id, role, step_s(work), numbers))
        return Choice(min(candidates, key=lambda each: each.cost).worker, candidates)


class MooncakeRejecting(Mooncake):
    """With the rejection of Algorithm 1."""

    def refuses(self, now_s: float, view: View, shape: Shape, slo: Slo) -> bool:
        """See `simulator.cluster.Refusing`."""
        prefill, decode = view.pool.usable(Role.PREFILL), view.pool.usable(Role.DECODE)
        if not decode:
            return False  # Nobody can tell when there will be one.
        ask = Ask(now_s, view, shape)
        first = self.choose(ask, prefill or decode, Part.PREFILL if prefill else Part.WHOLE)
        second = self._least_time_between_tokens(ask, decode)
        return _least(first) > slo.ttft_s or _least(second) > slo.tpot_s


def _least(choice: Choice) -> float:
    return min(each.cost for each in choice.candidates)
