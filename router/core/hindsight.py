"""A decision in hindsight: what became of its request, beside what it predicted. Pure.

Predictions count from the decision, and so does what is measured here: a request that waited for a
worker, or that was placed again, has a longer time to first token than its last decision answers
for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from router.core.placement import Decision


class Measured(NamedTuple):
    """What came after a decision; None is what did not come, or came after the next decision."""

    ttft_s: float | None = None
    tpot_s: float | None = None
    """Mean over the tokens after the first; of a request that went on, over those that followed."""
    output_tokens: int | None = None


class Ratios(NamedTuple):
    """Measured divided by predicted: above 1, it took longer."""

    ttft: float | None = None
    tpot: float | None = None


@dataclass(slots=True)
class Decided:
    """A decision, and when in its request's life it was made."""

    decision: Decision
    at_s: float
    made_tokens: int
    """The request's output by then."""

    def measured(
        self,
        first_token_s: float | None,
        next_at_s: float | None,
        ended_s: float | None,
        output_tokens: int,
    ) -> Measured:
        """`next_at_s`: when the request was placed anew, if it was."""
        ttft_s = None
        if first_token_s is not None and not self.made_tokens and first_token_s >= self.at_s:
            ttft_s = first_token_s - self.at_s
        if next_at_s is not None:
            came_first = first_token_s is not None and first_token_s <= next_at_s
            return Measured(ttft_s if came_first else None)
        if ended_s is None:
            return Measured(ttft_s)
        since_s = self.at_s if self.made_tokens else first_token_s
        later_tokens = output_tokens - max(1, self.made_tokens)
        tpot_s = None
        if since_s is not None and later_tokens > 0:
            tpot_s = (ended_s - since_s) / later_tokens
        return Measured(ttft_s, tpot_s, output_tokens - self.made_tokens)

    def ratios(self, measured: Measured) -> Ratios:
        """How far off it was; nothing of a policy that predicts no times."""
        predicted = self.decision.predicted
        if predicted is None:
            return Ratios()
        return Ratios(
            _ratio(measured.ttft_s, predicted.ttft_s), _ratio(measured.tpot_s, predicted.tpot_s)
        )

    def as_json(self, measured: Measured, arrived_s: float) -> dict[str, Any]:
        """Plain values."""
        return {
            "after_s": round(self.at_s - arrived_s, 6),
            **self.decision.as_json(),
            "measured": measured._asdict(),
            "measured_to_predicted": self.ratios(measured)._asdict(),
        }


def _ratio(measured_s: float | None, predicted_s: float | None) -> float | None:
    return measured_s / predicted_s if measured_s is not None and predicted_s else None
