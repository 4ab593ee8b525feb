"""Everything that crosses the router core's boundary: events in, commands out.

Values only. The two that come once per token are msgspec structs, which are made five times as fast
as frozen dataclasses; a command that is a message of the anchor's link is that message.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum, StrEnum
from typing import Final, NamedTuple, TypeAlias

from msgspec import Struct

from engine.base import NOTHING_PLACED, NOTHING_QUEUED, EngineLoad, PlacedWork, Queued
from kvstore.index_feed import CacheChange, CacheSnapshot
from protos.anchor_link import Deliver
from protos.ids import Attempt, Incarnation, RequestKey, TicketId, WorkerId
from router.core.shared_margin import Learned


class Role(StrEnum):
    """A label: every engine can do both."""

    PREFILL = "prefill"
    DECODE = "decode"


class Finish(IntEnum):
    """How an attempt ended, as workers say it."""

    NOT_FINISHED = 0
    STOP = 1
    LENGTH = 2
    ABORTED = 3
    ERROR = 4
    REPETITION = 5
    REFUSED = 6
    """By the worker: the request can't be run anywhere."""


class Priority(StrEnum):
    """What a request says of itself: who goes first, and who is refused first."""

    HIGH = "high"
    NORMAL = "normal"
    LOW = "low"


class End(StrEnum):
    """Every accepted request ends in exactly one of these."""

    COMPLETE = "complete"
    CANCELLED = "cancelled"
    FAILED = "failed"


class Fault(StrEnum):
    """Why a request failed."""

    REFUSED = "refused"
    """It asks for what can't be served."""
    DEADLINE = "deadline"
    NO_WORKER = "no_worker"
    """None could take it in time."""
    WORKER_LOST = "worker_lost"
    """While it generated."""
    POISON = "poison"
    """Workers died with it, one after another."""
    ENGINE = "engine"
    """The engine reported an error for it."""
    FRONT_LOST = "front_lost"
    """The front that held its client's connection ended."""


@dataclass(frozen=True, slots=True)
class PromptUse:
    """How an engine came by a prompt's KV state, in tokens."""

    prompt_tokens: int
    computed_tokens: int
    cached_tokens: int
    transferred_tokens: int


class OutputReport(Struct, frozen=True, gc=False):
    """What one step added to one attempt."""

    key: RequestKey
    attempt: Attempt
    first_position: int
    token_ids: Sequence[int]
    payload: bytes
    """The engine's output under the front's request id, to be forwarded as it is."""
    finish: int = Finish.NOT_FINISHED
    manifest: bytes = b""
    """Set on the last output of an attempt that was handed off."""
    error: str = ""
    prompt_use: PromptUse | None = None


# Events: requests


@dataclass(frozen=True, slots=True)
class Shape:
    """What a placement policy may know of a request."""

    prompt_tokens: int
    max_tokens: int | None
    prompt_logprobs: bool = False
    output_tokens: int = 0
    """Generated so far."""
    fetchable: bool = False
    """Another worker holds the KV state of its prompt for it."""
    addresses: Sequence[bytes] = ()
    """Content addresses of the prompt's whole blocks (`kvstore.content`)."""
    kind: str = ""
    """Who asks and by what route: requests of one kind get outputs of like lengths."""
    ttft_slo_s: float | None = None
    tpot_slo_s: float | None = None
    """What it asks for itself."""
    hinted_output_tokens: int | None = None
    """How long its client expects the output to get: nothing holds it to that."""
    cached_tokens: int = 0
    """While its addresses are not known: how many of its prompt's tokens are thought to be cached,
    wherever it goes."""


@dataclass(frozen=True, slots=True)
class Terms:
    """What a request's headers say of it, before its body is read."""

    body_bytes: int | None = None
    """None if it comes in chunks."""
    tenant: str = ""
    priority: Priority = Priority.NORMAL
    ttft_slo_s: float | None = None
    tpot_slo_s: float | None = None
    output_tokens: int | None = None
    """As many are expected."""


NO_TERMS: Final = Terms()


@dataclass(frozen=True, slots=True)
class Demand:
    """What a front asks for, as `admission.read` found it."""

    shape: Shape
    payload: bytes
    """The engine's request."""
    problem: str | None = None
    """Why it can't be served, as a sentence."""
    stripped_arguments: tuple[str, ...] = ()
    """Engine-internal arguments that its client sent and that were removed."""


