"""The verbs of a request's life: each changes its state, reserves, and notes what is to be sent.

Boundary: knows requests, workers and the placement policy; which event calls for which verb is
decided in `router`, `outputs` and `recovery`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Final

from kvstore.index import KvIndex
from protos.ids import Attempt, RequestKey, WorkerId
from router.core.admission import too_long
from router.core.backlog import Backlog
from router.core.deadlines import Deadlines
from router.core.elsewhere import Elsewhere
from router.core.endings import Endings, Told
from router.core.events import End, Ended, Fault, Role, Submit, TellLearned
from router.core.gate import NOTHING_PROMISED, Gate, Promises, kind_of
from router.core.lifecycle import Engagement, Request, State, Trigger
from router.core.outbox import Counts, Outbox
from router.core.placement import Decision, Placement, View
from router.core.records import AttemptRecord, TicketStory
from router.core.workers import Reservation, Worker, WorkerPool

_OTHER_WEIGHTS: Final = "The weights that it began with are not served any more."
MAX_DEATHS: Final = 2
"""A request that was on this many workers as they died is not given another."""


@dataclass(frozen=True, slots=True)
class CoreSettings:
    """What the core is configured with."""

    expect_prefill: bool
    local_prefill_max_tokens: int
    kept_records: int = 10_000
    max_requests: int = 10_000
    """So many under way, no more tickets are given."""
    promises: Promises = NOTHING_PROMISED
    """What every request is promised that does not say otherwise."""
    index_block_tokens: int = 128
    """What one entry of the KV index stands for."""
    index_entries: int = 2_000_000
    """KV blocks that the index knows at most."""
    resume_streams: bool = False
    """Resume a stream whose worker died after adding to it; else its client is told."""
    fetches_prefixes: bool = False
    """Workers can fetch a prompt's beginning from each other's caches: only simulated ones can."""


class Moves:
    """All requests under way, and the verbs."""

    def __init__(self, settings: CoreSettings, placement: Placement, pool: WorkerPool) -> None:
        self.requests: dict[RequestKey, Request] = {}
        self.backlog = Backlog()
        """Those that have not begun and wait for their turn."""
        self.elsewhere = Elsewhere(self.backlog)
        self.stranded: dict[RequestKey, Request] = {}
        """Those that have begun and that no worker can take, oldest first."""
        self._looks_due = False
        """Something changed, so that one of the backlog may be placed."""
        self.counts = Counts()
        self.outbox = Outbox(self.counts)
        self.endings = Endings()
        self.deadlines = Deadlines()
        self.pool = pool
        self._settings = settings
        self._placement = placement
        self.index = KvIndex(settings.index_entries)
        self.view = View(
            pool, self.index, settings.index_block_tokens, settings.expect_prefill,
            settings.local_prefill_max_tokens,
        )  # fmt: skip
        self.gate = Gate(settings.promises, placement, self.view, self.backlog, self.elsewhere)

    # Placing and submitting

    def enter(self, now_s: float, request: Request) -> None:
        """A new request: it is placed at once, or waits for its turn."""
        others_wait = bool(self.backlog)
        # Also if it is placed at once: its tenant is served as those are that wait.
        self.backlog.add(request.key, request.waits)
        if others_wait or self.elsewhere.is_first(now_s):
            self.look_again()
        else:
            self.place(now_s, request)

    def place_waiting(self, now_s: float) -> None:
        """Those whose turn it is, while there is room for them; only if something changed."""
        # Who is late while nobody can run it tells nothing of the load.
        if not self._looks_due or not self.pool.any_usable:
            return
        for request in list(self.stranded.values()):
            self.place(now_s, request)
        while not self.elsewhere.is_first(now_s):
            # Who goes next may not be in time any more, and the one behind it due later.
            key = self.backlog.next(now_s, self._placement.held_share)
            if key is None or self.elsewhere.is_first(now_s):
                break
            if not self.place(now_s, self.requests[key]):
                break
        for key in self.backlog.take_put_behind():
            late = self.requests.get(key)
            if late is not None and late.foreseen is not None:
                late.foreseen = self.gate.learn_late(now_s, late.foreseen, late.story.terms)
        self._looks_due = False

    def hear_queues(self, now_s: float, worker: Worker) -> None:
        """A worker told what waits at other routers: it may be this one's turn."""
        waited = self.elsewhere.is_first(now_s)
        if self.elsewhere.hear(now_s, worker) and waited and not self.elsewhere.is_first(now_s):
            self.look_again()

    def tell_queue(self, now_s: float) -> None:
        """Let other routers know what waits here."""
        to = self._told
        if to is None:
            return
        for command in self.elsewhere.tell(now_s, to.id, goes_on=self.pool.all_reached):
            told = self.pool.get(command.worker)
            if told is not None and told.attached:
                self.outbox.note(command)

    def tell_learned(self, now_s: float) -> None:
        """Let other routers know what was learned here. Also if none is known: one that begins in
        an overload lets in nothing by what it knows itself, so that nobody would hear of it."""
        to = self._told
        if to is None:
            return
        news = self.gate.news(now_s)
        if news is not None:
            self.outbox.note(TellLearned(to.id, news))

    @property
    def _told(self) -> Worker | None:
        """The worker that tells other routers of this one. All routers see the same workers, so
        they choose the same one; of those that decode, since these report often."""
        workers = self.pool.usable(Role.DECODE) or self.pool.usable(Role.PREFILL)
        return workers[0] if workers else None

    def look_again(self) -> None:
        """Who waits may be placed now."""
        self._looks_due = True

    def place(self, now_s: float, request: Request) -> bool:
        """Decide, reserve and submit. Whether it is placed, or over: else it waits."""
        problem = too_long(request.shape, self.pool.max_model_len_tokens)
        if problem is not None:
            self.fail(now_s, request, Fault.REFUSED, problem)
            return True
        shape = request.shape
        if request.position:
            if request.weights != self.pool.weights:
                self.fail(now_s, request, Fault.WORKER_LOST, _OTHER_WEIGHTS)
                return True
            fetchable = bool(request.manifest)
            shape = replace(shape, output_tokens=request.position, fetchable=fetchable)
        decision = self._placement.place(now_s, self.view, request.key, shape)
        if decision is None:
            if request.position:
                self.stranded[request.key] = request
            else:
                self.backlog.add(request.key, request.waits)
            return False
        self._waits_no_more(request)
        request.record.decide(now_s, decision)
        self.counts.decisions[decision.reason] += 1
        if not request.position:
            self.backlog.charge(request.waits.tenant, shape.prompt_tokens)
        self._carry_out(now_s, request, decision)
        return True

    def adopt(self, now_s: float, request: Request, engagement: Engagement) -> None:
        """A former router had placed it there, and there it goes on."""
        shape = replace(request.shape, output_tokens=engagement.next_position)
        self._placement.adopted(now_s, request.key, engagement.worker, shape)

    def _waits_no_more(self, request: Request) -> None:
        self.backlog.remove(request.key)
        self.stranded.pop(request.key, None)

    def _carry_out(self, now_s: float, request: Request, decision: Decision) -> None:
        worker = self._chosen(decision.worker)
        if worker is not None:
            request.reservation = Reservation(worker, requests=1).take()
            if decision.prefill is not None:
                self.outbox.announce(request, worker)
        if request.position:
            assert worker is not None, "one that goes on needs a worker"
            assert decision.fetch is None, "one that goes on has a manifest, or computes its prompt"
            self._resume_on(now_s, request, worker, decision.to_compute_tokens)
            return
        fetch = decision.fetch
        assert fetch is None or self._settings.fetches_prefixes, (
            "the policy has a worker fetch a prefix, which these workers can't"
        )
        hand_off = decision.prefill is not None
        first = self._chosen(decision.prefill) if hand_off else worker
        assert first is not None, "a decision names a worker"
        trigger = Trigger.PREFILL_SUBMITTED if hand_off else Trigger.WHOLE_SUBMITTED
        request.reserve_prefill(first)
        attempt = self._start(now_s, request, first, trigger)
        self.outbox.note(
            Submit(
                first.id, request.key, attempt, request.payload, hand_off=hand_off, fetch=fetch,
                to_compute_tokens=decision.to_compute_tokens,
            )
        )  # fmt: skip

    def _chosen(self, worker_id: WorkerId | None) -> Worker | None:
        if worker_id is None:
            return None
        worker = self.pool.get(worker_id)
        assert worker is not None, f"the policy chose {worker_id}, which is not there"
        return worker

    def _resume_on(
        self, now_s: float, request: Request, worker: Worker, to_compute_tokens: int = 0
    ) -> None:
        """Submit the tokens so far, and where the prompt's blocks are if another has them."""
        assert not request.unknown_tokens, "tokens that are not known can't be injected"
        source = request.source
        # An engine has no transfer to itself; its prefix cache still holds the prompt.
        manifest = request.manifest if source is not None and source.worker is not worker else b""
        if not manifest:
            request.reserve_prefill(worker)
        tokens = tuple(request.tokens)
        request.announced = None  # It comes.
        attempt = self._start(
            now_s, request, worker, Trigger.RESUME_SUBMITTED, len(tokens), bool(manifest)
        )
        self.outbox.note(
            Submit(
                worker.id, request.key, attempt, request.payload, tokens, manifest,
                to_compute_tokens=0 if manifest else to_compute_tokens,
            )
        )  # fmt: skip

    def _start(
        self,
        now_s: float,
        request: Request,
        worker: Worker,
        trigger: Trigger,
        injected_tokens: int = 0,
        with_manifest: bool = False,
    ) -> Attempt:
        attempt = request.next_attempt()
        request.weights = worker.weights
        request.current = request.engage(attempt, worker)
        request.record.attempts.append(
            AttemptRecord(attempt, worker.id, worker.role, now_s, injected_tokens, with_manifest)
        )
        request.advance(now_s, trigger, f"attempt {attempt} on {worker.id}, {trigger}")
        return attempt

    def hand_off(self, now_s: float, request: Request, manifest: bytes) -> None:
        """Its first token is made and its blocks wait: on to the worker chosen at arrival."""
        request.source, request.manifest = request.current, manifest
        request.record.handed_off_s = now_s
        self.counts.handoffs += 1
        self._resume(now_s, request)

    def _resume(self, now_s: float, request: Request) -> None:
        """On the worker that is reserved, or if that can't be used any more, on another."""
        reserved = request.reservation.worker if request.reservation is not None else None
        source = request.source.worker if request.source is not None else None
        if reserved is not None and reserved.usable and reserved is not source:
            request.release_prefill()
            self._resume_on(now_s, request, reserved)
            return
        if request.state is not State.WAITING:
            why = "it needs a worker" if reserved is None else "the worker chosen can't be used"
            request.advance(now_s, Trigger.PARKED, why)
        self._unassign(now_s, request)
        self.place(now_s, request)

    def begin_output(self, now_s: float, request: Request) -> None:
        """Its client gets its first token."""
        request.record.first_token_s = now_s
        ttft_s = request.record.ttft_s
        if request.foreseen is not None and ttft_s is not None:
            self.gate.learn_first_token(now_s, request.foreseen, request.story.terms, ttft_s)

    def first_token(self, now_s: float, request: Request) -> None:
        """Its prompt is computed."""
        request.release_prefill()
        self._placement.first_token(now_s, request.key)
        self.look_again()

    def _unassign(self, now_s: float, request: Request) -> None:
        self.outbox.take_back(request)
        request.unassign()
        self._placement.ended(now_s, request.key, None)
        self.look_again()

    def place_again(self, now_s: float, request: Request, why: str) -> None:
        """It is on no worker any more: find another."""
        self.counts.resubmissions += 1
        request.advance(now_s, Trigger.PARKED, why)
        self._unassign(now_s, request)
        self.place(now_s, request)

    # Ends

    def complete(self, now_s: float, request: Request) -> None:
        """Its last output was given."""
        if request.current is not None:
            request.settle(request.current)
        self._end(now_s, request, End.COMPLETE)

    def cancel(self, now_s: float, request: Request, why: str) -> None:
        """Nobody wants it any more."""
        self._end(now_s, request, End.CANCELLED, why)

    def fail(self, now_s: float, request: Request, fault: Fault, error: str) -> None:
        """Tell the client that it can't go on."""
        self.outbox.give_error(request)
        self._end(now_s, request, End.FAILED, error, fault)

    def engine_failed(self, now_s: float, request: Request, fault: Fault, error: str) -> None:
        """Its engine ended it with an error."""
        if request.current is not None:
            request.settle(request.current)
        self.fail(now_s, request, fault, error)

    def front_lost(self, now_s: float, request: Request) -> None:
        """Nobody is left to be told; its client sees the connection break."""
        self._end(now_s, request, End.FAILED, "Its front ended.", Fault.FRONT_LOST)

    def _end(
        self, now_s: float, request: Request, end: End, why: str = "", fault: Fault | None = None
    ) -> None:
        fetched_from = request.source if request.is_being_fetched else None
        reader_was_told = request.current is not None and request.current.worker.attached
        request.advance(now_s, Trigger.END, f"{end}: {why}" if why else end)
        self.outbox.take_back(request)
        request.release()
        whole = request.position if end is End.COMPLETE else None
        self._placement.ended(now_s, request.key, whole)
        self.look_again()
        del self.requests[request.key]
        self.deadlines.forget(request.key)
        self._waits_no_more(request)
        for engagement in request.engagements:
            if engagement is fetched_from and reader_was_told:
                self.outbox.release_later(now_s, request, engagement)
                continue
            if engagement is fetched_from:
                request.settle(engagement)  # Left to its lease.
            if engagement.live:
                self.outbox.abort(request, engagement)
            if end is End.CANCELLED:
                self.outbox.forget(request.key, engagement)
            else:
                self.outbox.forget_later(now_s, request.key, engagement)
        record = request.record
        record.ended_s, record.end, record.error, record.fault = now_s, end, why, fault
        self._learn_size(request.story)
        ended = _ended(request, end)
        if end is End.CANCELLED:
            self.tell_all(now_s, self.endings.aborted(now_s, request, ended))
        else:
            self._tell(now_s, request, ended)

    def tell_all(self, now_s: float, aborted: Iterable[Told]) -> None:
        """How requests that their fronts aborted have ended is known by now."""
        for request, ended in aborted:
            if ended.end is End.COMPLETE:
                self._placement.stopped(request.shape.kind, request.position)
            self._tell(now_s, request, ended)

    def _tell(self, now_s: float, request: Request, ended: Ended) -> None:
        if request.foreseen is not None:
            self.gate.learn(now_s, request.foreseen, request.story.terms, ended)
        self.outbox.note(ended)

    def _learn_size(self, story: TicketStory) -> None:
        """Once all that one body asked for is over."""
        if story.under_way:
            return
        uses = [
            (record.prompt_tokens, use.cached_tokens)
            for record in story.requests
            if record.attempts and (use := record.attempts[0].prompt_use) is not None
        ]
        if len(uses) == len(story.requests):
            tokens, cached = map(sum, zip(*uses, strict=True))
            kind = kind_of(story.terms, story.path)
            self.gate.sizes.observe(kind, story.terms.body_bytes, tokens, cached)

    # Loss

    def lose(
        self, now_s: float, request: Request, lost: Sequence[Engagement], why: str, died: bool
    ) -> None:
        """These attempts are gone, with their worker if it `died`."""
        for engagement in lost:
            request.settle(engagement)
        if request.source in lost:
            request.source, request.manifest = None, b""
        request.deaths += died
        if request.deaths >= MAX_DEATHS:
            error = f"It was on {request.deaths} workers as they died; {why}."
            self.fail(now_s, request, Fault.POISON, error)
        elif request.current is not None and request.current in lost:
            self._lose_current(now_s, request, request.current, why)
        elif request.current is not None and request.state is State.HANDING_OFF:
            # The blocks may not have been fetched: compute them again rather than wait for them.
            self.counts.resubmissions += 1
            self.outbox.drop(request, request.current)
            request.advance(now_s, Trigger.PARKED, why)
            self._resume(now_s, request)

    def _lose_current(self, now_s: float, request: Request, lost: Engagement, why: str) -> None:
        if self._may_resume(request, lost):
            # What was fetched of the blocks is unknown, and so is whether they are still there.
            self.outbox.leave_to_lease(request)
            self.place_again(now_s, request, why)
        else:
            error = f"Its worker was lost while it generated; {why}."
            self.fail(now_s, request, Fault.WORKER_LOST, error)

    def _may_resume(self, request: Request, lost: Engagement) -> bool:
        if request.unknown_tokens or (request.position and request.shape.prompt_logprobs):
            return False
        return self._settings.resume_streams or not lost.spoke


def _ended(request: Request, end: End) -> Ended:
    record = request.record
    if record.recovered:
        return Ended(request.key, end, record.error, request.position, fault=record.fault)
    ratios = record.ratios()
    return Ended(
        request.key, end, record.error, request.position, fault=record.fault,
        time_to_first_token_s=record.ttft_s, duration_s=record.duration_s,
        time_per_output_token_s=record.tpot_s,
        ttft_to_predicted=ratios.ttft, tpot_to_predicted=ratios.tpot,
    )  # fmt: skip
