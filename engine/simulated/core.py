"""The simulated engine on virtual time: requests in, steps out. Pure and synchronous.

Whoever owns the clock drives it: `start_step` plans a step and says how long it takes, after which
`finish_step` tells what came of it. Where there is nothing to compute, `wake_s` says when to ask
again. The asyncio engine and the simulator's event loop run this same object.

It obeys the sampling parameters that decide a request's length, and makes no logprobs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from engine.base import EngineLoad, EngineStep
from engine.latency_model import StepTimes
from engine.simulated.kv_cache import BlockPool
from engine.simulated.request import Manifest, QueuedRequest, SimulatedRequest
from engine.simulated.scheduler import Scheduler, SimulatedLimits, Work
from protos.block_events import BlockEvent
from protos.enginecore import (
    FINISH_ABORT,
    FINISH_ERROR,
    FINISH_LENGTH,
    FINISH_STOP,
    EngineOutput,
    EngineRequest,
    PrefillStats,
)

_FINISH_NAMES = {
    FINISH_STOP: "stop",
    FINISH_LENGTH: "length",
    FINISH_ABORT: "abort",
    FINISH_ERROR: "error",
}


@dataclass(frozen=True, slots=True)
class StepPlan:
    """What a step computes; all 0 where it only tells of ends and freed blocks."""

    prefill_tokens: int
    decode_requests: int
    duration_s: float
    steady_steps: int = 1
    """So many steps in a row compute the same: see `take_steps`."""


@dataclass(frozen=True, slots=True)
class _Pin:
    """Blocks of a handed-off request, kept for the one who fetches them."""

    block_ids: list[int]
    expires_s: float


class SimulatedCore:
    """One engine: its requests, its KV blocks and the tokens that it makes."""

    def __init__(
        self, limits: SimulatedLimits, times: StepTimes, first_and_last_only: bool = False
    ) -> None:
        """Told `first_and_last_only`, steps leave out what requests add in between."""
        self._first_and_last_only = first_and_last_only
        self._limits = limits
        self._times = times
        self._pool = BlockPool(limits.kv_blocks)
        self._counters: Counter[str] = Counter()
        self._scheduler = Scheduler(limits, times, self._pool, self._counters)
        self._arrivals = 0
        self._requests: dict[str, QueuedRequest] = {}
        # In the order of expiry, since all leases are of one length.
        self._pinned: dict[str, _Pin] = {}
        self._work: Work | None = None
        self._steps_taken = 1
        # What the next step tells besides its work.
        self._ended: list[EngineOutput] = []
        self._load_changed = False
        self._previous_finish_s: float | None = None

    def add(self, request: EngineRequest) -> None:
        """Queue a request. One that can't be served ends with an error in the next step."""
        assert request.request_id not in self._requests, f"{request.request_id} was added twice"
        self._arrivals += 1
        try:
            added = SimulatedRequest.read(
                request, self._arrivals, self._limits.max_model_len_tokens
            )
        except ValueError:
            self._tell_end(request.request_id, FINISH_ERROR, None)
            return
        self.enter(added)

    def enter(self, request: QueuedRequest) -> None:
        """Queue a request that was read."""
        # A router that died may have lost the end, not the tokens, of what it resumes.
        if end := request.end():
            self._tell_end(request.request_id, *end)
            return
        self._requests[request.request_id] = request
        self._scheduler.add(request)

    def abort(self, request_ids: Sequence[str]) -> None:
        """End these without output and free their blocks, also those pinned for a reader."""
        for request_id in request_ids:
            if pin := self._pinned.pop(request_id, None):
                self._free(pin.block_ids)
            if request := self._requests.pop(request_id, None):
                request.gone = True
                self._scheduler.remove(request)
                self._free(request.block_ids)
                self._count_end(FINISH_ABORT)
        self._ended = [output for output in self._ended if output.request_id not in request_ids]

    def start_step(self, now_s: float) -> StepPlan | None:
        """Decide what the next step computes; None if there is nothing to compute or to tell."""
        assert self._work is None, "the step before is not finished"
        self._end_leases(now_s)
        work = self._scheduler.plan(now_s)
        if not (work.items or self._ended or self._load_changed):
            self._previous_finish_s = None
            return None
        self._work = work
        if not work.items:
            return StepPlan(0, 0, 0.0)
        return StepPlan(
            work.cost.prefill_tokens, work.cost.decode_requests, self._times.step_s(work.cost),
            self._scheduler.steady_steps(work) if self._first_and_last_only else 1,
        )  # fmt: skip

    def steps_s(self, steps: int) -> float:
        """How long so many of the steady steps take."""
        assert self._work is not None, "no step was started"
        return self._times.repeated_s(self._work.cost, steps)

    def steps_within(self, duration_s: float) -> int:
        """The least number of the steady steps that take at least so long."""
        assert self._work is not None, "no step was started"
        return self._times.steps_within(self._work.cost, duration_s)

    def take_steps(self, steps: int) -> None:
        """The step under way stands for so many, at most its plan's `steady_steps`: all but the
        last are over."""
        assert self._work is not None, "no step was started"
        self._steps_taken = steps
        for request, _ in self._work.items:
            request.computed_tokens += steps - 1
            request.known_tokens += steps - 1
        self._counters["vllm:generation_tokens_total"] += (steps - 1) * len(self._work.items)

    def finish_step(self, now_s: float) -> EngineStep:
        """Complete the step that was started: tokens, ends, load and counters."""
        assert self._work is not None, "no step was started"
        outputs, made = self._ended, 0
        for request, tokens in self._work.items:
            if request.gone:
                continue
            request.computed_tokens += tokens
            if request.computed_tokens == request.known_tokens:
                made += 1
                token = request.next_token()
                request.append(token)
                if not self._first_and_last_only or request.prefill_stats or request.end():
                    outputs.append(self._output(now_s, request, token))
        self._counters["vllm:generation_tokens_total"] += made
        previous_s = now_s if self._previous_finish_s is None else self._previous_finish_s
        load = EngineLoad(
            running=self._scheduler.running,
            waiting=len(self._requests) - self._scheduler.running,
            kv_blocks_used=self._pool.used_blocks,
            kv_blocks_total=self._pool.blocks_total,
            step_time_s=(now_s - previous_s) / self._steps_taken,
        )
        step = EngineStep(
            outputs, load, {name: float(n) for name, n in self._counters.items() if n}
        )
        self._work, self._ended, self._load_changed, self._steps_taken = None, [], False, 1
        self._counters.clear()
        self._previous_finish_s = now_s
        return step

    def lend(self, hashes: Sequence[bytes]) -> int:
        """How many of these blocks, from the first on, another engine can read here now. To the
        cache that is a use of them."""
        cached = self._pool.match(hashes)
        self._pool.release(self._pool.hold(cached, 0))
        return len(cached)

    def take_cache_changes(self) -> tuple[list[bytes], list[bytes]]:
        """Hashes of blocks that left the prefix cache, and of those in it that came, since the last
        call."""
        return self._pool.take_changes()

    def take_block_events(self) -> list[BlockEvent]:
        """The same, for requests with their tokens, as an engine tells it; one or the other is to
        be called."""
        return self._scheduler.take_block_events()

    def wake_s(self) -> float | None:
        """When a fetch completes or a lease runs out next: `start_step` may then have work."""
        lease_s = next((pin.expires_s for pin in self._pinned.values()), None)
        times_s = (self._scheduler.next_fetched_s, lease_s)
        return min((time_s for time_s in times_s if time_s is not None), default=None)

    def check_integrity(self) -> None:
        """Assert that all blocks and requests are accounted for; for tests, between two steps."""
        self._scheduler.check_integrity(self._requests)
        holders = Counter(
            block for request in self._requests.values() for block in request.block_ids
        )
        holders.update(block for pin in self._pinned.values() for block in pin.block_ids)
        self._pool.check_integrity(holders)

    def _output(self, now_s: float, request: QueuedRequest, token: int) -> EngineOutput:
        output = EngineOutput(request.request_id, [token])
        if request.prefill_stats is not None:
            output.prefill_stats = self._take_prefill_stats(request, request.prefill_stats)
        if end := request.end():
            output.finish_reason, output.stop_reason = end
            output.kv_transfer_params = self._end(now_s, request, output.finish_reason)
        return output

    def _take_prefill_stats(self, request: QueuedRequest, stats: PrefillStats) -> PrefillStats:
        request.prefill_stats = None
        stored = request.published_blocks * self._limits.block_size_tokens
        stored = min(stored, stats.num_prompt_tokens)
        stats.num_cache_creation_tokens = max(0, stored - stats.num_cached_tokens)
        self._counters["vllm:prompt_tokens_total"] += stats.num_prompt_tokens
        for source, tokens in (
            ("local_compute", stats.num_computed_tokens),
            ("local_cache_hit", stats.num_local_cached_tokens),
            ("external_kv_transfer", stats.num_external_cached_tokens),
        ):
            self._counters[f'vllm:prompt_tokens_by_source_total{{source="{source}"}}'] += tokens
        return stats

    def _end(self, now_s: float, request: QueuedRequest, reason: int) -> dict[str, Any] | None:
        """Forget a request; if it is handed off, pin its blocks and return their manifest."""
        del self._requests[request.request_id]
        self._scheduler.remove(request)
        self._count_end(reason)
        if not request.hand_off or reason != FINISH_LENGTH:
            self._free(request.block_ids)
            return None
        expires_s = now_s + self._limits.kv_lease_s
        self._pinned[request.request_id] = _Pin(request.block_ids, expires_s)
        return Manifest(
            engine_id=self._limits.engine_id,
            request_id=request.request_id,
            block_ids=tuple(request.block_ids),
            tokens=request.computed_tokens,
            digest=request.digest(request.computed_tokens),
        ).to_params()

    def _end_leases(self, now_s: float) -> None:
        lapsed = takewhile(lambda item: item[1].expires_s <= now_s, list(self._pinned.items()))
        for request_id, pin in lapsed:
            del self._pinned[request_id]
            self._free(pin.block_ids)

    def _free(self, block_ids: list[int]) -> None:
        self._pool.release(block_ids)
        self._load_changed = True

    def _tell_end(self, request_id: str, reason: int, stop_reason: int | None) -> None:
        self._ended.append(
            EngineOutput(request_id, [], finish_reason=reason, stop_reason=stop_reason)
        )
        self._count_end(reason)

    def _count_end(self, reason: int) -> None:
        name = _FINISH_NAMES[reason]
        self._counters[f'vllm:request_success_total{{finished_reason="{name}"}}'] += 1
