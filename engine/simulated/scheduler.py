"""What a step of the simulated engine computes: continuous batching as vLLM's V1 scheduler does it.

A request waits, possibly for a fetch of its KV state, then runs; preemption takes it back to
waiting. Blocks for all its known tokens are reserved on admission (vLLM's
`scheduler_reserve_full_isl`), so only decodes grow, and a fetched request can always run.
Boundary: queues and blocks. What tokens are and what a client is told is the core's.
"""

from __future__ import annotations

from bisect import insort
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from engine.latency_model import StepTimes, StepWork
from engine.simulated.kv_cache import BlockPool
from engine.simulated.request import QueuedRequest
from protos.block_events import BlockEvent, BlocksRemoved, BlocksStored
from protos.enginecore import PrefillStats
from protos.errors import ConfigError


@dataclass(frozen=True, slots=True)
class SimulatedLimits:
    """What bounds a simulated engine."""

    engine_id: str
    block_size_tokens: int
    kv_blocks: int
    max_model_len_tokens: int
    max_running_requests: int
    max_step_tokens: int
    kv_lease_s: float
    """How long the blocks of a handed-off request are kept for a reader."""

    def __post_init__(self) -> None:
        if self.kv_blocks * self.block_size_tokens < self.max_model_len_tokens:
            raise ConfigError(
                f"num_gpu_blocks_override={self.kv_blocks} blocks of {self.block_size_tokens} "
                f"tokens can't hold one request of max_model_len={self.max_model_len_tokens}; "
                "raise the one or lower the other"
            )
        if self.max_step_tokens < self.max_running_requests:
            raise ConfigError(
                f"max_num_batched_tokens={self.max_step_tokens} must be at least "
                f"max_num_seqs={self.max_running_requests}: each may decode in every step"
            )


@dataclass(slots=True)
class Work:
    """What one step computes: each request with its number of tokens."""

    items: list[tuple[QueuedRequest, int]] = field(default_factory=list)
    cost: StepWork = field(default_factory=StepWork)

    def include(self, request: QueuedRequest, tokens: int) -> None:
        """A request whose newest token alone is missing costs what a decode costs."""
        self.items.append((request, tokens))
        if request.decoding:
            self.cost.add_decode(request.computed_tokens)
        else:
            self.cost.add_prefill(tokens, request.computed_tokens)


