"""Requests that wait for a worker, and who goes next: pure.

Tenants share service by tokens, as VTC does (Sheng et al., Fairness in Serving Large Language
Models, OSDI 2024, Algorithm 2): whoever of those that wait got least goes next, where an output
token weighs twice a prompt's, and who comes back after a pause starts no lower than the others are.
Of one tenant's requests the one that is due first goes first. One that can't be in time any more
goes behind those that can, as if it were due `BEHIND_S` later: later, but not never.
"""

from __future__ import annotations

import heapq
import math
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, NamedTuple

from protos.ids import RequestKey

OUTPUT_WEIGHT: Final = 2.0
"""Of an output token against one of a prompt, as in VTC's evaluation."""
BEHIND_S: Final = 30.0
TENANTS_KEPT: Final = 10_000
_STALE_KEPT: Final = 64
"""Entries of those that left, in a heap, beside as many as wait."""


@dataclass(frozen=True, slots=True)
class Waiting:
    """One request that waits."""

    tenant: str
    due_s: float
    """Who is due first goes first."""
    late_s: float = math.inf
    """By when its first token was promised."""
    prefill_s: float = 0.0
    """How long its prompt is thought to take once its turn has come."""


class Before(NamedTuple):
    """What waits before a request."""

    work_s: float = 0.0
    """Of prompts, on one worker."""
    requests: float = 0.0


@dataclass(slots=True)
class _Tenant:
    queue: list[tuple[float, int, RequestKey]]
    """A heap by the time when each is due; those that left stay until they come up."""
    work_s: float = 0.0
    waiting: int = 0


class Backlog:
    """All that wait, by tenant."""

    def __init__(self) -> None:
        self._waiting: dict[RequestKey, tuple[Waiting, float, int]] = {}
        """Each with the time by which it is sorted, and the number of its place in the heap."""
        self._tenants: dict[str, _Tenant] = {}
        """Those of whom something waits."""
        self._served: OrderedDict[str, float] = OrderedDict()
        """Weighted tokens by tenant; the latest served are kept."""
        self._last_left: str | None = None
        self._numbers = 0

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
        tenant = self._tenants.get(waiting.tenant)
        if tenant is None:
            self._lift(waiting.tenant)
            tenant = self._tenants[waiting.tenant] = _Tenant([])
        tenant.work_s += waiting.prefill_s
        tenant.waiting += 1
        self._push(tenant, key, waiting, waiting.due_s)

    def remove(self, key: RequestKey) -> None:
        """It waits no more; unknown ones are ignored."""
        found = self._waiting.pop(key, None)
        if found is None:
            return
        name = found[0].tenant
        tenant = self._tenants[name]
        tenant.waiting -= 1
        tenant.work_s -= found[0].prefill_s
        if not tenant.waiting:
            del self._tenants[name]
            self._last_left = name
        elif len(tenant.queue) > 2 * tenant.waiting + _STALE_KEPT:
            tenant.queue = [each for each in tenant.queue if self._is_current(each)]
            heapq.heapify(tenant.queue)

    def charge(self, name: str, tokens: float) -> None:
        """A tenant was served so much."""
        self._served[name] = self._served.get(name, 0.0) + tokens
        self._served.move_to_end(name)
        if len(self._served) > TENANTS_KEPT:
            self._served.popitem(last=False)

    def next(self, now_s: float) -> RequestKey | None:
        """Who goes next; it still waits."""
        if not self._tenants:
            return None
        served = self._served
        name = min(self._tenants, key=lambda each: served.get(each, 0.0))
        return self._first(now_s, self._tenants[name])

    def before(self, name: str, due_s: float) -> Before:
        """What goes before a request that comes now: of its tenant what is due earlier, and of
        each other what is served while that is."""
        own_s, own = 0.0, 0
        for waiting, sorted_s, _ in self._waiting.values():
            if waiting.tenant == name and sorted_s <= due_s:
                own_s += waiting.prefill_s
                own += 1
        others = [tenant for each, tenant in self._tenants.items() if each != name]
        # Each other tenant gets its turn for each of this one's: this request's own included.
        work_s = own_s + sum(
            min(tenant.work_s, tenant.work_s / tenant.waiting * (own + 1)) for tenant in others
        )
        return Before(work_s, own + sum(min(tenant.waiting, own + 1) for tenant in others))

    def _first(self, now_s: float, tenant: _Tenant) -> RequestKey:
        while True:
            sorted_s, _, key = tenant.queue[0]
            if not self._is_current(tenant.queue[0]):
                heapq.heappop(tenant.queue)
                continue
            waiting = self._waiting[key][0]
            if sorted_s == waiting.due_s and now_s + waiting.prefill_s > waiting.late_s:
                heapq.heappop(tenant.queue)
                self._push(tenant, key, waiting, waiting.due_s + BEHIND_S)
            else:
                return key

    def _is_current(self, entry: tuple[float, int, RequestKey]) -> bool:
        _, number, key = entry
        return key in self._waiting and self._waiting[key][2] == number

    def _push(self, tenant: _Tenant, key: RequestKey, waiting: Waiting, sorted_s: float) -> None:
        self._numbers += 1
        self._waiting[key] = (waiting, sorted_s, self._numbers)
        heapq.heappush(tenant.queue, (sorted_s, self._numbers, key))

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
