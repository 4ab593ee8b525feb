"""Where a request runs: policies that compare workers, and the decision with its reason.

Pure: a policy reads the workers and returns a decision; the caller reserves in the same step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, Protocol, TypeAlias

from protos.ids import WorkerId
from router.core.events import Role
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


@dataclass(frozen=True, slots=True)
class Shape:
    """What a policy may know of a request."""

    prompt_tokens: int
    max_tokens: int | None
    prompt_logprobs: bool = False
    output_tokens: int = 0
    """Generated so far."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """One worker and the numbers that were compared: least `work` wins."""

    worker: WorkerId
    role: Role
    prefill_tokens: int
    requests: int
    kv_use: float
    work: float


@dataclass(frozen=True, slots=True)
class Decision:
    """Who runs a request. Without `prefill` it runs on `worker` as a whole."""

    reason: Reason
    prompt_tokens: int
    local_prefill_max_tokens: int
    worker: WorkerId
    prefill: WorkerId | None
    candidates: tuple[Candidate, ...]


@dataclass(frozen=True, slots=True)
class View:
    """What a policy may know of the cluster."""

    pool: WorkerPool
    expect_prefill: bool
    local_prefill_max_tokens: int


class Placement(Protocol):
    """A policy. Changes nothing but its own tie breaking."""

    def place(self, view: View, shape: Shape) -> Decision | None:
        """Who runs it; None if nobody can."""
        ...


class LeastPredictedWork:
    """Each part goes to the worker with the least work before it, in prompt tokens."""

    def __init__(self, tie_break: TieBreak) -> None:
        self._tie_break = tie_break

    def place(self, view: View, shape: Shape) -> Decision | None:
        prefill = view.pool.usable(Role.PREFILL)
        decode = view.pool.usable(Role.DECODE)
        if not decode:
            return self._whole(view, shape, Reason.DECODE_DOWN, prefill)
        whole_because = _whole_because(view, shape, bool(prefill))
        if whole_because is not None:
            return self._whole(view, shape, whole_because, decode)
        first, compared = self._least(prefill)
        second, compared_too = self._least(decode)
        return Decision(
            Reason.LONG_PROMPT, shape.prompt_tokens, view.local_prefill_max_tokens,
            worker=second, prefill=first, candidates=compared + compared_too,
        )  # fmt: skip

    def _whole(
        self, view: View, shape: Shape, reason: Reason, workers: Sequence[Worker]
    ) -> Decision | None:
        if not workers:
            return None
        worker, compared = self._least(workers)
        return Decision(
            reason, shape.prompt_tokens, view.local_prefill_max_tokens,
            worker=worker, prefill=None, candidates=compared,
        )  # fmt: skip

    def _least(self, workers: Sequence[Worker]) -> tuple[WorkerId, tuple[Candidate, ...]]:
        candidates = tuple(candidate(worker) for worker in workers)
        least = min(each.work for each in candidates)
        best = [each.worker for each in candidates if each.work == least]
        return best[self._tie_break(len(best)) if len(best) > 1 else 0], candidates


def candidate(worker: Worker) -> Candidate:
    """A worker's predicted work. What other routers put on it shows in its reported load alone."""
    load = worker.load
    requests = max(worker.reserved_requests, load.running + load.waiting)
    kv_use = load.kv_blocks_used / load.kv_blocks_total if load.kv_blocks_total else 0.0
    work = (
        worker.reserved_prefill_tokens
        + REQUEST_WORK_TOKENS * requests
        + FULL_KV_WORK_TOKENS * kv_use
    )
    return Candidate(worker.id, worker.role, worker.reserved_prefill_tokens, requests, kv_use, work)


def _whole_because(view: View, shape: Shape, prefill_up: bool) -> Reason | None:
    if shape.output_tokens:
        return Reason.RESUME
    if not prefill_up:
        return Reason.PREFILL_DOWN if view.expect_prefill else Reason.NO_PREFILL_POOL
    if shape.prompt_logprobs:
        return Reason.PROMPT_LOGPROBS
    if shape.max_tokens == 1:
        return Reason.ONE_TOKEN
    if shape.prompt_tokens <= view.local_prefill_max_tokens:
        return Reason.SHORT_PROMPT
    return None


POLICIES: Final[dict[str, Callable[[TieBreak], Placement]]] = {
    "least_predicted_work": LeastPredictedWork,
}
