"""Requests that wait for a worker, and who goes next: pure.

Tenants share service by tokens, as VTC does (Sheng et al., Fairness in Serving Large Language
Models, OSDI 2024, Algorithm 2): whoever of those that wait got least goes next, where an output
token weighs twice a prompt's, and who comes back after a pause starts no lower than the others are.
Of one tenant's requests the one that is due first goes first. One that would not be in time any
more goes behind those that would, as if it were due `BEHIND_S` later: later, but not never.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, NamedTuple

from protos.ids import RequestKey
from router.core.due_queue import Due, DueQueue

OUTPUT_WEIGHT: Final = 2.0
"""Of an output token against one of a prompt, as in VTC's evaluation."""
BEHIND_S: Final = 30.0
TENANTS_KEPT: Final = 10_000


@dataclass(frozen=True, slots=True)
class Waiting:
    """One request that waits."""

    tenant: str
    due_s: float
    """Who is due first goes first."""
    late_s: float = math.inf
    """By when its prompt must be computed."""
    prefill_s: float = 0.0
    """How long its prompt is thought to take once its turn has come."""
    promised_s: float = 0.0
    """Until its first token: so long before it is late it came."""


class Before(NamedTuple):
    """What waits before a request."""

    work_s: float = 0.0
    """Of prompts, on one worker."""
    requests: float = 0.0


class Backlog:
    """All that wait, by tenant."""

    def __init__(self) -> None:
        self._waiting: dict[RequestKey, tuple[Waiting, Due]] = {}
        """Each with its place in its tenant's queue."""
        self._tenants: dict[str, DueQueue] = {}
        """Those of whom something waits."""
        self._all = DueQueue()
        """Whosever they are."""
        self._served: OrderedDict[str, float] = OrderedDict()
        """Weighted tokens by tenant; the latest served are kept."""
        self._last_left: str | None = None
        self._numbers = 0
        self._put_behind: list[RequestKey] = []

    def __len__(self) -> int:
        return len(self._waiting)

    def __contains__(self, key: object) -> bool:
        return key in self._waiting

    def __iter__(self) -> Iterator[RequestKey]:
        """In the order of their coming."""
        return iter(self._waiting)

    def add(self, key: RequestKey, waiting: Waiting) -> None:
        """It waits from now on; one that waits already stays where it is."""
        if key in self._waiting:
            return
        queue = self._tenants.get(waiting.tenant)
        if queue is None:
            self._lift(waiting.tenant)
            queue = self._tenants[waiting.tenant] = DueQueue()
        self._enqueue(queue, key, waiting, waiting.due_s)

    def remove(self, key: RequestKey) -> None:
        """It waits no more; unknown ones are ignored."""
        found = self._waiting.pop(key, None)
        if found is None:
            return
        waiting, place = found
        queue = self._tenants[waiting.tenant]
        queue.remove(place)
        self._all.remove(place)
        if not self._all:
            self._all = DueQueue()  # Without what rounding left.
        if not queue:
            del self._tenants[waiting.tenant]
            self._last_left = waiting.tenant

    def charge(self, name: str, tokens: float) -> None:
        """A tenant was served so much."""
        self._served[name] = self._served.get(name, 0.0) + tokens
        self._served.move_to_end(name)
        if len(self._served) > TENANTS_KEPT:
            self._served.popitem(last=False)

    def next(self, now_s: float, held_share: float = 0.0) -> RequestKey | None:
        """Who goes next; it still waits. Its worker has as much to do before its prompt as this
        share of what was promised to it."""
        if not self._tenants:
            return None
        served = self._served
        name = min(self._tenants, key=lambda each: served.get(each, 0.0))
        return self._first(now_s, self._tenants[name], held_share)

    def take_put_behind(self) -> list[RequestKey]:
        """Those that were found to be late since this was last asked; some may wait no more."""
        taken, self._put_behind = self._put_behind, []
        return taken

    @property
    def first_due_s(self) -> float:
        """When the one that is due first is; never, if none waits."""
        return self._all.first().due_s if self._all else math.inf

    @property
    def work_s(self) -> float:
        """Of all prompts that wait, on one worker."""
        return self._all.work_s

    def before(self, name: str, due_s: float) -> Before:
        """What goes before a request that comes now: of its tenant what is due earlier, and of
        each other what is served while that is."""
        own_queue = self._tenants.get(name)
        work_s, own = (0.0, 0) if own_queue is None else own_queue.before(due_s)
        requests = own
        for queue in self._tenants.values():
            if queue is not own_queue:
                # Each other tenant gets its turn for each of this one's: this request's included.
                turns = min(len(queue), own + 1)
                work_s += queue.work_s / len(queue) * turns
                requests += turns
        return Before(work_s, requests)

    def _first(self, now_s: float, queue: DueQueue, held_share: float) -> RequestKey:
        while True:
            place = queue.first()
            waiting = self._waiting[place.key][0]
            computed_s = now_s + held_share * waiting.promised_s + waiting.prefill_s
            if place.due_s != waiting.due_s or computed_s <= waiting.late_s:
                return place.key
            queue.remove(place)
            self._all.remove(place)
            self._enqueue(queue, place.key, waiting, waiting.due_s + BEHIND_S)
            self._put_behind.append(place.key)

    def _enqueue(self, queue: DueQueue, key: RequestKey, waiting: Waiting, due_s: float) -> None:
        self._numbers += 1
        place = Due(due_s, self._numbers, key, waiting.prefill_s)
        self._waiting[key] = waiting, place
        queue.add(place)
        self._all.add(place)

    def _lift(self, name: str) -> None:
        """Time in which a tenant asked for nothing is not owed to it."""
        if self._tenants:
            least = min(self._served.get(each, 0.0) for each in self._tenants)
        elif self._last_left is not None:
            least = self._served.get(self._last_left, 0.0)
        else:
            return
        if self._served.get(name, 0.0) < least:
            self.charge(name, least - self._served.get(name, 0.0))
