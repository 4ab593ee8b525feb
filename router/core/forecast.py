"""One worker's near future, as placement's own decisions make it: what waits and decodes there.

Pure. Prompts are computed in the order of their placing; each has a time by which it should be, and
first tokens that come earlier or later move those behind. What other routers put there is not
in it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Final

from engine.learned_times import Factor
from protos.ids import RequestKey, WorkerId

LARGEST_SHARE: Final = 0.95
"""More is not believed: something always decodes."""


@dataclass(slots=True)
class Part:
    """What one request has on one worker."""

    worker: WorkerId
    prefill_s: float = 0.0
    placed_s: float = 0.0
    due_s: float = 0.0
    """When its prompt should be computed there; 0 if it is not to be."""
    context_tokens: float = 0.0
    """What it adds to each decode step there; 0 if it does not decode there."""
    coming_tokens: int = 0
    """Of its KV state that is not there yet, and not in the worker's reports."""


@dataclass(slots=True)
class Done:
    """Prompts that one step completed: how long they took, and how long they should have."""

    at_s: float = 0.0
    measured_s: float = 0.0
    predicted_s: float = 0.0

    def add(self, now_s: float, part: Part, factor: Factor) -> None:
        """One more. With the first of the next step, this step's are compared."""
        # What the factor says by now was part of the prediction.
        predicted_s = part.prefill_s / factor.value
        if now_s == self.at_s:
            self.predicted_s += predicted_s
            return
        factor.observe(self.measured_s, self.predicted_s)
        self.measured_s = now_s - max(part.placed_s, self.at_s)
        self.at_s, self.predicted_s = now_s, predicted_s


@dataclass(slots=True)
class Forecast:
    """One worker, as this policy's decisions make it."""

    free_s: float = 0.0
    """When the prompts that wait there should be computed."""
    prefills: dict[RequestKey, Part] = field(default_factory=dict)
    """In the order in which they will be computed."""
    decodes: int = 0
    context_tokens: float = 0.0
    coming_tokens: int = 0
    done: Done = field(default_factory=Done)
    _prefill_load_s: float = 0.0
    _load_at_s: float = 0.0

    def queue_s(self, now_s: float) -> float:
        """How long the prompts that wait there take; what is overdue counts as due now."""
        if not self.prefills:
            return 0.0
        first = next(iter(self.prefills.values()))
        late_s = now_s - first.due_s
        free_s = self.free_s + late_s if late_s > 0 else self.free_s
        return max(0.0, free_s - now_s)

    def prefill_share(self, now_s: float, window_s: float) -> float:
        """Of its time, what goes to prompts: exponentially averaged over the window."""
        decayed_s = self._prefill_load_s * math.exp((self._load_at_s - now_s) / window_s)
        return min(LARGEST_SHARE, decayed_s / window_s)

    def add_prefill(self, now_s: float, key: RequestKey, part: Part, window_s: float) -> None:
        """Behind all that wait."""
        self.free_s = now_s + self.queue_s(now_s) + part.prefill_s
        part.due_s = self.free_s
        self.prefills[key] = part
        decayed_s = self._prefill_load_s * math.exp((self._load_at_s - now_s) / window_s)
        self._prefill_load_s, self._load_at_s = decayed_s + part.prefill_s, now_s

    def end_prefill(self, now_s: float, key: RequestKey, computed: bool) -> None:
        """It is computed, or will not be: what waits behind it comes as much sooner or later."""
        part = self.prefills.pop(key, None)
        if part is None:
            return
        shift_s = now_s - part.due_s if computed else -part.prefill_s
        for behind in self.prefills.values():
            behind.due_s += shift_s
        self.free_s += shift_s
