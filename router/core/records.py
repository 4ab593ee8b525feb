"""What happened to each request and why: kept for a while after its end, for people.

Pure. Times come in as the core's clock gives them; `as_json` turns them into wall-clock time.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Final

from protos.ids import RequestKey, TicketId, WorkerId
from router.core.events import EdgeEnded, End, Fault, PromptUse
from router.core.placement import Decision

TICKET_PATTERN: Final = re.compile(r"(?<![0-9a-f])[0-9a-f]{44}(?![0-9a-f])")
"""A ticket id, within the ids that fronts make of it: `cmpl-TICKET-0`, `chatcmpl-TICKET`."""


_WITHOUT_ENGINE: Final = frozenset(("/tokenize", "/detokenize"))
"""Fronts answer these by themselves: there will be nothing to tell."""


@dataclass(slots=True)
class AttemptRecord:
    """One submission to a worker."""

    attempt: int
    worker: WorkerId
    role: str
    at_s: float
    injected_tokens: int
    """Output tokens that it started with."""
    with_manifest: bool
    prompt_use: PromptUse | None = None


@dataclass(slots=True)
class Record:
    """One engine request's story."""

    key: RequestKey
    arrived_s: float
    prompt_tokens: int
    max_tokens: int | None
    recovered: bool = False
    first_token_s: float | None = None
    handed_off_s: float | None = None
    resumed_s: float | None = None
    """First output of the worker that it was handed to."""
    ended_s: float | None = None
    end: End | None = None
    error: str = ""
    fault: Fault | None = None
    deadline_s: float | None = None
    output_tokens: int = 0
    stripped_arguments: Sequence[str] = ()
    """Engine-internal arguments that its client sent and that were removed."""
    decisions: list[Decision] = field(default_factory=list)
    attempts: list[AttemptRecord] = field(default_factory=list)
    story: list[tuple[float, str]] = field(default_factory=list)

    def note(self, now_s: float, what: str) -> None:
        """Append to the story."""
        self.story.append((now_s, what))

    def tell(self) -> str:
        """The story, a line per step, in seconds since its arrival."""
        return "\n".join(f"{at_s - self.arrived_s:9.3f} s  {what}" for at_s, what in self.story)

    def as_json(self, wall_offset_s: float) -> dict[str, Any]:
        """Plain values. `wall_offset_s` is wall-clock time minus the core's."""
        times = ("arrived_s", "first_token_s", "handed_off_s", "resumed_s", "ended_s", "deadline_s")
        answer = {
            each.name: getattr(self, each.name)
            for each in fields(self)
            if each.name not in ("decisions", "attempts")
        }
        answer["decisions"] = [decision.as_json() for decision in self.decisions]
        answer["attempts"] = [asdict(attempt) for attempt in self.attempts]
        for name in times:
            at_s = answer.pop(name)
            answer[name.removesuffix("_s") + "_at"] = None if at_s is None else at_s + wall_offset_s
        answer["story"] = [
            {"after_s": round(at_s - self.arrived_s, 6), "what": what} for at_s, what in self.story
        ]
        for attempt in answer["attempts"]:
            attempt["after_s"] = round(attempt.pop("at_s") - self.arrived_s, 6)
        return answer


@dataclass(slots=True)
class TicketStory:
    """What one ticket covered."""

    id: str
    asked_s: float
    method: str = ""
    path: str = ""
    edge_end: EdgeEnded | None = None
    requests: list[Record] = field(default_factory=list)

    @property
    def under_way(self) -> bool:
        """Some request of it has not ended."""
        return any(record.end is None for record in self.requests)

    @property
    def failure(self) -> Record | None:
        """The request of it that failed first."""
        failed = [record for record in self.requests if record.end is End.FAILED]
        return min(failed, key=lambda record: record.ended_s or 0.0, default=None)

    def as_json(self, wall_offset_s: float) -> dict[str, Any]:
        """Plain values."""
        return {
            "id": self.id,
            "asked_at": self.asked_s + wall_offset_s,
            "method": self.method,
            "path": self.path,
            "edge": {
                "status": self.edge_end.status if self.edge_end else "",
                "termination": self.edge_end.termination if self.edge_end else "",
            },
            "requests": [record.as_json(wall_offset_s) for record in self.requests],
        }


class RecordBook:
    """The latest stories by ticket id; the oldest that are over make room."""

    def __init__(self, kept: int) -> None:
        self._kept = kept
        self._stories: OrderedDict[str, TicketStory] = OrderedDict()

    def open_ticket(self, now_s: float, ticket: TicketId, method: str, path: str) -> None:
        """The edge was given a ticket."""
        if path not in _WITHOUT_ENGINE:
            self._add(TicketStory(ticket, now_s, method, path))

    def add(self, ticket: TicketId | None, record: Record) -> TicketStory:
        """A request came with this ticket, or without a valid one."""
        name = ticket or str(record.key)
        story = self._stories.get(name)
        if story is None:
            story = TicketStory(name, record.arrived_s)
            self._add(story)
        story.requests.append(record)
        return story

    def edge_ended(self, event: EdgeEnded) -> TicketStory | None:
        """The edge logged how the response ended; None of one that is not kept."""
        story = self._stories.get(event.ticket)
        if story is not None:
            story.edge_end = event
        return story

    def find(self, text: str) -> TicketStory | None:
        """By ticket id, by a response id made of one, or by request key."""
        match = TICKET_PATTERN.search(text)
        return self._stories.get(match.group() if match else text)

    def _add(self, story: TicketStory) -> None:
        self._stories[story.id] = story
        excess = len(self._stories) - self._kept
        # Those under way stay, and are passed over: two looks for each that comes suffice for not
        # many more than are under way to pile up, however many that are.
        for _ in range(min(2, max(0, excess))):
            _, oldest = self._stories.popitem(last=False)
            if oldest.under_way:
                self._stories[oldest.id] = oldest
