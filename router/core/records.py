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
from router.core.events import (
    NO_TERMS,
    EdgeEnded,
    End,
    Fault,
    PromptUse,
    Terms,
    TicketAsked,
    TicketRefused,
)
from router.core.hindsight import Decided, Measured, Ratios
from router.core.placement import Decision

TICKET_PATTERN: Final = re.compile(r"(?<![0-9a-f])[0-9a-f]{38,83}(?![0-9a-f])")
"""A ticket id, within the ids that fronts make of it: `cmpl-TICKET-0`, `chatcmpl-TICKET`."""


REFUSED_SHARE: Final = 0.1
"""As many refusals are kept, of as many stories."""
WITHOUT_ENGINE: Final = frozenset(("/tokenize", "/detokenize", "/v1/messages/count_tokens"))
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
    decisions: list[Decided] = field(default_factory=list)
    attempts: list[AttemptRecord] = field(default_factory=list)
    story: list[tuple[float, str]] = field(default_factory=list)

    def note(self, now_s: float, what: str) -> None:
        """Append to the story."""
        self.story.append((now_s, what))

    def decide(self, now_s: float, decision: Decision) -> None:
        """It was placed, for the first time or anew."""
        self.decisions.append(Decided(decision, now_s, self.output_tokens))

    def measured(self) -> list[Measured]:
        """What became of each decision."""
        next_at_s: list[float | None] = [each.at_s for each in self.decisions[1:]]
        return [
            each.measured(self.first_token_s, following_s, self.ended_s, self.output_tokens)
            for each, following_s in zip(self.decisions, [*next_at_s, None], strict=False)
        ]

    def ratios(self) -> Ratios:
        """How far off the decisions were that it got its first token by, and its last ones."""
        ratios = Ratios()
        for each, measured in zip(self.decisions, self.measured(), strict=True):
            later = each.ratios(measured)
            ratios = Ratios(
                ratios.ttft if later.ttft is None else later.ttft,
                ratios.tpot if later.tpot is None else later.tpot,
            )
        return ratios

    # What its client got, from its arrival on; of one that was taken over nobody knows.

    @property
    def ttft_s(self) -> float | None:
        """Time to first token."""
        return None if self.recovered else _between(self.arrived_s, self.first_token_s)

    @property
    def duration_s(self) -> float | None:
        """Until its end."""
        return None if self.recovered else _between(self.arrived_s, self.ended_s)

    @property
    def tpot_s(self) -> float | None:
        """Mean time per output token after the first."""
        if self.recovered or self.output_tokens < 2:
            return None
        decoding_s = _between(self.first_token_s, self.ended_s)
        return None if decoding_s is None else decoding_s / (self.output_tokens - 1)

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
        answer["decisions"] = [
            decided.as_json(measured, self.arrived_s)
            for decided, measured in zip(self.decisions, self.measured(), strict=True)
        ]
        answer["actual"] = self._actual()
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

    def _actual(self) -> dict[str, Any]:
        uses = [each.prompt_use for each in self.attempts if each.prompt_use is not None]
        return {
            "ttft_s": self.ttft_s,
            "tpot_s": self.tpot_s,
            "duration_s": self.duration_s,
            "handoff_s": _between(self.handed_off_s, self.resumed_s),
            "output_tokens": self.output_tokens,
            "prompt": {
                "computed_tokens": sum(use.computed_tokens for use in uses),
                "cached_tokens": sum(use.cached_tokens for use in uses),
                "transferred_tokens": sum(use.transferred_tokens for use in uses),
            },
        }


@dataclass(slots=True)
class TicketStory:
    """What one ticket covered."""

    id: str
    asked_s: float
    method: str = ""
    path: str = ""
    terms: Terms = NO_TERMS
    edge_end: EdgeEnded | None = None
    refused: TicketRefused | None = None
    """Then nothing else came of it."""
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
            "priority": self.terms.priority,
            "ttft_slo_s": self.terms.ttft_slo_s,
            "tpot_slo_s": self.terms.tpot_slo_s,
            "hinted_output_tokens": self.terms.output_tokens,
            "edge": {
                "status": self.edge_end.status if self.edge_end else "",
                "termination": self.edge_end.termination if self.edge_end else "",
            },
            "refusal": None if self.refused is None else _refusal_as_json(self.refused),
            "requests": [record.as_json(wall_offset_s) for record in self.requests],
        }


def _refusal_as_json(refused: TicketRefused) -> dict[str, Any]:
    grounds = refused.grounds
    return {
        "status": refused.status,
        "retry_after_s": refused.retry_after_s,
        "message": refused.message,
        "grounds": None
        if grounds is None
        else {
            **grounds._asdict(),
            "ttft": grounds.ttft._asdict(),
            "tpot": grounds.tpot._asdict(),
        },
    }


class RecordBook:
    """The latest stories by ticket id; the oldest that are over make room."""

    def __init__(self, kept: int) -> None:
        self._kept = kept
        self._stories: OrderedDict[str, TicketStory] = OrderedDict()
        self._refused: OrderedDict[str, TicketStory] = OrderedDict()
        """Apart, so that a flood of refusals leaves what was served."""

    def open_ticket(self, now_s: float, asked: TicketAsked) -> None:
        """The edge was given a ticket."""
        if asked.path not in WITHOUT_ENGINE:
            self._add(TicketStory(asked.ticket, now_s, asked.method, asked.path, asked.terms))

    def refuse(self, now_s: float, asked: TicketAsked, refused: TicketRefused) -> None:
        """It was not let in."""
        self._refused[asked.ticket] = TicketStory(
            asked.ticket, now_s, asked.method, asked.path, asked.terms, refused=refused
        )
        if len(self._refused) > self._kept * REFUSED_SHARE:
            self._refused.popitem(last=False)

    def add(self, ticket: TicketId | None, record: Record, terms: Terms) -> TicketStory:
        """A request came with this ticket, or without a valid one. The terms count if the ticket
        was given by a former router."""
        name = ticket or str(record.key)
        story = self._stories.get(name)
        if story is None:
            story = TicketStory(name, record.arrived_s, terms=terms)
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
        name = match.group() if match else text
        return self._stories.get(name) or self._refused.get(name)

    def _add(self, story: TicketStory) -> None:
        self._stories[story.id] = story
        excess = len(self._stories) - self._kept
        # Those under way stay, and are passed over: two looks for each that comes suffice for not
        # many more than are under way to pile up, however many that are.
        for _ in range(min(2, max(0, excess))):
            _, oldest = self._stories.popitem(last=False)
            if oldest.under_way:
                self._stories[oldest.id] = oldest


def _between(since_s: float | None, until_s: float | None) -> float | None:
    return None if since_s is None or until_s is None else until_s - since_s
