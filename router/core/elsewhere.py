"""What waits at other routers, and whether it goes first: pure.

Each router tells one worker what waits there, and that worker tells the others: how much, and when
the first of it is due. The router whose first is due first goes on, the others wait: so room goes
to who is due, whichever router sees it first. Which of a router's requests takes its turn the
backlog says, which also shares between tenants.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Final, NamedTuple

from engine.base import NOTHING_QUEUED, QUEUE_REPEATED_S, QUEUE_VALID_S, Queued
from protos.ids import WorkerId
from router.core.backlog import Backlog, Before
from router.core.events import TellQueued
from router.core.workers import Worker

CLOSE_S: Final = 0.02
"""Who is due so little after another router's first goes on as well. News take some milliseconds,
and many that are due together must not take turns: engines would wait for that."""


class _Heard(NamedTuple):
    at_s: float
    queued: Queued

    @property
    def first_due_s(self) -> float:
        return self.at_s + self.queued.first_due_in_s


class _Told(NamedTuple):
    to: WorkerId | None = None
    requests: int = 0
    first_due_s: float = math.inf


class Elsewhere:
    """All other routers' queues, as workers tell of them; and what is told of this one's."""

    def __init__(self, backlog: Backlog) -> None:
        self._backlog = backlog
        self._others_known = False
        self._heard: dict[WorkerId, _Heard] = {}
        self._told = _Told()
        self._told_s = -math.inf

    def hear(self, now_s: float, worker: Worker) -> bool:
        """A worker's report. Whether it says anything of queues, or did."""
        queued, before = worker.queued_beside, self._heard.get(worker.id)
        if worker.others.routers or queued.requests:
            self._others_known = True
        if queued.requests:
            self._heard[worker.id] = _Heard(now_s, queued)
        elif before is not None:
            del self._heard[worker.id]
        return before is not None or bool(queued.requests)

    def forget(self, worker: WorkerId) -> None:
        """A worker that is not heard any more."""
        self._heard.pop(worker, None)

    def is_first(self, now_s: float) -> bool:
        """Whether one elsewhere is due before all that wait here."""
        if not self._heard or not self._backlog:
            return False
        due_s = self._backlog.first_due_s
        if due_s <= now_s:
            # Where nothing is promised an overload leaves all overdue: who gave way to whoever is
            # more so would wait for as long as one tenant floods another router.
            return False
        return any(due_s > heard.first_due_s + CLOSE_S for heard in self._valid(now_s))

    def before(self, now_s: float, due_s: float, here: Before) -> Before:
        """What waits before a request that is due then, if this does here: of what waits where
        somebody is due earlier as large a part as of what waits here, this request included, since
        they are spread over routers evenly."""
        queues = [heard.queued for heard in self._valid(now_s) if due_s > heard.first_due_s]
        share = (here.requests + 1) / (len(self._backlog) + 1)
        return Before(
            here.work_s + share * sum(queued.work_s for queued in queues),
            here.requests + share * sum(queued.requests for queued in queues),
        )

    def tell(self, now_s: float, to: WorkerId, *, goes_on: bool = True) -> list[TellQueued]:
        """What to tell of what waits here, if others are to know of it and do not: this worker, and
        one that was told before it that it is not the one any more. Where a router can't go on as
        others can, nobody should wait for it: then nothing waits."""
        requests = len(self._backlog) if goes_on else 0
        if not self._others_known or not (requests or self._told.requests):
            return []
        first_due_s = self._backlog.first_due_s
        news, before = _Told(to, requests, first_due_s), self._told
        if news == before and now_s - self._told_s < QUEUE_REPEATED_S:
            return []
        self._told, self._told_s = news, now_s
        told = []
        if before.to is not None and before.to != to and before.requests:
            told.append(TellQueued(before.to, NOTHING_QUEUED))
        if requests:
            queued = Queued(requests, self._backlog.work_s, first_due_s - now_s)
            told.append(TellQueued(to, queued))
        elif before.to == to:
            told.append(TellQueued(to, NOTHING_QUEUED))
        return told

    def _valid(self, now_s: float) -> Iterator[_Heard]:
        """A worker that says nothing any more may have hung. Whose news end so is looked at again
        with the next tick."""
        return (heard for heard in self._heard.values() if now_s - heard.at_s <= QUEUE_VALID_S)
