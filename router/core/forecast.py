"""One worker's near future, as placement's own decisions make it: what waits and decodes there.

Pure. Prompts are computed in the order of their placing; each has a time by which it should be, and
first tokens that come earlier or later move those behind. What other routers have there is known
in sum, as the worker reports it: it takes time as well, before whatever is placed after it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from engine.base import NOTHING_PLACED, PlacedWork
from engine.learned_times import Factor
from protos.ids import RequestKey, WorkerId

LEAST_SEEN_S: Final = 1.0
"""A share of less time than this says nothing."""
LARGEST_SHARE: Final = 0.95
"""More is not believed: something always decodes."""


@dataclass(slots=True)
class Part:
    """What one request has on one worker."""

    worker: WorkerId
    placed_s: float = 0.0
    """Or handed off to this worker."""
    work_s: float = 0.0
    """What the profile says that its prompt's tokens take."""
    base_s: float = 0.0
    """What its steps take beside that, if it has them for itself."""
    occupies_s: float = 0.0
    """By how much it delays what comes after it: prompts share steps."""
    ttft_s: float = 0.0
    """Its prompt's predicted wait and time, from when it was placed."""
    ttft_share: float = 0.0
    """Of what was promised."""
    due_s: float = 0.0
    """When its prompt should be computed there; 0 if it is not to be."""
    context_tokens: float = 0.0
    """What it adds to each decode step there; 0 if it does not decode there."""
    coming_tokens: int = 0
    """Of its KV state, what may not be there yet, nor in the worker's reports."""
    fetched_blocks: float = 0.0
    """Of these, what another worker computed or has."""
    decoding: bool = False
    """Its tokens are being made there."""


@dataclass(slots=True)
class Done:
    """Prompts that one step completed: how long they took, and how long they should have."""

    at_s: float = 0.0
    measured_s: float = 0.0
    base_s: float = 0.0
    work_s: float = 0.0

    def add(
        self, now_s: float, began_s: float, work_s: float, base_s: float, factor: Factor
    ) -> None:
        """More of them; they were not begun before. With the first of the next step, this step's
        are compared."""
        if now_s != self.at_s:
            if self.work_s:
                # Beside a step's base, a short prompt's own time is mostly what else went on.
                known = self.work_s / (self.work_s + self.base_s)
                factor.observe(self.measured_s - self.base_s, self.work_s, known)
            self.measured_s = now_s - max(began_s, self.at_s)
            self.at_s, self.base_s, self.work_s = now_s, 0.0, 0.0
        self.base_s = max(self.base_s, base_s)
        self.work_s += work_s


class Others(NamedTuple):
    """What other routers have on a worker, as last reported."""

    placed: PlacedWork = NOTHING_PLACED
    waiting_s: float = 0.0
    """What their prompts that are not computed take."""
    since_s: float = 0.0
    """Since when there have been such prompts, if there are."""


NO_OTHERS: Final = Others()


class Figures(NamedTuple):
    """A forecast in numbers alone, for `columns`."""

    free_s: float
    """Long past, where nothing waits."""
    first_due_s: float
    """Never, where nothing waits."""
    waiting: int
    load_s: float
    """Time that goes to prompts, decayed until `load_at_s`."""
    load_at_s: float
    began_s: float
    """When a prompt was first placed there; never, if none was."""
    decodes: int
    context_tokens: float
    running: int
    running_context_tokens: float
    coming_tokens: int
    routers: int
    """That have work there, this one included."""


