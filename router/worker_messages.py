"""The words between router and workers: protobuf made of commands, and events of protobuf."""

from __future__ import annotations

from engine.base import NOTHING_PLACED, NOTHING_QUEUED, EngineLoad, PlacedWork, Queued
from kvstore.content import ADDRESS_BYTES
from kvstore.index_feed import CacheChange, CacheSnapshot
from protos import worker_pb2
from protos.enginecore import ENGINE_TAG
from protos.ids import Attempt, Incarnation, RequestKey, WorkerId
from router.core.events import (
    AbortOn,
    AskCache,
    CacheReported,
    Forget,
    HeldAttempt,
    LearnedElsewhere,
    OutputReport,
    PromptUse,
    Resend,
    Reserve,
    Role,
    StepReported,
    Submit,
    TellLearned,
    TellQueued,
    WorkerUp,
)
from router.core.shared_margin import Learned, LearnedMargin

ToWorker = Submit | Reserve | TellQueued | TellLearned | AbortOn | Forget | Resend | AskCache


def command_of(command: ToWorker) -> worker_pb2.Command:
    """A command to a worker, as it is sent."""
    if isinstance(command, AskCache):
        return worker_pb2.Command(ask_cache=worker_pb2.AskCache())
    if isinstance(command, Reserve):
        reserve = worker_pb2.Reserve(request_key=command.key, context_tokens=command.context_tokens)
        return worker_pb2.Command(reserve=reserve)
    if isinstance(command, TellQueued):
        return worker_pb2.Command(queued=worker_pb2.Queued(**command.queued._asdict()))
    if isinstance(command, TellLearned):
        ttft, tpot = (worker_pb2.LearnedMargin(**each._asdict()) for each in command.learned)
        return worker_pb2.Command(learned=worker_pb2.Learned(ttft=ttft, tpot=tpot))
    key, attempt = command.key, command.attempt
    if isinstance(command, Submit):
        submit = worker_pb2.Submit(
            request_key=key, attempt=attempt, engine_tag=ENGINE_TAG,
            engine_request=command.engine_request, output_token_ids=command.output_token_ids,
            manifest=command.manifest, hand_off=command.hand_off,
            to_compute_tokens=command.to_compute_tokens,
        )  # fmt: skip
        return worker_pb2.Command(submit=submit)
    if isinstance(command, AbortOn):
        return worker_pb2.Command(abort=worker_pb2.Abort(request_key=key, attempt=attempt))
    if isinstance(command, Forget):
        return worker_pb2.Command(forget=worker_pb2.Forget(request_key=key, attempt=attempt))
    resend = worker_pb2.Resend(
        request_key=key, attempt=attempt, from_position=command.from_position
    )
    return worker_pb2.Command(resend=resend)


def worker_up(welcome: worker_pb2.Welcome) -> WorkerUp:
    """A worker's greeting, with what it holds of this router's requests."""
    held = tuple(
        HeldAttempt(
            RequestKey(each.request_key), Attempt(each.attempt),
            each.first_position, each.next_position, each.ended, each.aborted,
        )
        for each in welcome.held
    )  # fmt: skip
    return WorkerUp(
        WorkerId(welcome.worker_id), Incarnation(welcome.worker_incarnation), Role(welcome.role),
        welcome.engine_tag, welcome.block_size_tokens, welcome.kv_blocks_total,
        welcome.max_model_len_tokens, held,
    )  # fmt: skip


def step_reported(
    worker: WorkerId, incarnation: Incarnation, step: worker_pb2.Step
) -> StepReported:
    """What an engine's step made, the load after it, what other routers have there, and what waits
    at those."""
    load = step.load
    return StepReported(
        worker,
        incarnation,
        outputs_of(step),
        EngineLoad(
            load.running, load.waiting, load.kv_blocks_used, load.kv_blocks_total, load.step_time_s
        ),
        _placed(load.others) if load.HasField("others") else NOTHING_PLACED,
        _queued(load.queued_beside) if load.HasField("queued_beside") else NOTHING_QUEUED,
    )


def _placed(told: worker_pb2.PlacedWork) -> PlacedWork:
    return PlacedWork(
        told.prompts, told.prompt_tokens, told.prompt_pairs, told.computed_tokens,
        told.computed_pairs, told.decodes, told.context_tokens, told.running,
        told.running_context_tokens, told.coming_tokens, told.routers,
    )  # fmt: skip


def _queued(told: worker_pb2.Queued) -> Queued:
    return Queued(told.requests, told.work_s, told.first_due_in_s)


def learned_elsewhere(told: worker_pb2.Learned) -> LearnedElsewhere:
    """What another router has learned."""
    ttft, tpot = (
        LearnedMargin(
            each.seen, each.log_mean, each.log_variance, each.judged, each.caution_spreads
        )
        for each in (told.ttft, told.tpot)
    )
    return LearnedElsewhere(told.router_id, Learned(ttft, tpot), told.age_s)


def cache_changed(
    worker: WorkerId, incarnation: Incarnation, change: worker_pb2.CacheChange
) -> CacheReported:
    """What changed in a worker's prefix cache."""
    report = CacheChange(
        change.number, _addresses(change.removed), _addresses(change.stored), change.merged
    )
    return CacheReported(worker, incarnation, report)


class SnapshotParts:
    """Puts the parts of a worker's snapshots together."""

    def __init__(self) -> None:
        self._held: list[bytes] = []

    def add(self, part: worker_pb2.CacheSnapshot) -> CacheSnapshot | None:
        """The whole of it, with its last part."""
        self._held += _addresses(part.held)
        if part.more:
            return None
        held, self._held = self._held, []
        return CacheSnapshot(part.number, held)


def _addresses(joined: bytes) -> list[bytes]:
    return [joined[at : at + ADDRESS_BYTES] for at in range(0, len(joined), ADDRESS_BYTES)]


def outputs_of(step: worker_pb2.Step) -> list[OutputReport]:
    """The outputs in a step's columns."""
    token_ids, at = list(step.token_ids), 0
    outputs = []
    columns = zip(
        step.request_keys, step.attempts, step.first_positions, step.token_counts, step.payloads,
        strict=True,
    )  # fmt: skip
    for key, attempt, first_position, count, payload in columns:
        new = token_ids[at : at + count]
        at += count
        outputs.append(
            OutputReport(RequestKey(key), Attempt(attempt), first_position, new, payload)
        )
    for detail in step.details:
        outputs[detail.output] = _with_detail(outputs[detail.output], detail)
    return outputs


def _with_detail(output: OutputReport, detail: worker_pb2.Detail) -> OutputReport:
    use = None
    if detail.HasField("prompt_use"):
        told = detail.prompt_use
        use = PromptUse(
            told.prompt_tokens, told.computed_tokens, told.cached_tokens, told.transferred_tokens
        )
    return OutputReport(
        output.key, output.attempt, output.first_position, output.token_ids, output.payload,
        detail.finish, detail.manifest, detail.error, use,
    )  # fmt: skip
