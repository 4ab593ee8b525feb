"""The router's core: events in, commands out.

Boundary: no I/O and no clock. The router process and the simulator feed the same object.

The life of a request: it arrives and is placed (`placement`), which reserves; it is submitted to
one worker, or to a prefill worker that hands it off (`moves`); outputs are fenced, ordered and
given to its front (`outputs`); it ends. A router that starts finds the requests of the one
before it (`recovery`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Set
from dataclasses import replace
from typing import Any, Final

from kvstore.index_feed import CacheSnapshot, IndexFeed
from protos.ids import Attempt, Incarnation, RequestKey, WorkerId
from router.core.events import (
    AskCache,
    CacheReported,
    Command,
    EdgeEnded,
    Event,
    Fault,
    FrontGone,
    HeldAttempt,
    LearnedElsewhere,
    MembershipChanged,
    RequestAborted,
    RequestArrived,
    RequestRecovered,
    Role,
    SnapshotTaken,
    StepReported,
    Tick,
    TicketAsked,
    TicketGranted,
    TicketRefused,
    WorkerDead,
    WorkerLinkBroken,
    WorkerUp,
)
from router.core.gate import kind_of
from router.core.lifecycle import Request, State
from router.core.moves import CoreSettings, Moves
from router.core.outputs import OutputIntake
from router.core.placement import Placement
from router.core.records import WITHOUT_ENGINE, Record, RecordBook
from router.core.recovery import WAIT_S, Recovery
from router.core.workers import Worker, WorkerPool

NO_WORKER_WAIT_S: Final = 30.0
"""How long a request waits for a worker before its client is told that there is none."""
RETRY_AFTER_S: Final = 5
BUSY_RETRY_AFTER_S: Final = 1
_DEADLINE: Final = "It had not ended by its deadline."


class RouterCore:
    """Decides for every request where it runs, and keeps what is needed to let it go on."""

    def __init__(self, settings: CoreSettings, placement: Placement) -> None:
        self.settings = settings
        self.pool = WorkerPool()
        self.book = RecordBook(settings.kept_records)
        self.moves = Moves(settings, placement, self.pool)
        self.recovery = Recovery(self.moves)
        self._placement = placement
        self._feeds: dict[WorkerId, IndexFeed] = {}
        self._outputs = OutputIntake(self.moves, self.recovery)
        self._started_s: float | None = None
        self._usable_at_s = -math.inf
        """When there was last seen to be a worker."""
        self._handlers: dict[type, Callable[[float, Any], Command | None]] = {
            RequestArrived: self._request_arrived,
            SnapshotTaken: self._snapshot_taken,
            RequestAborted: self._request_aborted,
            FrontGone: self._front_gone,
            TicketAsked: self._ticket_asked,
            EdgeEnded: self._edge_ended,
            WorkerUp: self._worker_up,
            WorkerLinkBroken: self._worker_link_broken,
            WorkerDead: self._worker_dead,
            StepReported: self._step_reported,
            CacheReported: self._cache_reported,
            LearnedElsewhere: self._learned_elsewhere,
            MembershipChanged: self._membership_changed,
            Tick: self._tick,
        }

    def handle(self, now_s: float, event: Event) -> list[Command]:
        """Take one event; returns what is to be sent, in order. `now_s` never goes back."""
        if self._started_s is None:
            self._started_s = now_s
        answer = self._handlers[type(event)](now_s, event)
        self.moves.place_waiting(now_s)
        self.moves.tell_queue(now_s)
        commands = self.moves.outbox.take()
        return commands if answer is None else [*commands, answer]

    def not_healthy_because(self) -> list[str]:
        """Why a request could not be served as configured; empty when it could."""
        reasons = []
        if not self.pool.usable(Role.DECODE):
            reasons.append("no decode worker is up")
        if self.settings.expect_prefill and not self.pool.usable(Role.PREFILL):
            reasons.append("no prefill worker is up")
        others = self.pool.members_of_other_weights
        if reasons and others:
            reasons.append(f"{', '.join(others)}: other weights than those served")
        return reasons

    # Requests

    def _request_arrived(self, now_s: float, event: RequestArrived) -> None:
        if event.key in self.moves.requests:
            return  # Fronts make ids unique; the first one's client is being served.
        request = self._open(now_s, event)
        problem = _refusal(event)
        if problem is not None:
            self.moves.fail(now_s, request, Fault.REFUSED, problem)
        else:
            self.moves.enter(now_s, request)

    def _open(self, now_s: float, event: RequestArrived | RequestRecovered) -> Request:
        demand = event.demand
        shape = demand.shape
        record = Record(
            event.key, now_s, shape.prompt_tokens, shape.max_tokens,
            deadline_s=event.deadline_s, stripped_arguments=demand.stripped_arguments,
        )  # fmt: skip
        record.note(now_s, "arrived")
        story = self.book.add(event.ticket, record, event.terms)
        terms = story.terms
        shape = replace(
            shape, kind=kind_of(terms, story.path), ttft_slo_s=terms.ttft_slo_s,
            tpot_slo_s=terms.tpot_slo_s, hinted_output_tokens=terms.output_tokens,
        )  # fmt: skip
        waits, foreseen = self.moves.gate.arrived(now_s, event.ticket, terms, shape.prompt_tokens)
        opened = Request(
            event.key, demand.payload, shape, record, story, State.WAITING, now_s, waits, foreseen
        )
        self.moves.requests[event.key] = opened
        if event.deadline_s is not None:
            self.moves.deadlines.add(event.deadline_s, event.key)
        return opened

    def _snapshot_taken(self, now_s: float, event: SnapshotTaken) -> None:
        assert not list(self.pool), "workers' claims can't be understood before the snapshot"
        requests = [self._reopen(now_s, underway) for underway in event.underway]
        for underway, request in zip(event.underway, requests, strict=True):
            problem = _refusal(underway)
            if problem is not None:
                self.moves.fail(now_s, request, Fault.REFUSED, problem)
        self.recovery.begin(now_s, [r for r in requests if r.state is State.RECOVERING])

    def _reopen(self, now_s: float, underway: RequestRecovered) -> Request:
        request = self._open(now_s, underway)
        request.state = State.RECOVERING
        request.delivered = underway.given_tokens
        request.record.recovered = True
        request.record.note(
            now_s, f"taken over from a former router; its front has {underway.given_tokens} tokens"
        )
        return request

    def _request_aborted(self, now_s: float, event: RequestAborted) -> None:
        request = self.moves.requests.get(event.key)
        if request is not None:
            self.moves.cancel(now_s, request, "its client left, or a stop string matched")

    def _front_gone(self, now_s: float, event: FrontGone) -> None:
        for request in [r for r in self.moves.requests.values() if r.front == event.front]:
            self.moves.front_lost(now_s, request)

    def _ticket_asked(self, now_s: float, event: TicketAsked) -> Command:
        refused = self._refused(now_s, event)
        if refused is not None:
            self.moves.counts.refused_tickets += 1
            self.book.refuse(now_s, event, refused)
            return refused
        self.moves.counts.tickets += 1
        self.book.open_ticket(now_s, event)
        return TicketGranted(event.ticket)

    def _refused(self, now_s: float, event: TicketAsked) -> TicketRefused | None:
        if not self.pool.any_usable and not self._worker_may_come(now_s):
            message = "No worker can serve the request now."
            return TicketRefused(503, RETRY_AFTER_S, message, event.ticket)
        if len(self.moves.requests) >= self.settings.max_requests:
            message = f"{self.settings.max_requests} requests are under way; try again later."
            return TicketRefused(429, BUSY_RETRY_AFTER_S, message, event.ticket)
        if event.path in WITHOUT_ENGINE:
            return None
        return self.moves.gate.ask(now_s, event)

    def _worker_may_come(self, now_s: float) -> bool:
        """One that a request may wait for: its link is broken, or this router has just started."""
        assert self._started_s is not None
        starting = now_s - self._started_s < WAIT_S and self.pool.expects_any
        return starting or any(not worker.attached for worker in self.pool)

    def _edge_ended(self, now_s: float, event: EdgeEnded) -> None:
        self.moves.gate.left(event.ticket)
        story = self.book.edge_ended(event)
        if story is not None:
            self.moves.tell_all(now_s, self.moves.endings.edge_ended(story))

    # Workers

    def _worker_up(self, now_s: float, event: WorkerUp) -> None:
        known = self.pool.get(event.worker)
        if known is not None and event.incarnation < known.incarnation:
            return  # A zombie; what it says stays unheard.
        if known is not None and event.incarnation > known.incarnation:
            self._worker_lost(now_s, known, "it was restarted")
        worker = self.pool.attach(event)
        self._feed_of(worker).end()
        self._compare_held(now_s, worker, event.held)
        self.recovery.proceed(now_s)
        self.moves.look_again()

    def _compare_held(self, now_s: float, worker: Worker, held: tuple[HeldAttempt, ...]) -> None:
        """Go on with what both know of, end what only the worker knows, lose what only we do."""
        for each in held:
            request = self.moves.requests.get(each.key)
            if request is not None and self.recovery.awaits(request):
                self.recovery.claim(request, worker, each)
                continue
            known = request.engagement_on(worker, each.attempt) if request is not None else None
            if request is None or known is None:
                self.moves.outbox.disown(worker, each.key, each.attempt, each.ended)
            elif not known.live:
                if not each.ended:
                    self.moves.outbox.abort(request, known)  # It may not have heard it.
            elif known is request.current:
                request.asked_from = -1
                self.moves.outbox.ask_again(request, known, request.position)
        still = {(each.key, each.attempt) for each in held}
        missing = worker.live.keys() - still
        self._lose(now_s, worker, missing, f"{worker.id} no longer has it", died=False)

    def _worker_link_broken(self, now_s: float, event: WorkerLinkBroken) -> None:
        worker = self._living(event.worker, event.incarnation)
        if worker is not None:
            self.pool.detach(worker)
            self.moves.elsewhere.forget(worker.id)
            self._feed_of(worker).end()

    def _worker_dead(self, now_s: float, event: WorkerDead) -> None:
        self.pool.heard_of(event.worker)
        if event.incarnation is not None:
            worker = self._living(event.worker, event.incarnation)
            if worker is not None:
                self._worker_lost(now_s, worker, event.why)
        self.recovery.proceed(now_s)

    def _worker_lost(self, now_s: float, worker: Worker, why: str) -> None:
        self.pool.remove(worker)
        self.moves.elsewhere.forget(worker.id)
        self._feed_of(worker).end()
        del self._feeds[worker.id]
        self._lose(now_s, worker, set(worker.live), f"{worker.id} is gone: {why}", died=True)

    def _lose(
        self,
        now_s: float,
        worker: Worker,
        attempts: Set[tuple[RequestKey, Attempt]],
        why: str,
        died: bool,
    ) -> None:
        """These of the worker's attempts are gone; requests in the order of their arrival there."""
        for key in dict.fromkeys(key for key, attempt in worker.live if (key, attempt) in attempts):
            request = self.moves.requests[key]
            lost = [
                engagement
                for engagement in request.live_engagements()
                if engagement.worker is worker and (key, engagement.attempt) in attempts
            ]
            if request.state is State.RECOVERING:
                self.recovery.lose(now_s, request, lost)
            else:
                self.moves.lose(now_s, request, lost, why, died)

    def _living(self, worker_id: WorkerId, incarnation: Incarnation) -> Worker | None:
        worker = self.pool.get(worker_id)
        return worker if worker is not None and worker.incarnation == incarnation else None

    def _step_reported(self, now_s: float, event: StepReported) -> None:
        worker = self._living(event.worker, event.incarnation)
        if worker is None or not worker.attached:
            self.moves.counts.fenced_outputs += len(event.outputs)
            return
        if event.load is not None:
            before, worker.load = worker.load, event.load
            if (
                event.others.prompts < worker.others.prompts
                or event.load.kv_blocks_used < before.kv_blocks_used
            ):
                self.moves.look_again()  # There may be room for what waits here.
            worker.others, worker.queued_beside = event.others, event.queued_beside
            self._placement.stepped(now_s, worker)
            self.moves.hear_queues(now_s, worker)
        take = self._outputs.take
        for output in event.outputs:
            take(now_s, worker, output)

    def _learned_elsewhere(self, now_s: float, event: LearnedElsewhere) -> None:
        self.moves.gate.hear(now_s, event)

    def _cache_reported(self, now_s: float, event: CacheReported) -> None:
        worker = self._living(event.worker, event.incarnation)
        if worker is None or not worker.attached:
            return
        feed, report, counts = self._feed_of(worker), event.report, self.moves.counts
        if isinstance(report, CacheSnapshot):
            counts.cache_snapshots += 1
            feed.begin(report)
        elif feed.in_step:
            if feed.change(report):
                counts.cache_changes += report.merged
            else:
                counts.cache_gaps += 1
                self.moves.outbox.note(AskCache(worker.id))

    def _feed_of(self, worker: Worker) -> IndexFeed:
        return self._feeds.setdefault(worker.id, IndexFeed(self.moves.index, worker.id))

    def _membership_changed(self, now_s: float, event: MembershipChanged) -> None:
        self.pool.change_members(event.members)
        self.recovery.proceed(now_s)
        self.moves.look_again()

    # Time

    def _tick(self, now_s: float, event: Tick) -> None:
        self.recovery.proceed(now_s)
        self.moves.outbox.forget_due(now_s)
        self.moves.tell_all(now_s, self.moves.endings.due(now_s))
        self.moves.tell_learned(now_s)
        for key in self.moves.deadlines.due(now_s):
            if (late := self.moves.requests.get(key)) is not None:
                self.moves.fail(now_s, late, Fault.DEADLINE, _DEADLINE)
        self.moves.look_again()
        self._give_up_waiting(now_s)

    def _give_up_waiting(self, now_s: float) -> None:
        """Those that wait although there is a worker wait for their turn."""
        if self.pool.any_usable:
            self._usable_at_s = now_s
            return
        keys = [*self.moves.stranded, *self.moves.backlog]
        for request in [self.moves.requests[key] for key in keys]:
            if now_s - max(request.since_s, self._usable_at_s) >= NO_WORKER_WAIT_S:
                error = f"No worker could take it within {NO_WORKER_WAIT_S:.0f} s."
                self.moves.fail(now_s, request, Fault.NO_WORKER, error)

    def check_integrity(self) -> None:
        """Assert that what is reserved and live is what the requests under way account for."""
        requests = self.moves.requests.values()
        held = [
            reservation
            for request in requests
            for reservation in (request.reservation, request.prefill_reservation)
            if reservation is not None
        ]
        for worker in self.pool:
            mine = [each for each in held if each.worker is worker]
            assert worker.reserved_prefill_tokens == sum(each.prefill_tokens for each in mine)
            assert worker.reserved_requests == sum(each.requests for each in mine)
            live = {
                (request.key, engagement.attempt)
                for request in requests
                for engagement in request.engagements
                if engagement.live and engagement.worker is worker
            }
            assert live == worker.live.keys()
        for request in requests:
            assert request.position == request.unknown_tokens + len(request.tokens)
            waits = request.key in self.moves.backlog or request.key in self.moves.stranded
            assert waits == (request.state is State.WAITING)


def _refusal(event: RequestArrived | RequestRecovered) -> str | None:
    if event.ticket is None:
        return "It came without a ticket of this cluster's edge."
    return event.demand.problem
