"""What each router has on a worker, in running totals, and what waits at it: pure.

A router knows its own requests; of all others' it is told the sum, so that it does not take for
free what they use. A change costs the same however much there is. What waits at routers is on no
worker: each tells it to one of them, which passes it on.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from operator import sub

from engine.base import NOTHING_PLACED, NOTHING_QUEUED, QUEUE_VALID_S, PlacedWork, Queued


@dataclass(slots=True)
class Share:
    """What one attempt adds to its router's work."""

    router_id: str
    to_compute_tokens: int
    """0: its prompt is not computed here."""
    pairs: int
    context_tokens: int
    decodes: bool
    begun: bool = False
    """Its prompt's state is there, and its first output made."""
    over: bool = False


class WorkByRouter:
    """The work of all routers on one worker."""

    def __init__(self) -> None:
        self._of: dict[str, PlacedWork] = {}
        self._all = NOTHING_PLACED
        self._reserved: dict[str, dict[str, Share]] = {}
        """By router and request."""
        self._queued: dict[str, tuple[float, Queued]] = {}
        """By router, with the time at which it was said."""
        self._changed: set[str] = set()
        """Whose work changed since the others were told."""

    def add(
        self, router_id: str, context_tokens: int, to_compute_tokens: int, *, decodes: bool
    ) -> Share:
        """A router's new attempt."""
        # Each of the last tokens attends to all before it, and on average half of themselves.
        pairs = to_compute_tokens * context_tokens - to_compute_tokens * to_compute_tokens // 2
        share = Share(router_id, to_compute_tokens, pairs, context_tokens, decodes)
        self._move(router_id, _waiting(share, 1), _decoding(share, 1))
        return share

    def reserve(self, router_id: str, key: str, context_tokens: int) -> None:
        """A router's request is to decode here once another worker has computed its prompt."""
        self.release(router_id, key)
        self._reserved.setdefault(router_id, {})[key] = self.add(
            router_id, context_tokens, 0, decodes=True
        )

    def release(self, router_id: str, key: str) -> None:
        """It came, or will not come."""
        share = self._reserved.get(router_id, {}).pop(key, None)
        if share is not None:
            self.end(share)

    def release_all(self, router_id: str) -> None:
        """A router begins anew, or is gone."""
        if self._queued.pop(router_id, None) is not None:
            self._changed.add(router_id)
        for share in self._reserved.pop(router_id, {}).values():
            self.end(share)

    def queue(self, now_s: float, router_id: str, queued: Queued) -> None:
        """So much waits at a router."""
        if queued.requests:
            self._queued[router_id] = now_s, queued
        else:
            self._queued.pop(router_id, None)
        self._changed.add(router_id)

    def queued_beside(self, now_s: float, router_id: str) -> Queued:
        """What waits at all others, as far as they said so lately."""
        found = NOTHING_QUEUED
        for other, (said_s, queued) in self._queued.items():
            if other != router_id and now_s - said_s <= QUEUE_VALID_S:
                found = Queued(
                    found.requests + queued.requests, found.work_s + queued.work_s,
                    min(found.first_due_in_s, queued.first_due_in_s + said_s - now_s),
                )  # fmt: skip
        return found

    def begin(self, share: Share) -> None:
        """Its first output is made."""
        assert not share.begun
        share.begun = True
        computed = PlacedWork(computed_tokens=share.to_compute_tokens, computed_pairs=share.pairs)
        self._move(share.router_id, _waiting(share, -1), computed, _running(share, 1))

    def end(self, share: Share) -> None:
        """Nothing of it is here any more; comes again for one that ended and is given up."""
        if share.over:
            return
        share.over = True
        left = _running(share, -1) if share.begun else _waiting(share, -1)
        self._move(share.router_id, left, _decoding(share, -1))

    def forget(self, router_id: str) -> None:
        """A router that has nothing here any more."""
        self.release_all(router_id)
        gone = self._of.pop(router_id, None)
        if gone is not None:
            self._all = _minus(self._all, gone)
            self._changed.add(router_id)

    def others(self, router_id: str) -> PlacedWork | None:
        """What all but this one have here; None if none ever had anything."""
        own = self._of.get(router_id)
        if own is None:
            return self._all if self._of else None
        return _minus(self._all, own) if len(self._of) > 1 else None

    def changed_beside(self, routers: Iterable[str]) -> list[str]:
        """Those of these to whom others' work is not what it was when it was last told."""
        return [each for each in routers if self._changed - {each}]

    def told(self) -> None:
        """All were."""
        self._changed.clear()

    def _move(self, router_id: str, *parts: PlacedWork) -> None:
        if router_id not in self._of:
            self._of[router_id] = NOTHING_PLACED
            parts = (*parts, PlacedWork(routers=1))
        self._of[router_id] = _plus(self._of[router_id], parts)
        self._all = _plus(self._all, parts)
        self._changed.add(router_id)


def _waiting(share: Share, times: int) -> PlacedWork:
    if not share.to_compute_tokens:
        return PlacedWork(coming_tokens=times * share.context_tokens)
    return PlacedWork(
        prompts=times,
        prompt_tokens=times * share.to_compute_tokens,
        prompt_pairs=times * share.pairs,
        coming_tokens=times * share.to_compute_tokens,
    )


def _decoding(share: Share, times: int) -> PlacedWork:
    if not share.decodes:
        return NOTHING_PLACED
    return PlacedWork(decodes=times, context_tokens=times * share.context_tokens)


def _running(share: Share, times: int) -> PlacedWork:
    if not share.decodes:
        return NOTHING_PLACED
    return PlacedWork(running=times, running_context_tokens=times * share.context_tokens)


def _plus(whole: PlacedWork, parts: Iterable[PlacedWork]) -> PlacedWork:
    return PlacedWork(*map(sum, zip(whole, *parts, strict=True)))


def _minus(whole: PlacedWork, part: PlacedWork) -> PlacedWork:
    return PlacedWork(*map(sub, whole, part))
