"""Where a request runs: what every policy is asked and answers, and the simplest of them.

Pure: a policy reads the workers and the KV index, and returns a decision with what it compared. It
is told what becomes of its decisions, so that it can count what it has put where. Deciding and
counting are one step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from heapq import nsmallest
from operator import attrgetter
from typing import Any, Final, NamedTuple, Protocol, TypeAlias

from kvstore.index import KvIndex
from protos.ids import RequestKey, WorkerId
from router.core.backlog import Before
from router.core.candidates import KEPT, Candidate
from router.core.events import PrefixFetch, Role, Shape
from router.core.workers import Worker, WorkerPool

REQUEST_WORK_TOKENS: Final = 32
"""What a generating request weighs against prompt tokens that wait to be computed."""
FULL_KV_WORK_TOKENS: Final = 2048
"""What a full KV cache weighs; a part of it counts in proportion."""

TieBreak: TypeAlias = Callable[[int], int]
"""From n to one of 0..n-1: a seeded generator's `randrange`."""


class Reason(StrEnum):
    """Why a request was split over two workers, or was not."""

    LONG_PROMPT = "long_prompt"
    """Split: its prompt is long enough for a prefill worker."""
    SHORT_PROMPT = "short_prompt"
    SPLIT_COSTS_LESS = "split_costs_less"
    """By what was predicted, as the next."""
    WHOLE_COSTS_LESS = "whole_costs_less"
    PROMPT_LOGPROBS = "prompt_logprobs"
    """Whole: what it asks of the prompt can't be handed over."""
    ONE_TOKEN = "one_token"
    """Whole: there is nothing to hand over to."""
    NO_PREFILL_POOL = "no_prefill_pool"
    PREFILL_DOWN = "prefill_down"
    """Whole, degraded: there should be a prefill worker."""
    DECODE_DOWN = "decode_down"
    """Whole on a prefill worker, degraded."""
    RESUME = "resume"
    """It has tokens already and goes on elsewhere."""


class Predicted(NamedTuple):
    """What a decision expects of its request, from when it was made."""

    ttft_s: float | None
    """None of one whose first token is made."""
    tpot_s: float


@dataclass(frozen=True, slots=True)
class Decision:
    """Who runs a request. Without `prefill` it runs on `worker` as a whole."""

    reason: Reason
    prompt_tokens: int
    worker: WorkerId | None
    """None: the policy is asked again once the first token is made."""
    prefill: WorkerId | None
    compared: tuple[str, ...]
    """Names of the candidates' numbers, each with its unit."""
    candidates: Sequence[Candidate]
    """The best of them at least."""
    local_prefill_max_tokens: int | None = None
    """What the prompt's length was held against, if it was."""
    predicted: Predicted | None = None
    """By policies that predict times."""
    left_out: int = 0
    """How many more were compared; each costs no less than those of its part that are kept."""
    fetch: PrefixFetch | None = None
    """What the worker that computes the prompt fetches of it first."""
    to_compute_tokens: int = 0
    """Of its tokens, those that the worker that computes its prompt is expected not to have in its
    cache; 0 of a policy that can't tell."""

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "reason": self.reason,
            "prompt_tokens": self.prompt_tokens,
            "worker": self.worker,
            "prefill": self.prefill,
            "local_prefill_max_tokens": self.local_prefill_max_tokens,
            "predicted": None if self.predicted is None else self.predicted._asdict(),
            "fetch": None if self.fetch is None else self.fetch._asdict(),
            "candidates": [
                {
                    "worker": each.worker,
                    "role": each.role,
                    "cost": each.cost,
                    **dict(zip(self.compared, each.numbers, strict=True)),
                }
                for each in self.candidates
            ],
            "candidates_left_out": self.left_out,
        }


@dataclass(frozen=True, slots=True)
class View:
    """What a policy may know of the cluster."""

    pool: WorkerPool
    index: KvIndex
    """Which workers hold the beginnings of which prompts, by `Shape.addresses`."""
    block_tokens: int
    """What one address stands for."""
    expect_prefill: bool
    local_prefill_max_tokens: int


class Expected(NamedTuple):
    """What a request would get that comes now; and what of that it would get if it were alone."""

    ttft_s: float
    tpot_s: float
    """Once it decodes, among those that will then."""
    alone_ttft_s: float
    """Of its prompt, once its turn has come."""
    alone_tpot_s: float
    output_tokens: float


