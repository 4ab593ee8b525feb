"""A request's life as a transition table, and the request itself.

Pure state: what is sent to workers and fronts on each transition is decided in `moves`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

from protos.errors import BatonError
from protos.ids import Attempt, RequestKey, split_request_key
from router.core.backlog import Waiting
from router.core.events import Shape
from router.core.gate import Foreseen
from router.core.records import Record, TicketStory
from router.core.workers import Reservation, Worker


class State(StrEnum):
    """Where a request is."""

    RECOVERING = "recovering"
    """A former router's; its workers are being asked what they hold of it."""
    WAITING = "waiting"
    """On no worker: new, or to be resumed elsewhere."""
    PREFILLING = "prefilling"
    """A prefill worker makes its first token and keeps the prompt's blocks."""
    HANDING_OFF = "handing_off"
    """Its tokens so far were sent to a worker that has not yet added to them."""
    DECODING = "decoding"
    """A worker that was handed its tokens adds to them."""
    WHOLE = "whole"
    """One worker does all of it."""
    ENDED = "ended"


class Trigger(StrEnum):
    """What moves it."""

    PREFILL_SUBMITTED = "submitted to a prefill worker"
    WHOLE_SUBMITTED = "submitted as a whole"
    RESUME_SUBMITTED = "submitted with its tokens so far"
    RESUMED = "first output after the hand-off"
    PARKED = "no worker has it"
    ADOPTED = "found on a worker, as a whole"
    END = "ended"


TRANSITIONS: Final[dict[tuple[State, Trigger], State]] = {
    (State.WAITING, Trigger.PREFILL_SUBMITTED): State.PREFILLING,
    (State.WAITING, Trigger.WHOLE_SUBMITTED): State.WHOLE,
    (State.WAITING, Trigger.RESUME_SUBMITTED): State.HANDING_OFF,
    (State.WAITING, Trigger.END): State.ENDED,
    (State.PREFILLING, Trigger.RESUME_SUBMITTED): State.HANDING_OFF,
    (State.PREFILLING, Trigger.PARKED): State.WAITING,
    (State.PREFILLING, Trigger.END): State.ENDED,
    (State.HANDING_OFF, Trigger.RESUMED): State.DECODING,
    (State.HANDING_OFF, Trigger.PARKED): State.WAITING,
    (State.HANDING_OFF, Trigger.END): State.ENDED,
    (State.DECODING, Trigger.PARKED): State.WAITING,
    (State.DECODING, Trigger.END): State.ENDED,
    # Lost, or adopted and then found to be a former router's hand-off.
    (State.WHOLE, Trigger.PARKED): State.WAITING,
    (State.WHOLE, Trigger.END): State.ENDED,
    (State.RECOVERING, Trigger.ADOPTED): State.WHOLE,
    (State.RECOVERING, Trigger.RESUME_SUBMITTED): State.HANDING_OFF,
    (State.RECOVERING, Trigger.RESUMED): State.DECODING,
    (State.RECOVERING, Trigger.PARKED): State.WAITING,
    (State.RECOVERING, Trigger.END): State.ENDED,
}


class InvalidTransition(BatonError):
    """A defect: the message tells the request's story."""


@dataclass(slots=True, eq=False)
class Engagement:
    """One attempt on one worker."""

    attempt: Attempt
    worker: Worker
    live: bool = True
    """It runs, or its blocks wait to be fetched; the worker has not been told to end it."""
    spoke: bool = False
    """Its first output came."""
    first_position: int = 0
    next_position: int = 0
    aborted: bool = False
    ended: bool = False
    """What its worker held of it when this router took over; see `recovery`."""


@dataclass(slots=True, eq=False)
class Request:
    """One engine request.

    `tokens` are those of positions `unknown_tokens` to `position` - 1; positions below
    `delivered` went to the front. The two differ only after a router's restart.
    """

    key: RequestKey
    payload: bytes
    shape: Shape
    record: Record
    story: TicketStory
    """Of the ticket that it came with, and of all that came with it."""
    state: State
    since_s: float
    """When it entered its state."""
    waits: Waiting
    """As what it waits while it is new."""
    foreseen: Foreseen | None = None
    """What it was let in with, as far as its times are still to be held against that."""
    delivered: int = 0
    position: int = 0
    unknown_tokens: int = 0
    tokens: list[int] = field(default_factory=list)
    current: Engagement | None = None
    source: Engagement | None = None
    """The attempt that was handed off and whose blocks may not have been fetched yet."""
    weights: str = ""
    """Digest of those that its tokens were made with."""
    manifest: bytes = b""
    """What `source` answered with."""
    engagements: list[Engagement] = field(default_factory=list)
    """All attempts whose outputs workers may keep."""
    attempts_made: int = 0
    deaths: int = 0
    """Workers that died with it on them."""
    asked_from: int = -1
    """The position of a Resend that was not answered yet."""
    prefill_reservation: Reservation | None = None
    reservation: Reservation | None = None
    announced: Worker | None = None
    """Which worker was told that it will decode there, and has not got it yet."""
    front: int = field(init=False)
    request_id: str = field(init=False)

    def __post_init__(self) -> None:
        self.front, self.request_id = split_request_key(self.key)

    def advance(self, now_s: float, trigger: Trigger, why: str = "") -> None:
        """Take one transition of the table; raises InvalidTransition with the story so far."""
        target = TRANSITIONS.get((self.state, trigger))
        if target is None:
            raise InvalidTransition(
                f"request {self.key} is {self.state} and can't be {trigger!r}\n{self.record.tell()}"
            )
        self.state = target
        self.since_s = now_s
        self.record.note(now_s, f"{target}: {why or trigger}")

    @property
    def is_being_fetched(self) -> bool:
        """A worker was told where its blocks are, and has not yet shown that it has them."""
        return (
            self.state is State.HANDING_OFF
            and self.source is not None
            and self.current is not None
            and self.current.live
        )

    def engagement_on(self, worker: Worker, attempt: Attempt) -> Engagement | None:
        """This attempt on this incarnation of a worker."""
        for engagement in self.engagements:
            if engagement.worker is worker and engagement.attempt == attempt:
                return engagement
        return None

    def live_engagements(self) -> list[Engagement]:
        """Ordered by attempt."""
        return sorted((e for e in self.engagements if e.live), key=lambda e: e.attempt)

    def next_attempt(self) -> Attempt:
        """A number larger than all before."""
        self.attempts_made += 1
        return Attempt(self.attempts_made)

    def engage(self, attempt: Attempt, worker: Worker) -> Engagement:
        """This attempt is on this worker now."""
        engagement = Engagement(attempt, worker)
        self.engagements.append(engagement)
        self.asked_from = -1
        worker.live[(self.key, attempt)] = None
        return engagement

    def settle(self, engagement: Engagement) -> None:
        """An attempt is over: it ended by itself, was aborted, or was lost with its worker."""
        engagement.live = False
        engagement.worker.live.pop((self.key, engagement.attempt), None)

    def reserve_prefill(self, worker: Worker) -> None:
        """Its prompt will be computed there."""
        assert self.prefill_reservation is None
        self.prefill_reservation = Reservation(worker, self.shape.prompt_tokens).take()

    def release_prefill(self) -> None:
        """Its prompt is computed, or will not be."""
        if self.prefill_reservation is not None:
            self.prefill_reservation.release()
            self.prefill_reservation = None

    def release(self) -> None:
        """Give back all that is reserved for it."""
        self.release_prefill()
        if self.reservation is not None:
            self.reservation.release()
            self.reservation = None

    def unassign(self) -> None:
        """It is on no worker."""
        self.current = None
        self.release()
