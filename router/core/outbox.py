"""What is to be sent: to fronts, and to workers about attempts; and how often what happened.

Nothing is noted for a worker whose link is broken or that is dead: what it missed is put right
when it is up again, by comparing what it holds.
"""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, field
from typing import Final

from engine.base import NOTHING_PLACED
from protos.anchor_link import Deliver, Delivery
from protos.enginecore import error_output
from protos.ids import Attempt, RequestKey
from router.core.events import AbortOn, Command, Forget, OutputReport, Resend, Reserve
from router.core.lifecycle import Engagement, Request
from router.core.placement import Reason
from router.core.workers import Worker

FORGET_AFTER_S: Final = 1.0
"""How long a worker keeps an ended request's outputs: should this router die just now, the anchor
may not have read its last words, and the next router asks for them."""


@dataclass(slots=True)
class Counts:
    """What happened so far."""

    decisions: Counter[Reason] = field(default_factory=Counter)
    handoffs: int = 0
    resubmissions: int = 0
    """Attempts made because an earlier one was lost."""
    fenced_outputs: int = 0
    """Dropped: of an older attempt, an older incarnation, or a request that has ended."""
    repeated_outputs: int = 0
    """Dropped: their tokens were known already."""
    resends: int = 0
    orphans: int = 0
    """Attempts that workers held and nobody wanted."""
    tickets: int = 0
    refused_tickets: int = 0
    recovered: int = 0
    cache_snapshots: int = 0
    cache_changes: int = 0
    """As workers counted them, several in one message included."""
    cache_gaps: int = 0
    """Reports that did not follow those before, so that a snapshot was asked for."""


class Outbox:
    """Commands in the order in which they were noted, deliveries grouped by front before them."""

    def __init__(self, counts: Counts) -> None:
        self._counts = counts
        self._commands: list[Command] = []
        self._deliveries: dict[int, list[Delivery]] = {}
        self._forgets: deque[tuple[float, RequestKey, Engagement, bool]] = deque()

    def take(self) -> list[Command]:
        """All since the last call."""
        commands = self._commands
        if self._deliveries:
            commands = [Deliver(front, given) for front, given in self._deliveries.items()]
            commands += self._commands
            self._deliveries = {}
        self._commands = []
        return commands

    def note(self, command: Command) -> None:
        """Send this; if it is for a worker, the caller knows that its link stands."""
        self._commands.append(command)

    # To fronts

    def give(self, request: Request, output: OutputReport, finished: bool) -> None:
        """Pass an engine's output on."""
        count = len(output.token_ids)
        delivery = Delivery(
            request.request_id, output.first_position, count, finished, output.payload
        )
        self._deliveries.setdefault(request.front, []).append(delivery)
        request.delivered = output.first_position + count

    def give_error(self, request: Request) -> None:
        """Tell the client that it can't go on."""
        payload = error_output(request.request_id)
        delivery = Delivery(request.request_id, request.delivered, 0, True, payload)
        self._deliveries.setdefault(request.front, []).append(delivery)

    # To workers, about attempts

    def abort(self, request: Request, engagement: Engagement) -> None:
        """End an attempt and free its blocks."""
        request.settle(engagement)
        worker = engagement.worker
        if worker.attached:
            self._commands.append(AbortOn(worker.id, request.key, engagement.attempt))

    def announce(self, request: Request, worker: Worker) -> None:
        """It will decode there: if there are other routers, they learn of it."""
        if worker.others != NOTHING_PLACED and worker.attached:
            request.announced = worker
            self._commands.append(Reserve(worker.id, request.key, request.shape.prompt_tokens))

    def take_back(self, request: Request) -> None:
        """It will not decode where that was announced, if it was."""
        worker, request.announced = request.announced, None
        if worker is not None and worker.attached:
            self._commands.append(Reserve(worker.id, request.key, 0))

    def drop(self, request: Request, engagement: Engagement) -> None:
        """End an attempt that another takes the place of; no output of it is needed."""
        self.abort(request, engagement)
        self.forget(request.key, engagement)
        request.engagements.remove(engagement)

    def abort_source(self, request: Request) -> None:
        """Free the blocks that were handed off."""
        if request.source is not None:
            self.abort(request, request.source)
            request.source, request.manifest = None, b""

    def ask_again(self, request: Request, engagement: Engagement, from_position: int) -> None:
        """Have the worker send what is missing, once."""
        worker = engagement.worker
        if worker.attached and request.asked_from != from_position:
            request.asked_from = from_position
            self._counts.resends += 1
            command = Resend(worker.id, request.key, engagement.attempt, from_position)
            self._commands.append(command)

    def leave_to_lease(self, request: Request) -> None:
        """Its reader may live on unseen: the blocks that were handed off stay until they lapse."""
        if request.source is not None:
            request.settle(request.source)
            request.source, request.manifest = None, b""

    def disown(self, worker: Worker, key: RequestKey, attempt: Attempt, ended: bool) -> None:
        """A worker holds what nobody wants. If it ended, a reader may be at its blocks."""
        self._counts.orphans += 1
        if not ended:
            self._commands.append(AbortOn(worker.id, key, attempt))
        self._commands.append(Forget(worker.id, key, attempt))

    def forget(self, key: RequestKey, engagement: Engagement) -> None:
        """Its outputs are needed no more."""
        worker = engagement.worker
        if worker.attached:
            self._commands.append(Forget(worker.id, key, engagement.attempt))

    def forget_later(self, now_s: float, key: RequestKey, engagement: Engagement) -> None:
        """Its outputs are needed no more once the front has them."""
        self._forgets.append((now_s + FORGET_AFTER_S, key, engagement, False))

    def release_later(self, now_s: float, request: Request, engagement: Engagement) -> None:
        """Free blocks that another worker may be fetching just now, once it has been told to stop.

        Freed and refilled under a read they would be cached there as this prompt's. The real
        engine frees them itself as soon as the reader has read or has given up.
        """
        request.settle(engagement)
        self._forgets.append((now_s + FORGET_AFTER_S, request.key, engagement, True))

    def forget_due(self, now_s: float) -> None:
        """By now the fronts have what they were given, and readers know that they are not."""
        while self._forgets and self._forgets[0][0] <= now_s:
            _, key, engagement, release = self._forgets.popleft()
            if release and engagement.worker.attached:
                self._commands.append(AbortOn(engagement.worker.id, key, engagement.attempt))
            self.forget(key, engagement)