@dataclass(frozen=True, slots=True)
class RequestArrived:
    """A front's new request. `ticket` is None if it carries none that this cluster issued."""

    key: RequestKey
    demand: Demand
    ticket: TicketId | None
    deadline_s: float | None = None
    """On the core's clock."""
    terms: Terms = NO_TERMS
    """What its ticket says."""


@dataclass(frozen=True, slots=True)
class RequestRecovered:
    """A request that was under way when this router started."""

    key: RequestKey
    demand: Demand
    ticket: TicketId | None
    given_tokens: int
    deadline_s: float | None = None
    """On the core's clock."""
    terms: Terms = NO_TERMS
    """What its ticket says."""


@dataclass(frozen=True, slots=True)
class SnapshotTaken:
    """All that the anchor remembers; comes once, before the first worker is up."""

    underway: tuple[RequestRecovered, ...]


@dataclass(frozen=True, slots=True)
class RequestAborted:
    """The front no longer wants it: its client left, or a stop string matched."""

    key: RequestKey


@dataclass(frozen=True, slots=True)
class FrontGone:
    """A front ended, and all its requests with it."""

    front: int


@dataclass(frozen=True, slots=True)
class TicketAsked:
    """The edge wants to pass a request on. `ticket` is the id that it gets if it may."""

    ticket: TicketId
    method: str
    path: str
    terms: Terms = NO_TERMS


@dataclass(frozen=True, slots=True)
class EdgeEnded:
    """How a response ended at the edge."""

    ticket: TicketId
    status: str
    termination: str
    """HAProxy's two letters; `--` after an orderly end."""

    @property
    def orderly(self) -> bool:
        """The client was given a whole answer, and not an error."""
        return self.termination == "--" and self.status.startswith("2")


# Events: workers


@dataclass(frozen=True, slots=True)
class HeldAttempt:
    """An attempt of this router that a worker still keeps."""

    key: RequestKey
    attempt: Attempt
    first_position: int
    next_position: int
    ended: bool
    aborted: bool = False
    """Ended by an AbortOn: not whole, and nothing follows."""


@dataclass(frozen=True, slots=True)
class WorkerUp:
    """A link to a worker stands; `held` is what it still keeps for this router."""

    worker: WorkerId
    incarnation: Incarnation
    role: Role
    engine_tag: str
    block_size_tokens: int
    kv_blocks_total: int
    max_model_len_tokens: int
    held: tuple[HeldAttempt, ...] = ()


@dataclass(frozen=True, slots=True)
class WorkerLinkBroken:
    """The link ended; the worker may live and keep its requests."""

    worker: WorkerId
    incarnation: Incarnation


@dataclass(frozen=True, slots=True)
class WorkerDead:
    """The worker is gone or counts as gone. `incarnation` is None if it never was up."""

    worker: WorkerId
    incarnation: Incarnation | None
    why: str


class StepReported(Struct, frozen=True, gc=False):
    """What an engine's steps made for this router, if they made anything, and its load since."""

    worker: WorkerId
    incarnation: Incarnation
    outputs: Sequence[OutputReport]
    load: EngineLoad | None = None
    others: PlacedWork = NOTHING_PLACED
    """What other routers have there."""
    queued_beside: Queued = NOTHING_QUEUED
    """What waits at other routers, as far as they told this worker."""


@dataclass(frozen=True, slots=True)
class LearnedElsewhere:
    """What another router has learned of its predictions, as a worker passes it on."""

    router_id: str
    learned: Learned
    age_s: float = 0.0
    """It was said so long ago."""


@dataclass(frozen=True, slots=True)
class CacheReported:
    """What a worker says of its prefix cache."""

    worker: WorkerId
    incarnation: Incarnation
    report: CacheSnapshot | CacheChange


@dataclass(frozen=True, slots=True)
class MemberFacts:
    """What the membership says of one worker."""

    worker: WorkerId
    role: Role
    draining: bool
    incarnation: Incarnation
    weights: str
    """Digest of what it computes with."""


@dataclass(frozen=True, slots=True)
class MembershipChanged:
    """All workers there should be."""

    members: tuple[MemberFacts, ...]


@dataclass(frozen=True, slots=True)
class Tick:
    """Time passed; comes a few times a second."""