class Placement(Protocol):
    """A policy. What it counts, it counts by what it is told here.

    It may be told of keys that it never placed or adopted: a former router did.
    """

    held_share: float
    """Of the TTFT that is promised: as long a prompt still waits on its worker once its turn has
    come, by what put off the last that was put off."""

    def place(self, now_s: float, view: View, key: RequestKey, shape: Shape) -> Decision | None:
        """Who runs it; None if nobody can, or not yet: it will be asked again. A request that has
        tokens (`shape.output_tokens`) goes on, on the worker that is chosen, as a whole, and is
        never put off."""
        ...

    def expect(self, now_s: float, view: View, shape: Shape, before: Before) -> Expected | None:
        """What a new request would get behind what waits before it; nothing is counted. None of a
        policy that can't tell, or while nobody can run it."""
        ...

    def adopted(self, now_s: float, key: RequestKey, worker: Worker, shape: Shape) -> None:
        """A request that a former router placed goes on there: it has `shape.output_tokens`, or
        none while its prompt waits or is computed."""
        ...

    def first_token(self, now_s: float, key: RequestKey) -> None:
        """The prompt that was placed is computed; comes again when its second worker goes on."""
        ...

    def stepped(self, now_s: float, worker: Worker) -> None:
        """Its engine took a step and said what it is under now; the step's outputs come next."""
        ...

    def ended(self, now_s: float, key: RequestKey, output_tokens: int | None) -> None:
        """The request is over, after so many tokens if it ended by itself; or it will be placed
        anew. Nothing of it is anywhere."""
        ...

    def stopped(self, kind: str, output_tokens: int) -> None:
        """A request of this kind had a stop string after so many tokens, as is known by now: until
        then it had ended as one whose client left."""
        ...


class Uncounted:
    """For policies that count nothing of their own, put nothing off, and can't tell what a request
    would get."""

    held_share: float = 0.0

    def expect(self, now_s: float, view: View, shape: Shape, before: Before) -> Expected | None:
        """Nobody is refused by them."""
        return None

    def adopted(self, now_s: float, key: RequestKey, worker: Worker, shape: Shape) -> None:
        """Nothing to count."""

    def first_token(self, now_s: float, key: RequestKey) -> None:
        """Nothing to count."""

    def stepped(self, now_s: float, worker: Worker) -> None:
        """Nothing to learn."""

    def ended(self, now_s: float, key: RequestKey, output_tokens: int | None) -> None:
        """Nothing to count."""

    def stopped(self, kind: str, output_tokens: int) -> None:
        """Nothing to learn."""


class LeastPredictedWork(Uncounted):
    """Each part goes to the worker with the least work before it, in prompt tokens."""

    def __init__(self, tie_break: TieBreak) -> None:
        self._tie_break = tie_break

    def place(self, now_s: float, view: View, key: RequestKey, shape: Shape) -> Decision | None:
        """Prompts that are longer than the view says are split."""
        prefill = view.pool.usable(Role.PREFILL)
        decode = view.pool.usable(Role.DECODE)
        if not decode:
            return self._whole(view, shape, Reason.DECODE_DOWN, prefill)
        whole_because = never_split_because(view, shape, bool(prefill))
        if whole_because is None and shape.prompt_tokens <= view.local_prefill_max_tokens:
            whole_because = Reason.SHORT_PROMPT
        if whole_because is not None:
            return self._whole(view, shape, whole_because, decode)
        first, compared = self._least(prefill)
        second, compared_too = self._least(decode)
        best = compared + compared_too
        return Decision(
            Reason.LONG_PROMPT, shape.prompt_tokens, second, first, _COMPARED, best,
            view.local_prefill_max_tokens, left_out=len(prefill) + len(decode) - len(best),
        )  # fmt: skip

    def _whole(
        self, view: View, shape: Shape, reason: Reason, workers: Sequence[Worker]
    ) -> Decision | None:
        if not workers:
            return None
        worker, compared = self._least(workers)
        return Decision(
            reason, shape.prompt_tokens, worker, None, _COMPARED, compared,
            view.local_prefill_max_tokens, left_out=len(workers) - len(compared),
        )  # fmt: skip

    def _least(self, workers: Sequence[Worker]) -> tuple[WorkerId, list[Candidate]]:
        candidates = [_candidate(worker) for worker in workers]
        least = min(each.cost for each in candidates)
        best = [each for each in candidates if each.cost == least]
        chosen = best[self._tie_break(len(best)) if len(best) > 1 else 0]
        kept = nsmallest(KEPT, candidates, key=attrgetter("cost"))
        if chosen not in kept:  # Of many equals, chance chose another.
            kept[-1] = chosen
        return chosen.worker, kept


_COMPARED: Final = ("prefill_tokens", "requests", "kv_use")


def _candidate(worker: Worker) -> Candidate:
    """A worker's predicted work, other routers' included."""
    load, others = worker.load, worker.others
    prefill_tokens = worker.reserved_prefill_tokens + others.prompt_tokens
    requests = max(worker.reserved_requests + others.decodes, load.running + load.waiting)
    kv_use = load.kv_blocks_used / load.kv_blocks_total if load.kv_blocks_total else 0.0
    work = prefill_tokens + REQUEST_WORK_TOKENS * requests + FULL_KV_WORK_TOKENS * kv_use
    numbers = (prefill_tokens, requests, kv_use)
    return Candidate(worker.id, worker.role, work, numbers)


NEVER_SPLIT: Final = frozenset((Reason.PROMPT_LOGPROBS, Reason.ONE_TOKEN))
"""Of requests that could be split, and may not."""


def never_split_because(view: View, shape: Shape, prefill_up: bool) -> Reason | None:
    """Why no policy can split it; None if one may."""
    if shape.output_tokens:
        return Reason.RESUME
    if not prefill_up:
        return Reason.PREFILL_DOWN if view.expect_prefill else Reason.NO_PREFILL_POOL
    if shape.prompt_logprobs:
        return Reason.PROMPT_LOGPROBS
    if shape.max_tokens == 1:
        return Reason.ONE_TOKEN
    return None
