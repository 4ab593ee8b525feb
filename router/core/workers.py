"""The workers as this router sees them: who can be used, and what is reserved on each.

Pure state. A `Worker` object stands for one incarnation; a later one is another object, so what
refers to a dead incarnation can't be taken for the living.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from engine.base import NOTHING_PLACED, NOTHING_QUEUED, EngineLoad, PlacedWork, Queued
from protos.enginecore import ENGINE_TAG
from protos.ids import Attempt, Incarnation, RequestKey, WorkerId
from router.core.events import MemberFacts, Role, WorkerUp


@dataclass(slots=True, eq=False)
class Worker:
    """One incarnation of a worker."""

    id: WorkerId
    incarnation: Incarnation
    role: Role
    engine_tag: str
    block_size_tokens: int
    kv_blocks_total: int
    max_model_len_tokens: int
    attached: bool = True
    """The link stands. Only then is anything sent."""
    draining: bool = False
    weights: str = ""
    """Digest of what it computes with."""
    weights_served: bool = True
    """They are those that this router serves."""
    load: EngineLoad = field(default_factory=EngineLoad)
    live: dict[tuple[RequestKey, Attempt], None] = field(default_factory=dict)
    """Attempts that run here or whose blocks wait here to be fetched."""
    reserved_prefill_tokens: int = 0
    """Prompt tokens that this router sent or will send here and that are not computed yet."""
    reserved_requests: int = 0
    """Requests of this router that generate here or will."""
    others: PlacedWork = NOTHING_PLACED
    """What other routers have here."""
    queued_beside: Queued = NOTHING_QUEUED
    """What waits at other routers, as far as they told this worker."""

    @property
    def usable(self) -> bool:
        """May be given new work."""
        speaks = self.engine_tag == ENGINE_TAG
        return self.attached and not self.draining and speaks and self.weights_served

    @property
    def state(self) -> str:
        """For people."""
        if not self.attached:
            return "unreachable"
        if self.engine_tag != ENGINE_TAG:
            return f"unusable: speaks {self.engine_tag}, this router {ENGINE_TAG}"
        if not self.weights_served:
            return f"unusable: has the weights {self.weights}, others are served"
        return "draining" if self.draining else "serving"


@dataclass(frozen=True, slots=True)
class Reservation:
    """What one request holds on one worker until it is released."""

    worker: Worker
    prefill_tokens: int = 0
    requests: int = 0

    def take(self) -> Reservation:
        """Count it."""
        self.worker.reserved_prefill_tokens += self.prefill_tokens
        self.worker.reserved_requests += self.requests
        return self

    def release(self) -> None:
        """The inverse of `take`."""
        self.worker.reserved_prefill_tokens -= self.prefill_tokens
        self.worker.reserved_requests -= self.requests


class WorkerPool:
    """All workers that were up and are not known to be dead."""

    def __init__(self) -> None:
        self._workers: dict[WorkerId, Worker] = {}
        self._facts: dict[WorkerId, MemberFacts] = {}
        self.weights = ""
        """Digest of those that are served: the oldest member's of those that do not drain. So all
        routers serve the same, and go over to others once nobody is left who has these."""
        self.all_reached = True
        """The links to all members stand."""
        self._usable: dict[Role, tuple[Worker, ...]] = {}
        self._heard_of: set[WorkerId] = set()
        self._choose_usable()

    def __iter__(self) -> Iterator[Worker]:
        return iter(self._workers.values())

    @property
    def size(self) -> int:
        """How many there are, usable or not."""
        return len(self._workers)

    def get(self, worker: WorkerId) -> Worker | None:
        """The living incarnation."""
        return self._workers.get(worker)

    def usable(self, role: Role) -> tuple[Worker, ...]:
        """Who may be given new work, ordered by id."""
        return self._usable[role]

    @property
    def members_of_other_weights(self) -> list[WorkerId]:
        """Who is given no work for it."""
        return [each.worker for each in self._facts.values() if each.weights != self.weights]

    @property
    def any_usable(self) -> bool:
        """Whether any worker may be given new work, whatever its role."""
        return any(self._usable.values())

    @property
    def max_model_len_tokens(self) -> int | None:
        """What every usable worker can hold; None if there is none."""
        lengths = [w.max_model_len_tokens for ws in self._usable.values() for w in ws]
        return min(lengths, default=None)

    @property
    def all_heard_of(self) -> bool:
        """Every member was up at least once, or is known to be dead; and there are members."""
        return bool(self._facts) and self._facts.keys() <= self._heard_of

    @property
    def expects_any(self) -> bool:
        """A member is missing that may still come."""
        return not self._facts.keys() <= self._workers.keys()

    def attach(self, event: WorkerUp) -> Worker:
        """The link stands: the known incarnation again, or a new one."""
        worker = self._workers.get(event.worker)
        if worker is None or worker.incarnation != event.incarnation:
            worker = Worker(
                event.worker, event.incarnation, event.role, event.engine_tag,
                event.block_size_tokens, event.kv_blocks_total, event.max_model_len_tokens,
            )  # fmt: skip
            self._workers[event.worker] = worker
        worker.attached = True
        self._heard_of.add(event.worker)
        self._apply_facts(worker)
        self._choose_usable()
        return worker

    def detach(self, worker: Worker) -> None:
        """The link is broken; what it runs is kept."""
        worker.attached = False
        self._choose_usable()

    def remove(self, worker: Worker) -> None:
        """It is dead."""
        worker.attached = False
        del self._workers[worker.id]
        self._choose_usable()

    def heard_of(self, worker: WorkerId) -> None:
        """A member that never was up is known to be dead."""
        self._heard_of.add(worker)

    def change_members(self, members: tuple[MemberFacts, ...]) -> None:
        """Take over roles, who drains, and who has which weights."""
        self._facts = {member.worker: member for member in members}
        oldest = min(
            members, key=lambda member: (member.draining, member.incarnation), default=None
        )
        if oldest is not None:
            self.weights = oldest.weights
        for worker in self:
            self._apply_facts(worker)
        self._choose_usable()

    def _apply_facts(self, worker: Worker) -> None:
        facts = self._facts.get(worker.id)
        if facts is not None:
            worker.role = facts.role
            worker.draining = facts.draining
            worker.weights = facts.weights
            worker.weights_served = facts.weights == self.weights

    def _choose_usable(self) -> None:
        ordered = sorted((w for w in self if w.usable), key=lambda worker: worker.id)
        self._usable = {role: tuple(w for w in ordered if w.role is role) for role in Role}
        self.all_reached = self._facts.keys() <= {w.id for w in self if w.attached}
