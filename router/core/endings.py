"""Tells a matched stop string from a client that left: to an engine both are aborts.

Pure. Which of the two it was, the edge's log says, before the abort or soon after it.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Final, NamedTuple

from router.core.events import End, Ended
from router.core.lifecycle import Request
from router.core.records import TicketStory

EDGE_SAYS_WITHIN_S: Final = 2.0
"""Without a word of the edge for so long its client counts as gone: a log may be lost."""


class Told(NamedTuple):
    """A request and its end, as it is known for good."""

    request: Request
    ended: Ended


@dataclass(slots=True)
class _Aborted:
    """Requests of one ticket that wait for the edge's word."""

    story: TicketStory
    due_s: float
    ends: list[Told] = field(default_factory=list)


class Endings:
    """Requests that their fronts aborted and whose ends are not told yet."""

    def __init__(self) -> None:
        self._aborted: dict[str, _Aborted] = {}
        """By ticket, oldest first."""

    def aborted(self, now_s: float, request: Request, ended: Ended) -> list[Told]:
        """A front aborted it. Returns what is to be told at once."""
        story = request.story
        if story.edge_end is not None:
            return [_tell(story, request, ended)]
        waiting = self._aborted.get(story.id)
        if waiting is None:
            waiting = self._aborted[story.id] = _Aborted(story, now_s + EDGE_SAYS_WITHIN_S)
        waiting.ends.append(Told(request, ended))
        return []

    def edge_ended(self, story: TicketStory) -> list[Told]:
        """The edge said how the response of this ticket ended."""
        waiting = self._aborted.pop(story.id, None)
        return [] if waiting is None else _tell_all(waiting)

    def due(self, now_s: float) -> list[Told]:
        """Those whose time is up."""
        told: list[Told] = []
        while self._aborted:
            ticket, oldest = next(iter(self._aborted.items()))
            if oldest.due_s > now_s:
                break
            del self._aborted[ticket]
            told += _tell_all(oldest)
        return told


def _tell_all(waiting: _Aborted) -> list[Told]:
    return [_tell(waiting.story, request, ended) for request, ended in waiting.ends]


def _tell(story: TicketStory, request: Request, ended: Ended) -> Told:
    if story.edge_end is None or not story.edge_end.orderly:
        return Told(request, ended)
    record = request.record
    record.end, record.error = End.COMPLETE, ""
    record.story.append((record.ended_s or 0.0, "its front had all it wanted: a stop string"))
    return Told(request, replace(ended, end=End.COMPLETE, error=""))
