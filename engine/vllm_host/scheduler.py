"""vLLM's scheduler, taught to resume: tokens generated elsewhere enter as output tokens.

As output, not as prompt, because penalties, `min_tokens`, seeds and grammars all look at what was
generated. Loaded by vLLM in the engine process (`scheduler_cls`).
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

from vllm.logger import init_logger
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.request import Request, RequestStatus

from engine.vllm_host.block_events import StepBlockEvents
from engine.vllm_host.grammar_budget import TimedGrammar
from protos.block_events import encode_block_events
from protos.enginecore import resumed_output_token_ids

logger = init_logger(__name__)

_TELL_S: Final = 1.0
"""How often an engine with work tells that it steps, if there is nothing else to tell."""


def injected_token_ids(request: Request) -> list[int]:
    """The output tokens that `request` was submitted with."""
    params = request.sampling_params
    return resumed_output_token_ids(params.extra_args if params is not None else None)


@dataclass
class StepStats(SchedulerStats):  # type: ignore[misc]
    """A step's figures, and what it changed in the prefix cache."""

    block_events: bytes = b""
    """By `protos.block_events`; the key under which the worker finds them."""


class BatonScheduler(Scheduler):  # type: ignore[misc]
    """For engines that schedule a step after the one before has ended."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._grammar_is_behind: set[str] = set()
        self._grammars: dict[str, TimedGrammar] = {}
        self._last_stats: tuple[float, ...] = ()
        self._told_s = 0.0
        self._block_events = StepBlockEvents(self.kv_cache_manager, self.cache_config.block_size)
        self.kv_event_publisher = self._block_events

    def add_request(self, request: Request) -> None:
        tokens = injected_token_ids(request)
        if tokens and request.request_id not in self.requests:
            request.append_output_token_ids(tokens)
            if request.use_structured_output:
                self._grammar_is_behind.add(request.request_id)
            # vLLM asserts that what is cached is part of the prompt; here it may reach beyond.
            request.prefill_stats = request.prefill_stats if len(tokens) == 1 else None
        super().add_request(request)

    def _handle_blocked_waiting_request(self, request: Request) -> bool:
        compiled = request.status == RequestStatus.WAITING_FOR_STRUCTURED_OUTPUT_GRAMMAR
        ready: bool = super()._handle_blocked_waiting_request(request)
        if compiled and ready:
            grammar = TimedGrammar(request.structured_output_request.grammar)
            self._grammars[request.request_id] = grammar
            request.structured_output_request.grammar = grammar
        if (
            ready
            and request.request_id in self._grammar_is_behind
            and request.status != RequestStatus.WAITING_FOR_STRUCTURED_OUTPUT_GRAMMAR
        ):
            self._grammar_is_behind.discard(request.request_id)
            if not self.structured_output_manager.accept_tokens(
                request, injected_token_ids(request)
            ):
                # Ends the request with an error, as a grammar that doesn't compile does.
                self.grammar_compile_error_reqs.add(request.request_id)
                return False
        return ready

    def update_from_output(self, *args: Any, **kwargs: Any) -> dict[int, EngineCoreOutputs]:
        """End those whose grammars hold up everybody else."""
        for request_id, grammar in list(self._grammars.items()):
            if request_id not in self.requests:
                del self._grammars[request_id]
            elif grammar.is_over_budget:
                logger.warning(
                    "Ending %s: its grammar took %.1f s of CPU time.", request_id, grammar.used_s
                )
                # Ends the request with an error, as a grammar that doesn't compile does.
                self.grammar_compile_error_reqs.add(request_id)
        outputs: dict[int, EngineCoreOutputs] = super().update_from_output(*args, **kwargs)
        return outputs

    def finish_requests(
        self, request_ids: str | Iterable[str] | None, finished_status: RequestStatus
    ) -> list[Request]:
        """Abort; of a request that was handed off and waits to be fetched, free the blocks."""
        if request_ids is not None and self.connector is not None:
            request_ids = [request_ids] if isinstance(request_ids, str) else list(request_ids)
            for request_id in request_ids:
                request = self.requests.get(request_id)
                if request is not None and request.is_finished():
                    self.connector.release(request_id)
                self._grammar_is_behind.discard(request_id)
        finished: list[Request] = super().finish_requests(request_ids, finished_status)
        return finished

    def make_stats(self, *args: Any, **kwargs: Any) -> SchedulerStats | None:
        """The step's figures; None when they are those of the step before, told a moment ago.

        An engine whose blocks wait to be fetched steps every millisecond with nothing to tell; that
        it does step must be told now and then.
        """
        stats = super().make_stats(*args, **kwargs)
        if stats is None:
            return None
        block_events = self._block_events.take()
        gauges = (stats.num_running_reqs, stats.num_waiting_reqs, stats.kv_cache_usage)
        now_s = time.monotonic()
        quiet = (
            gauges == self._last_stats
            and now_s - self._told_s < _TELL_S
            and not stats.num_running_reqs
            and not stats.kv_connector_stats
            and not stats.prefix_cache_stats.requests
            and not block_events
        )
        self._last_stats = gauges
        if quiet:
            return None
        self._told_s = now_s
        if not block_events:
            return stats
        return StepStats(**vars(stats), block_events=encode_block_events(block_events))


class BatonAsyncScheduler(BatonScheduler, AsyncScheduler):  # type: ignore[misc]
    """For engines that schedule a step while the one before runs."""
