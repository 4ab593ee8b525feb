"""Drives a router core on a virtual clock: short words for its events."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from engine.base import EngineLoad
from protos.anchor_link import Deliver, Delivery
from protos.enginecore import ENGINE_TAG, EngineRequest, decode_output, encode
from protos.ids import Attempt, Incarnation, RequestKey, TicketId, WorkerId
from router.core import admission
from router.core.events import (
    AbortOn,
    Demand,
    Event,
    Finish,
    Forget,
    HeldAttempt,
    MemberFacts,
    MembershipChanged,
    OutputReport,
    RequestArrived,
    RequestRecovered,
    Resend,
    Role,
    SnapshotTaken,
    StepReported,
    Submit,
    Tick,
    WorkerDead,
    WorkerLinkBroken,
    WorkerUp,
)
from router.core.moves import CoreSettings
from router.core.placement import LeastPredictedWork, Placement
from router.core.records import Record
from router.core.router import RouterCore

TICKET = TicketId("0123456789abcdef0123456789abcdef0123456789ab")
CACHED_AS = admission.CachedAs("m", 128)
SETTINGS = CoreSettings(expect_prefill=True, local_prefill_max_tokens=4, kept_records=100)


def engine_request(request_id: str, prompt_tokens: int = 10, **params: object) -> EngineRequest:
    sampling = {"max_tokens": 8, **params}
    prompt = list(range(prompt_tokens))
    return EngineRequest(request_id, prompt, None, sampling, None, 0.0, None, None, None)


def demand(request_id: str, prompt_tokens: int = 10, **params: object) -> Demand:
    request = engine_request(request_id, prompt_tokens, **params)
    return admission.read(request, CACHED_AS)


def key(request_id: str = "a", front: int = 0) -> RequestKey:
    return RequestKey(f"{front}:{request_id}")


class Drive:
    """A core and its clock. Each method feeds one event and returns the commands."""

    def __init__(
        self, settings: CoreSettings = SETTINGS, placement: Placement | None = None
    ) -> None:
        self.core = RouterCore(settings, placement or LeastPredictedWork(lambda n: 0))
        self.now_s = 100.0

    def feed(self, event: Event) -> list[Any]:
        commands = self.core.handle(self.now_s, event)
        self.core.check_integrity()
        return commands

    def pass_time(self, seconds: float) -> list[Any]:
        self.now_s += seconds
        return self.feed(Tick())

    def members(self, *workers: tuple[str, str] | tuple[str, str, bool]) -> list[Any]:
        facts = [
            MemberFacts(WorkerId(w[0]), Role(w[1]), len(w) > 2, Incarnation(1), "") for w in workers
        ]
        return self.feed(MembershipChanged(tuple(facts)))

    def up(
        self,
        worker: str,
        incarnation: int = 1,
        held: Sequence[HeldAttempt] = (),
        tag: str = ENGINE_TAG,
    ) -> list[Any]:
        """A worker named p... is of the prefill pool, d... of the decode pool."""
        role = Role.PREFILL if worker.startswith("p") else Role.DECODE
        return self.feed(
            WorkerUp(
                WorkerId(worker), Incarnation(incarnation), role, tag, 16, 1000, 1000, tuple(held)
            )
        )  # fmt: skip

    def broken(self, worker: str, incarnation: int = 1) -> list[Any]:
        return self.feed(WorkerLinkBroken(WorkerId(worker), Incarnation(incarnation)))

    def dead(self, worker: str, incarnation: int | None = 1) -> list[Any]:
        known = None if incarnation is None else Incarnation(incarnation)
        return self.feed(WorkerDead(WorkerId(worker), known, "killed"))

    def arrive(self, request_id: str = "a", prompt_tokens: int = 10, **params: object) -> list[Any]:
        asked = demand(request_id, prompt_tokens, **params)
        return self.feed(RequestArrived(key(request_id), asked, TICKET))

    def recover(self, *given: tuple[str, int], prompt_tokens: int = 10) -> list[Any]:
        underway = [
            RequestRecovered(key(name), demand(name, prompt_tokens), TICKET, count)
            for name, count in given
        ]
        return self.feed(SnapshotTaken(tuple(underway)))

    def step(
        self,
        worker: str,
        *outputs: OutputReport,
        incarnation: int = 1,
        load: EngineLoad | None = None,
    ) -> list[Any]:
        return self.feed(StepReported(WorkerId(worker), Incarnation(incarnation), outputs, load))


def output(
    attempt: int,
    first_position: int,
    tokens: Sequence[int] = (),
    request_id: str = "a",
    finish: Finish = Finish.NOT_FINISHED,
    manifest: bytes = b"",
    error: str = "",
) -> OutputReport:
    return OutputReport(
        key(request_id), Attempt(attempt), first_position, tuple(tokens),
        payload(request_id, first_position), finish, manifest, error,
    )  # fmt: skip


def payload(request_id: str, first_position: int) -> bytes:
    return f"{request_id}@{first_position}".encode()


def held(
    attempt: int, first: int, following: int, request_id: str = "a", ended: bool = False
) -> HeldAttempt:
    return HeldAttempt(key(request_id), Attempt(attempt), first, following, ended)


def submit(
    worker: str, attempt: int, tokens: Sequence[int] = (), manifest: bytes = b"",
    hand_off: bool = False, request_id: str = "a", prompt_tokens: int = 10, **params: object,
) -> Submit:  # fmt: skip
    request = encode(engine_request(request_id, prompt_tokens, **params))
    return Submit(
        WorkerId(worker), key(request_id), Attempt(attempt), request, tuple(tokens), manifest,
        hand_off,
    )  # fmt: skip


def abort_on(worker: str, attempt: int, request_id: str = "a", front: int = 0) -> AbortOn:
    return AbortOn(WorkerId(worker), key(request_id, front), Attempt(attempt))


def forget(worker: str, attempt: int, request_id: str = "a") -> Forget:
    return Forget(WorkerId(worker), key(request_id), Attempt(attempt))


def resend(worker: str, attempt: int, from_position: int) -> Resend:
    return Resend(WorkerId(worker), key(), Attempt(attempt), from_position)


def records(drive: Drive) -> list[Record]:
    """Of all requests that came with the ticket."""
    story = drive.core.book.find(TICKET)
    assert story is not None
    return story.requests


def deliver(*given: tuple[int, int, bool], request_id: str = "a") -> Deliver:
    """(first position, token count, finished) of each output, payloads as `output` makes them."""
    return Deliver(
        0,
        [
            Delivery(request_id, first, count, finished, payload(request_id, first))
            for first, count, finished in given
        ],
    )


def is_error(command: object, position: int, request_id: str = "a") -> bool:
    """An engine-core error that ends the request at this position."""
    assert isinstance(command, Deliver)
    (delivery,) = command.deliveries
    told = decode_output(delivery.payload)
    assert (delivery.request_id, delivery.first_position) == (request_id, position)
    return delivery.finished and told.finish_reason == 3 and told.request_id == request_id