Event: TypeAlias = (
    RequestArrived | SnapshotTaken | RequestAborted | FrontGone | TicketAsked | EdgeEnded
    | WorkerUp | WorkerLinkBroken | WorkerDead | StepReported | CacheReported | MembershipChanged
    | LearnedElsewhere | Tick
)  # fmt: skip


# Commands


class PrefixFetch(NamedTuple):
    """A prompt's beginning that another worker holds, to be fetched before the rest is computed."""

    worker: WorkerId
    blocks: int
    """Of the KV index's size."""


@dataclass(frozen=True, slots=True)
class Submit:
    """resume(tokens so far, manifest of where the prompt's blocks are) on a worker."""

    worker: WorkerId
    key: RequestKey
    attempt: Attempt
    engine_request: bytes
    output_token_ids: tuple[int, ...] = ()
    manifest: bytes = b""
    hand_off: bool = False
    fetch: PrefixFetch | None = None
    """Only where `CoreSettings.fetches_prefixes`."""
    to_compute_tokens: int = 0
    """Of all that it has, what no cache is expected to have; 0: its placement can't say, or another
    worker has it."""


@dataclass(frozen=True, slots=True)
class Reserve:
    """Another worker computes the prompt of a request that is to decode on this one: of use to
    other routers. It ends with the request's Submit."""

    worker: WorkerId
    key: RequestKey
    context_tokens: int
    """0: it will not come."""


@dataclass(frozen=True, slots=True)
class TellQueued:
    """What waits at this router: of use to other routers, which that worker tells."""

    worker: WorkerId
    queued: Queued


@dataclass(frozen=True, slots=True)
class TellLearned:
    """What this router has learned of its predictions: that worker passes it on to all others."""

    worker: WorkerId
    learned: Learned


@dataclass(frozen=True, slots=True)
class AbortOn:
    """End an attempt and free its blocks, also those that wait to be fetched."""

    worker: WorkerId
    key: RequestKey
    attempt: Attempt


@dataclass(frozen=True, slots=True)
class Forget:
    """Drop the outputs kept of an attempt: its request has ended and its front was told."""

    worker: WorkerId
    key: RequestKey
    attempt: Attempt


@dataclass(frozen=True, slots=True)
class Resend:
    """Send everything from this position on again."""

    worker: WorkerId
    key: RequestKey
    attempt: Attempt
    from_position: int


@dataclass(frozen=True, slots=True)
class AskCache:
    """Have the worker say all that its prefix cache holds: something of its reports is missing."""

    worker: WorkerId


@dataclass(frozen=True, slots=True)
class TicketGranted:
    """Answer of a TicketAsked."""

    ticket: TicketId


class Outlook(NamedTuple):
    """A latency that a request would have had."""

    promised_s: float | None
    alone_s: float
    """If no other request were there."""
    predicted_s: float
    at_most_s: float
    """Corrected by what predictions were off by, and with a margin: this is held against what was
    promised."""


class Grounds(NamedTuple):
    """What a request was refused on."""

    prompt_tokens: int
    """As guessed from its body."""
    output_tokens: float
    """As expected."""
    requests_before: float
    work_before_s: float
    """Of their prompts, on one engine: what waits, or was let in and has not arrived."""
    ttft: Outlook
    tpot: Outlook


@dataclass(frozen=True, slots=True)
class TicketRefused:
    """Answer of a TicketAsked."""

    status: int
    retry_after_s: int | None
    message: str
    ticket: TicketId | None = None
    """By which it can be asked for; None if it is not kept."""
    grounds: Grounds | None = None
    """None if nothing was predicted."""


@dataclass(frozen=True, slots=True)
class Ended:
    """A request is over. Times are None where nothing was measured (recovered, no token)."""

    key: RequestKey
    end: End
    error: str = ""
    output_tokens: int = 0
    time_to_first_token_s: float | None = None
    duration_s: float | None = None
    time_per_output_token_s: float | None = None
    """Mean over the tokens after the first."""
    fault: Fault | None = None
    ttft_to_predicted: float | None = None
    """Measured divided by what its placement predicted, if it did."""
    tpot_to_predicted: float | None = None


Command: TypeAlias = (
    Deliver
    | Submit
    | Reserve
    | TellQueued
    | TellLearned
    | AbortOn
    | Forget
    | Resend
    | AskCache
    | TicketGranted
    | TicketRefused
    | Ended
)
