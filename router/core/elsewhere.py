"""What waits at other routers, and whether it goes first: pure.

Each router tells one worker what waits there, and that worker tells the others: how much, and when
the first of it is due. The router whose first is due first goes on, the others wait: so room goes
to who is due, whichever router sees it first. Which of a router's requests takes its turn the
backlog says, which also shares between tenants.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Final, NamedTuple

from engine.base import QUEUE_REPEATED_S, QUEUE_VALID_S, Queued
from protos.ids import WorkerId
from router.core.backlog import Backlog, Before
from router.core.events import TellQueued
from router.core.workers import Worker

CLOSE_S: Final = 0.02
"""Who is due so little after another router's first goes on as well: news of it are about as old,
and many that are due together need not take turns."""


class _Heard(NamedTuple):
    at_s: float
    queued: Queued


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

    def hear(self, now_s: float, worker: Worker) -> None:
        """A worker's report."""
        if worker.others.routers:
            self._others_known = True
        if worker.queued_beside.requests:
            self._heard[worker.id] = _Heard(now_s, worker.queued_beside)
        else:
            self._heard.pop(worker.id, None)

    def go_first(self, now_s: float) -> bool:
        """Whether one waits elsewhere that is due before all that wait here."""
        if not self._heard or not self._backlog:
            return False
        first_due_s = min(
            (heard.at_s + heard.queued.first_due_in_s for heard in self._valid(now_s)),
            default=math.inf,
        )
        return self._backlog.first_due_s > first_due_s + CLOSE_S

    def before(self, now_s: float, here: Before) -> Before:
        """What waits before a request, if this does here: of what waits elsewhere as large a part
        as of what waits here, this request included, since they are spread over routers evenly."""
        if not self._heard:
            return here
        queues = [heard.queued for heard in self._valid(now_s)]
        share = (here.requests + 1) / (len(self._backlog) + 1)
        return Before(
            here.work_s + share * sum(queued.work_s for queued in queues),
            here.requests + share * sum(queued.requests for queued in queues),
        )

    def tell(self, now_s: float, to: WorkerId) -> TellQueued | None:
        """What to tell this worker of what waits here, if others are to know of it and do not. What
        another worker was told before is soon forgotten there."""
        if not self._others_known:
            return None
        requests, first_due_s = len(self._backlog), self._backlog.first_due_s
        news = _Told(to, requests, first_due_s)
        if not requests:
            if not self._told.requests:
                return None
        elif news == self._told and now_s - self._told_s < QUEUE_REPEATED_S:
            return None
        self._told, self._told_s = news, now_s
        return TellQueued(to, Queued(requests, self._backlog.work_s, first_due_s - now_s))

    def _valid(self, now_s: float) -> Iterable[_Heard]:
        """A worker that says nothing any more may have hung."""
        return (heard for heard in self._heard.values() if now_s - heard.at_s <= QUEUE_VALID_S)
