"""After a router's restart: who holds what of the requests that were under way.

The anchor names the requests and how many tokens their fronts were given; each worker, once up,
names the attempts that it holds. The newest attempt goes on, because its tokens are those that the
client has; which one that is shows only when every worker was asked, or is known to be dead.

A request goes on from a chain of attempts: the newest, preceded by those that it was handed off
from. Their outputs are asked for from the first on, which tells the tokens that a later resume
needs; what the front has of them is not given again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from protos.ids import RequestKey
from router.core.events import Fault, HeldAttempt
from router.core.lifecycle import Engagement, Request, State, Trigger
from router.core.moves import Moves
from router.core.records import AttemptRecord
from router.core.workers import Reservation, Worker

WAIT_S: Final = 5.0
"""How long to wait for workers that can't be reached."""
ATTEMPTS_APART: Final = 1000
"""New attempts count on from here, so that one held by a worker that comes late is smaller."""


class Recovery:
    """The requests in state RECOVERING: their live engagements are what workers claimed to hold."""

    def __init__(self, moves: Moves) -> None:
        self._moves = moves
        self._waiting: dict[RequestKey, Request] = {}
        """Those whose workers were not all asked."""
        self._settle_at_s = 0.0

    def begin(self, now_s: float, requests: list[Request]) -> None:
        """These were under way."""
        self._moves.counts.recovered += len(requests)
        self._waiting = {request.key: request for request in requests}
        self._settle_at_s = now_s + WAIT_S

    def awaits(self, request: Request) -> bool:
        """A worker may still claim it."""
        return request.key in self._waiting

    def claim(self, request: Request, worker: Worker, held: HeldAttempt) -> None:
        """A worker holds an attempt of a request that is not settled yet."""
        engagement = request.engagement_on(worker, held.attempt)
        if engagement is None:
            engagement = request.engage(held.attempt, worker)
        engagement.first_position = held.first_position
        engagement.next_position = held.next_position
        engagement.aborted, engagement.ended = held.aborted, held.ended

    def proceed(self, now_s: float) -> None:
        """Settle everything once all workers were asked, or waiting longer makes no sense."""
        if not self._waiting:
            return
        if self._moves.pool.all_heard_of or now_s >= self._settle_at_s:
            requests, self._waiting = self._waiting, {}
            for request in requests.values():
                if request.state is State.RECOVERING:
                    self._settle(now_s, request)

    def lose(self, now_s: float, request: Request, lost: Sequence[Engagement]) -> None:
        """A worker that held these died, or forgot them: look at the rest anew."""
        for engagement in lost:
            request.settle(engagement)
        if not self.awaits(request):
            request.current = request.source = None
            request.tokens.clear()
            request.position = request.unknown_tokens = 0
            self._settle(now_s, request)

    def rebuilt(self, now_s: float, request: Request, manifest: bytes) -> None:
        """Tokens of an earlier attempt came again; on to the next one when they are complete."""
        current = request.current
        assert current is not None
        if manifest:
            request.manifest = manifest
        later = [e for e in request.live_engagements() if e.attempt > current.attempt]
        if request.position >= later[0].first_position:
            self._go_on(now_s, request, later)

    def _settle(self, now_s: float, request: Request) -> None:
        claims = request.live_engagements()
        chain = _chain(claims)
        if not chain or not _goes_on(chain, request.delivered):
            chain = []
        for engagement in claims:
            if engagement not in chain:
                self._let_go(request, engagement)
        newest = claims[-1].attempt if claims else 0
        request.attempts_made = max(request.attempts_made, newest + ATTEMPTS_APART)
        if chain:
            request.unknown_tokens = request.position = chain[0].first_position
            request.weights = chain[0].worker.weights
            self._go_on(now_s, request, chain)
        elif request.delivered == 0:
            self._moves.place_again(now_s, request, "no worker holds it")
        else:
            error = "The worker that held it was lost while the router restarted."
            self._moves.fail(now_s, request, Fault.WORKER_LOST, error)

    def _let_go(self, request: Request, engagement: Engagement) -> None:
        if engagement.ended:
            # Another worker may be fetching its blocks: they are left to their lease.
            request.settle(engagement)
            self._moves.outbox.forget(request.key, engagement)
            request.engagements.remove(engagement)
        else:
            self._moves.outbox.drop(request, engagement)

    def _go_on(self, now_s: float, request: Request, chain: list[Engagement]) -> None:
        """Take the chain's first attempt for the current one and have its outputs sent again."""
        self._moves.outbox.abort_source(request)
        request.source, request.current = request.current, chain[0]
        engagement, worker = chain[0], chain[0].worker
        request.record.attempts.append(
            AttemptRecord(
                engagement.attempt, worker.id, worker.role, now_s,
                injected_tokens=engagement.first_position, with_manifest=False,
            )
        )  # fmt: skip
        # What its client has seen of this attempt can't be made a second time.
        engagement.spoke = request.delivered > engagement.first_position
        if len(chain) == 1:
            self._adopt(now_s, request, engagement)
        request.asked_from = -1
        self._moves.outbox.ask_again(request, engagement, request.position)

    def _adopt(self, now_s: float, request: Request, engagement: Engagement) -> None:
        """The newest attempt: what state it is in shows in what it holds."""
        request.reservation = Reservation(engagement.worker, requests=1).take()
        self._moves.adopt(now_s, request, engagement)
        where = f"found attempt {engagement.attempt} on {engagement.worker.id}"
        if engagement.first_position == 0:
            request.advance(now_s, Trigger.ADOPTED, where)
        elif engagement.next_position > engagement.first_position:
            request.advance(now_s, Trigger.RESUMED, where)
            self._moves.outbox.abort_source(request)
        else:
            request.advance(now_s, Trigger.RESUME_SUBMITTED, where)


def _goes_on(chain: list[Engagement], delivered: int) -> bool:
    """All that the client lacks comes from these, and none of what it has is contradicted.

    After an attempt that was aborted there was another, which nobody holds.
    """
    begin, end = chain[0].first_position, chain[-1].next_position
    return begin <= delivered <= end and not chain[-1].aborted


def _chain(claims: list[Engagement]) -> list[Engagement]:
    """The newest claim, and before it those that cover the positions before its first.

    `claims` are ordered by attempt.
    """
    chain = claims[-1:]
    for claim in reversed(claims[:-1]):
        if claim.first_position < chain[0].first_position <= claim.next_position:
            chain.insert(0, claim)
    return chain
