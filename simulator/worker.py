"""A worker of the simulated cluster: the simulated engine, and what a worker makes of its steps.

Pure: whoever owns the clock calls it when something is due. Its engine takes steady decode steps
many at a time, ended early where something comes in between, which changes no time, and no order
but of what happens at one time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, NamedTuple

from engine.base import NOTHING_PLACED, EngineLoad
from engine.latency_model import StepTimes
from engine.profiles import EngineProfile
from engine.simulated.core import SimulatedCore
from engine.simulated.request import CountedRequest, Manifest
from engine.simulated.scheduler import SimulatedLimits
from engine.work_by_router import Share, WorkByRouter
from kvstore.index_feed import CacheChange, CacheSnapshot
from protos.enginecore import ENGINE_TAG, FINISH_LENGTH, EngineOutput
from protos.ids import Attempt, Incarnation, RequestKey, WorkerId
from router.core.events import (
    AbortOn,
    CacheReported,
    Finish,
    OutputReport,
    PromptUse,
    Reserve,
    Role,
    StepReported,
    Submit,
    TellQueued,
    WorkerUp,
)

INCARNATION: Final = Incarnation(1)
KV_LEASE_S: Final = 30.0


class Asked(NamedTuple):
    """What a request is to the engines: its lengths, and what its prompt shares with others."""

    prompt_tokens: int
    output_tokens: int
    prompt_hashes: Sequence[bytes]
    """Of its full blocks."""


@dataclass(slots=True)
class _Attempt:
    """One submission."""

    key: RequestKey
    number: Attempt
    request: CountedRequest
    told_tokens: int
    """Output tokens that the router knows."""
    handed_over: bool
    """Another worker computed its prompt."""
    router: int
    share: Share


@dataclass(slots=True)
class _Steps:
    """What the engine is doing: steps of one kind, and when the last of them ends."""

    began_s: float
    ends_s: float
    count: int


@dataclass(slots=True)
class SimulatedWorker:
    """One engine and the requests on it."""

    id: WorkerId
    role: Role
    profile: EngineProfile
    block_tokens: int
    manifests: dict[bytes, dict[str, Any]]
    """Of all workers, by name: where handed-off blocks are."""
    _engine: SimulatedCore = field(init=False)
    work: WorkByRouter = field(default_factory=WorkByRouter)
    _attempts: dict[str, _Attempt] = field(default_factory=dict)
    _load: EngineLoad = field(default_factory=EngineLoad)
    _steps: _Steps | None = None
    _arrivals: int = 0
    _changes: int = 0
    busy_s: float = 0.0
    """Time in which it computed."""
    cached_tokens: int = 0
    """Prompt tokens that were to be computed here and were not, since they were in its own cache or
    in one that they were fetched from."""

    def __post_init__(self) -> None:
        limits = SimulatedLimits(
            engine_id=self.id,
            block_size_tokens=self.block_tokens,
            kv_blocks=self.kv_blocks,
            max_model_len_tokens=self.max_model_len_tokens,
            max_running_requests=self.profile.max_running_requests,
            max_step_tokens=self.profile.max_step_tokens,
            kv_lease_s=KV_LEASE_S,
        )
        times = StepTimes(self.profile.timing(self.block_tokens))
        self._engine = SimulatedCore(limits, times, first_and_last_only=True)

    @property
    def kv_blocks(self) -> int:
        return self.profile.kv_tokens // self.block_tokens

    @property
    def max_model_len_tokens(self) -> int:
        """A request that no cache holds is refused."""
        return min(self.profile.max_model_len_tokens, self.kv_blocks * self.block_tokens)

    def up(self) -> WorkerUp:
        """Its greeting."""
        return WorkerUp(
            self.id, INCARNATION, self.role, ENGINE_TAG, self.block_tokens, self.kv_blocks,
            self.max_model_len_tokens,
        )  # fmt: skip

    def cache(self) -> CacheReported:
        """Its first report."""
        return CacheReported(self.id, INCARNATION, CacheSnapshot(0, ()))

    def lend(self, hashes: Sequence[bytes]) -> Manifest:
        """What of these blocks is here for another worker to read. They are read as they are now,
        whatever becomes of them here."""
        blocks = self._engine.lend(hashes)
        tokens = blocks * self.block_tokens
        return Manifest(self.id, request_id="", block_ids=(), tokens=tokens, digest="")

    def submit(
        self, now_s: float, router: int, command: Submit, asked: Asked,
        lent: Manifest | None = None,
    ) -> None:  # fmt: skip
        """Take a router's request; where it says what to fetch of the prompt, with what was lent
        of that."""
        self._interrupt(now_s)
        known = asked.prompt_tokens + len(command.output_token_ids)
        self._arrivals += 1
        handed_over = self._manifest(command.manifest)
        request_id = f"{command.key}#{command.attempt}"
        request = CountedRequest(
            request_id=request_id,
            order=(0, self._arrivals),
            prompt_tokens=asked.prompt_tokens,
            known_tokens=known,
            max_tokens=known + 1 if command.hand_off else self._longest(asked),
            hand_off=command.hand_off,
            source=handed_over or lent,
            prompt_hashes=asked.prompt_hashes,
        )
        to_compute = 0 if handed_over is not None else command.to_compute_tokens or known
        self.work.release(str(router), command.key)
        share = self.work.add(str(router), known, to_compute, decodes=not command.hand_off)
        self._attempts[request_id] = _Attempt(
            command.key, command.attempt, request, len(command.output_token_ids),
            handed_over is not None, router, share,
        )  # fmt: skip
        self._engine.enter(request)

    def reserve(self, router: int, command: Reserve) -> None:
        """Take what a router says will come, or that it won't."""
        if command.context_tokens:
            self.work.reserve(str(router), command.key, command.context_tokens)
        else:
            self.work.release(str(router), command.key)

    def queue(self, now_s: float, router: int, command: TellQueued) -> None:
        """Take what a router says that waits there."""
        self.work.queue(now_s, str(router), command.queued)

    def abort(self, now_s: float, command: AbortOn) -> None:
        """End an attempt, or free the blocks that it left."""
        self._interrupt(now_s)
        request_id = f"{command.key}#{command.attempt}"
        attempt = self._attempts.pop(request_id, None)
        if attempt is not None:
            self.work.end(attempt.share)
        self.manifests.pop(request_id.encode(), None)
        self._engine.abort([request_id])

    @property
    def computing(self) -> bool:
        """A step is under way."""
        return self._steps is not None

    def next_s(self, now_s: float, slowdown: float | None = None) -> float | None:
        """When `finish` is due; begins to work if there is anything to do. `slowdown`: as many
        times as long a step takes that begins now; None if that is 1 for all."""
        if self._steps is None:
            plan = self._engine.start_step(now_s)
            if plan is None:
                return self._engine.wake_s()
            wake_s = self._engine.wake_s()
            count = plan.steady_steps if slowdown is None else 1
            if count > 1 and wake_s is not None:
                count = min(count, self._engine.steps_within(wake_s - now_s))
            duration_s = self._engine.steps_s(count) if count > 1 else plan.duration_s
            if slowdown is not None:
                duration_s *= slowdown
            self._steps = _Steps(now_s, now_s + duration_s, count)
        return self._steps.ends_s

    def finish(self, now_s: float, routers: int = 1) -> list[list[StepReported | CacheReported]]:
        """What each router is to be told of the steps that end now; nothing if none do."""
        steps = self._steps
        if steps is None or steps.ends_s > now_s:
            return []
        self._steps = None
        self.busy_s += steps.ends_s - steps.began_s
        if steps.count > 1:
            self._engine.take_steps(steps.count)
        done = self._engine.finish_step(now_s)
        outputs: list[list[OutputReport]] = [[] for _ in range(routers)]
        for output in done.outputs:
            outputs[self._attempts[output.request_id].router].append(self._report(output))
        told: list[list[StepReported | CacheReported]] = [
            [self._step(now_s, router, outputs[router], done.load)] for router in range(routers)
        ]
        # What is told of it between steps is no step's.
        self._load = replace(done.load, step_time_s=0.0)
        change = self._cache_change()
        if change is not None:
            for reports in told:
                reports.append(change)
        self.work.told()
        return told

    def told_of_others(self, now_s: float, routers: int) -> list[tuple[int, StepReported]]:
        """Routers that are to be told of others' work, which changed between steps."""
        beside = self.work.changed_beside(str(router) for router in range(routers))
        self.work.told()
        return [(int(router), self._step(now_s, int(router), [], self._load)) for router in beside]

    def _step(
        self, now_s: float, router: int, outputs: list[OutputReport], load: EngineLoad
    ) -> StepReported:
        others = self.work.others(str(router)) or NOTHING_PLACED
        queued = self.work.queued_beside(now_s, str(router))
        return StepReported(self.id, INCARNATION, outputs, load, others, queued)

    def check_idle(self) -> None:
        """Assert that nothing is left of all that was served."""
        self._engine.check_integrity()
        assert not self._attempts
        assert self._steps is None

    def _interrupt(self, now_s: float) -> None:
        """Of several steps, those that have not begun are not taken as they were planned."""
        steps = self._steps
        if steps is not None and steps.count > 1 and now_s < steps.ends_s:
            begun = self._engine.steps_within(now_s - steps.began_s)
            if begun < steps.count:
                steps.count = begun
                steps.ends_s = steps.began_s + self._engine.steps_s(begun)

    def _report(self, output: EngineOutput) -> OutputReport:
        attempt = self._attempts[output.request_id]
        first = attempt.told_tokens
        position = attempt.request.output_tokens
        attempt.told_tokens = position
        if not attempt.share.begun:
            self.work.begin(attempt.share)
        finish, manifest = Finish.NOT_FINISHED, b""
        if output.finish_reason is not None:
            assert output.finish_reason == FINISH_LENGTH
            finish = Finish.LENGTH
            self.work.end(self._attempts.pop(output.request_id).share)
            if output.kv_transfer_params is not None:
                manifest = output.request_id.encode()
                self.manifests[manifest] = output.kv_transfer_params
        use = None
        if (stats := output.prefill_stats) is not None:
            if not attempt.handed_over:
                self.cached_tokens += stats.num_cached_tokens
            use = PromptUse(
                stats.num_prompt_tokens, stats.num_computed_tokens, stats.num_local_cached_tokens,
                stats.num_external_cached_tokens,
            )  # fmt: skip
        return OutputReport(
            attempt.key, attempt.number, first, _ZEROS[: position - first], b"", finish, manifest,
            prompt_use=use,
        )  # fmt: skip

    def _longest(self, asked: Asked) -> int:
        # An output that does not fit is cut, as vLLM does.
        return min(asked.prompt_tokens + asked.output_tokens, self.max_model_len_tokens)

    def _manifest(self, name: bytes) -> Manifest | None:
        params: Mapping[str, Any] | None = self.manifests.get(name)
        return None if params is None else Manifest.from_params(dict(params))

    def _cache_change(self) -> CacheReported | None:
        removed, stored = self._engine.take_cache_changes()
        if not removed and not stored:
            return None
        self._changes += 1
        return CacheReported(self.id, INCARNATION, CacheChange(self._changes, removed, stored))


_ZEROS: Final = [0] * 131_072
"""Tokens that nobody reads."""