@dataclass(slots=True)
class Forecast:
    """One worker, as this policy's decisions make it."""

    free_s: float = 0.0
    """When the prompts that wait there should be computed."""
    prefills: dict[RequestKey, Part] = field(default_factory=dict)
    """In the order in which they will be computed."""
    decodes: int = 0
    context_tokens: float = 0.0
    """Of all that decode there or will."""
    running: int = 0
    running_context_tokens: float = 0.0
    """Of those that decode there now."""
    coming_tokens: int = 0
    others: Others = NO_OTHERS
    done: Done = field(default_factory=Done)
    _waiting_s: float = 0.0
    """By how much the prompts of this router that wait there delay what comes after them."""
    _prefill_load_s: float = 0.0
    _load_at_s: float = 0.0
    _began_s: float = math.inf

    @property
    def idle(self) -> bool:
        """Nothing of this router is there."""
        return not (self.prefills or self.decodes or self.coming_tokens)

    def figures(self) -> Figures:
        """As it stands."""
        first = next(iter(self.prefills.values()), None)
        others = self.others.placed
        waiting = len(self.prefills) + others.prompts
        return Figures(
            self.free_s if waiting else -math.inf,
            math.inf if first is None else first.due_s,
            waiting, self._prefill_load_s, self._load_at_s, self._began_s,
            self.decodes + others.decodes, self.context_tokens + others.context_tokens,
            self.running + others.running,
            self.running_context_tokens + others.running_context_tokens,
            self.coming_tokens + others.coming_tokens, 1 + others.routers,
        )  # fmt: skip

    def hear(self, now_s: float, others: Others, added_s: float, window_s: float) -> None:
        """What other routers have there is not what it was: so much was added to their prompts."""
        self._catch_up(now_s)
        placed, before = others.placed, self.others.placed
        all_s = self._waiting_s + others.waiting_s
        if placed.computed_tokens > before.computed_tokens:
            # Of what is left nothing is computed yet.
            self.free_s = now_s + all_s
        else:
            self.free_s = now_s + min(self.queue_s(now_s) + added_s, all_s)
        self.others = others
        if added_s > 0:
            self._count_load(now_s, added_s, window_s)

    def queue_s(self, now_s: float) -> float:
        """How long the prompts that wait there take; what is overdue counts as due now."""
        if not self.prefills:
            return max(0.0, self.free_s - now_s) if self.others.placed.prompts else 0.0
        return max(0.0, self.free_s + self._late_s(now_s) - now_s)

    def add_prefill(self, now_s: float, key: RequestKey, part: Part, window_s: float) -> None:
        """Behind all that wait."""
        self._catch_up(now_s)
        self.free_s = now_s + self.queue_s(now_s) + part.occupies_s
        part.due_s = self.free_s
        self.prefills[key] = part
        self._waiting_s += part.occupies_s
        self._count_load(now_s, part.occupies_s, window_s)

    def end_prefill(self, now_s: float, key: RequestKey) -> None:
        """It is computed, or will not be: what waits behind it comes as much sooner."""
        if key not in self.prefills:
            return
        self._catch_up(now_s)
        behind = False
        saved_s = 0.0
        for other, part in self.prefills.items():
            if behind:
                part.due_s -= saved_s
            elif other == key:
                behind = True
                saved_s = min(part.occupies_s, max(0.0, part.due_s - now_s))
        self.free_s -= saved_s
        self._waiting_s -= self.prefills.pop(key).occupies_s
        if not self.prefills:
            self._waiting_s = 0.0  # But for rounding.

    def has_come(self, part: Part) -> None:
        """A part's KV state is there: it decodes from now on, if it is to."""
        self.coming_tokens -= part.coming_tokens
        part.coming_tokens = 0
        if part.context_tokens and not part.decoding:
            part.decoding = True
            self.running += 1
            self.running_context_tokens += part.context_tokens

    def will_decode(self, part: Part) -> None:
        """A part is to decode there."""
        self.decodes += 1
        self.context_tokens += part.context_tokens

    def end(self, part: Part) -> None:
        """Nothing of a part is there any more; its prompt was ended before."""
        self.coming_tokens -= part.coming_tokens
        if part.context_tokens:
            self.decodes -= 1
            self.context_tokens -= part.context_tokens
        if part.decoding:
            self.running -= 1
            self.running_context_tokens -= part.context_tokens

    def _late_s(self, now_s: float) -> float:
        first = next(iter(self.prefills.values()))
        return max(0.0, now_s - first.due_s)

    def _catch_up(self, now_s: float) -> None:
        """What is late by now makes all that wait late."""
        if self.prefills and (late_s := self._late_s(now_s)):
            for part in self.prefills.values():
                part.due_s += late_s
            self.free_s += late_s

    def _count_load(self, now_s: float, added_s: float, window_s: float) -> None:
        """So much more of its time goes to prompts."""
        decayed_s = self._prefill_load_s * math.exp((self._load_at_s - now_s) / window_s)
        self._prefill_load_s = decayed_s + added_s
        self._load_at_s = now_s
        self._began_s = min(self._began_s, now_s)