class Scheduler:
    """The queues of one engine and the blocks that its requests hold."""

    def __init__(
        self,
        limits: SimulatedLimits,
        times: StepTimes,
        pool: BlockPool,
        counters: Counter[str],
    ) -> None:
        self._limits = limits
        self._times = times
        self._pool = pool
        self._counters = counters
        # Each request is on one of these, in the order in which they are served.
        self._waiting: list[QueuedRequest] = []
        self._fetching: list[QueuedRequest] = []
        self._fetched: list[QueuedRequest] = []
        self._running: list[QueuedRequest] = []
        self._stored: dict[bytes, BlocksStored] = {}
        """By hash: blocks that were published since `take_block_events`."""

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def next_fetched_s(self) -> float | None:
        """When the next fetch completes."""
        return self._fetching[0].fetched_s if self._fetching else None

    def add(self, request: QueuedRequest) -> None:
        """Queue it by priority, then arrival."""
        insort(self._waiting, request, key=_order)

    def remove(self, request: QueuedRequest) -> None:
        """Take it off its queue. Its blocks are the caller's to release."""
        for queue in (self._running, self._waiting, self._fetching, self._fetched):
            if request in queue:
                queue.remove(request)
                return
        raise AssertionError(f"{request.request_id} is on no queue")

    def plan(self, now_s: float) -> Work:
        """Take completed fetches in and decide the step: decodes, begun prompts, new prompts."""
        self._complete_fetches(now_s)
        work = Work()
        self._schedule_decodes(work)
        self._schedule_prefills(now_s, work)
        return work

    def take_block_events(self) -> list[BlockEvent]:
        """What came into the prefix cache and went since the last call."""
        removed, stored = self._pool.take_changes()
        told, self._stored = self._stored, {}
        events: list[BlockEvent] = [BlocksRemoved(removed)] if removed else []
        return [*events, *(told[content] for content in stored)]

    def steady_steps(self, work: Work) -> int:
        """How many steps in a row this one can be: until the first of its requests ends.

        1 if anything but the requests' own growth may change the next step, or if a request makes
        its first token here, which has to be told (one that was fetched computes nothing before).
        Whoever takes several as one ends them before something comes in: a request, or a fetch that
        completes.
        """
        if work.cost.prefill_tokens or not work.items or len(work.items) != len(self._running):
            return 1
        if any(request.prefill_stats is not None for request, _ in work.items):
            return 1
        steps = min(request.max_tokens - request.known_tokens for request, _ in work.items)
        blocks = len(work.items) * (self._blocks_for(steps) + 1)
        return max(1, steps) if blocks <= self._pool.free_blocks else 1

    def check_integrity(self, requests: Mapping[str, QueuedRequest]) -> None:
        """Assert that these are the queued ones and that those that wait have no KV state."""
        queued = [*self._waiting, *self._fetching, *self._fetched, *self._running]
        assert len(queued) == len(requests)
        assert all(requests[request.request_id] is request for request in queued)
        for request in self._waiting:
            assert not request.block_ids
            assert request.computed_tokens == request.published_blocks == 0
        assert self._running == sorted(self._running, key=_order)

    def _complete_fetches(self, now_s: float) -> None:
        while self._fetching and self._fetching[0].fetched_s <= now_s:
            request = self._fetching.pop(0)
            source, request.source = request.source, None
            assert source is not None, "fetched without a manifest"
            # What can't be verified is recomputed into the same blocks.
            if source.digest == request.digest(source.tokens):
                request.computed_tokens = request.fetchable_tokens(source)
                self._publish(request, request.computed_tokens)
                _attribute_fetch(request)
            else:
                self._counters["baton:kv_verification_failures_total"] += 1
            insort(self._fetched, request, key=_order)

    def _schedule_decodes(self, work: Work) -> None:
        """Schedule one token of each decode. Preempts where blocks run out."""
        index, size = 0, self._limits.block_size_tokens
        # Preemption shortens the list from its end, so what is scheduled stays so.
        while index < len(self._running):
            request = self._running[index]
            index += 1
            if not request.decoding:
                continue
            if request.known_tokens > size * len(request.block_ids) and not self._grow(request):
                continue
            work.include(request, 1)
            if (request.computed_tokens + 1) % size == 0:
                self._publish(request, request.computed_tokens + 1)

    def _grow(self, request: QueuedRequest) -> bool:
        """Give a decode the block for its newest token; False if it was preempted itself."""
        missing = self._blocks_for(request.known_tokens) - len(request.block_ids)
        while not self._pool.can_hold((), missing):
            victim = self._running.pop()
            self._preempt(victim)
            if victim is request:
                return False
        request.block_ids += self._pool.hold((), missing)
        return True

    def _preempt(self, request: QueuedRequest) -> None:
        self._pool.release(request.block_ids)
        request.block_ids = []
        request.computed_tokens = request.published_blocks = 0
        self._counters["vllm:num_preemptions_total"] += 1
        insort(self._waiting, request, key=_order)

    def _schedule_prefills(self, now_s: float, work: Work) -> None:
        """Spend what is left of the budget on prompts: those begun, then new ones as they fit."""
        budget_tokens = self._limits.max_step_tokens - work.cost.decode_requests
        for request in self._running:
            if budget_tokens and not request.decoding:
                budget_tokens -= self._schedule(work, request, budget_tokens)
        while budget_tokens and len(self._running) < self._limits.max_running_requests:
            admitted = self._admit_next(now_s)
            if admitted is None:
                return
            insort(self._running, admitted, key=_order)
            budget_tokens -= self._schedule(work, admitted, budget_tokens)

    def _admit_next(self, now_s: float) -> QueuedRequest | None:
        """Take the next request that can run off its queue; starts fetches on the way."""
        if self._fetched:
            return self._fetched.pop(0)
        while self._waiting and self._reserve(self._waiting[0]):
            request = self._waiting.pop(0)
            if not self._begin_fetch(now_s, request):
                return request
        return None

    def _reserve(self, request: QueuedRequest) -> bool:
        """Hold blocks for all its tokens, those with cached content first, if there are enough."""
        tokens, size = request.known_tokens, self._limits.block_size_tokens
        # At least one token has to be computed to know the next one.
        cached = self._pool.match(request.block_hashes((tokens - 1) // size, size))
        missing = self._blocks_for(tokens) - len(cached)
        if not self._pool.can_hold(cached, missing):
            return False
        request.block_ids = self._pool.hold(cached, missing)
        request.computed_tokens = len(cached) * size
        request.published_blocks = len(cached)
        if not request.admitted_before:
            request.admitted_before = True
            self._counters["vllm:prefix_cache_queries_total"] += tokens
            self._counters["vllm:prefix_cache_hits_total"] += request.computed_tokens
            _attribute_local(request)
        return True

    def _begin_fetch(self, now_s: float, request: QueuedRequest) -> bool:
        """Start to fetch what its manifest has beyond the local cache; False if nothing."""
        source = request.source
        if source is None or request.fetchable_tokens(source) <= request.computed_tokens:
            request.source = None
            return False
        blocks = self._blocks_for(request.fetchable_tokens(source)) - request.published_blocks
        request.fetched_s = now_s + self._times.transfer_s(blocks)
        insort(self._fetching, request, key=_fetched_s)
        return True

    def _schedule(self, work: Work, request: QueuedRequest, budget_tokens: int) -> int:
        """Put as many of its remaining tokens into the step as fit; returns how many."""
        tokens = min(request.remaining_tokens, budget_tokens)
        work.include(request, tokens)
        # Published before it is computed, as in vLLM: those that share a prefix may share a step.
        self._publish(request, request.computed_tokens + tokens)
        return tokens

    def _publish(self, request: QueuedRequest, tokens: int) -> None:
        full_blocks = tokens // self._limits.block_size_tokens
        if full_blocks == request.published_blocks:
            return
        size = self._limits.block_size_tokens
        hashes = request.block_hashes(full_blocks, size)
        for index in range(request.published_blocks, len(hashes)):
            if (
                self._pool.publish(request.block_ids[index], hashes[index])
                and (stored := request.block_stored(index, size)) is not None
            ):
                self._stored[hashes[index]] = stored
        request.published_blocks = full_blocks

    def _blocks_for(self, tokens: int) -> int:
        return -(-tokens // self._limits.block_size_tokens)


def _order(request: QueuedRequest) -> tuple[int, int]:
    return request.order


def _fetched_s(request: QueuedRequest) -> float:
    return request.fetched_s


def _attribute_local(request: QueuedRequest) -> None:
    """Begin its prefill statistics: of the prompt, what is cached here and what is computed."""
    local = min(request.computed_tokens, request.prompt_tokens)
    request.prefill_stats = PrefillStats(
        num_prompt_tokens=request.prompt_tokens,
        num_computed_tokens=request.prompt_tokens - local,
        num_cached_tokens=local,
        num_local_cached_tokens=local,
    )


def _attribute_fetch(request: QueuedRequest) -> None:
    """Move what was fetched of the prompt from computed to external."""
    stats = request.prefill_stats
    assert stats is not None, "fetched before it was admitted"
    cached = min(request.computed_tokens, request.prompt_tokens)
    stats.num_external_cached_tokens = cached - stats.num_local_cached_tokens
    stats.num_cached_tokens = cached
    stats.num_computed_tokens = request.prompt_tokens - cached
