"""Whether a request is let in: decided at its ticket, while an HTTP status can still be chosen.

What it will get is predicted for when its turn comes, behind all that waits and all that was let in
and has not arrived; if that is not what was promised (the SLOs), it is refused at once, which costs
its client less than a late answer, and those that are served nothing. Of requests of which nothing
was promised none is refused here.

Pure. Boundary: what a prediction is, placement knows; who goes before whom, the backlog.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final, NamedTuple

from engine.learned_times import Factor
from protos.ids import TicketId
from router.core.backlog import Backlog, Before, Waiting
from router.core.events import Ended, Priority, Shape, Terms, TicketAsked, TicketRefused
from router.core.placement import Expected, Placement, View
from router.core.prompt_sizes import PromptSizes

SURE: Final = {Priority.HIGH: 0.5, Priority.NORMAL: 1.5, Priority.LOW: 3.0}
"""By how many spreads (standard deviations of the logarithm) a prediction must stay below what was
promised: who matters less is refused sooner."""
NEAR: Final = 0.5
"""Only predictions that take as much of what was promised tell how wrong those are that count."""
LARGEST_MARGIN: Final = 1.6
"""Under 1 / NEAR: however wrong predictions were, some that tell how wrong still get in."""
DUE_AFTER: Final = {Priority.HIGH: 0.5, Priority.NORMAL: 1.0, Priority.LOW: 4.0}
"""A request is due after so many times the promised TTFT: what matters more goes first, and none
waits forever."""
DUE_UNPROMISED_S: Final = 10.0
ARRIVES_WITHIN_S: Final = 5.0
"""After its ticket; a body that a front refuses never arrives."""
LONGEST_RETRY_S: Final = 60


@dataclass(frozen=True, slots=True)
class Promises:
    """What is promised where a request does not say; None promises nothing."""

    ttft_s: float | None = None
    tpot_s: float | None = None

    def of_request(self, terms: Terms) -> Promises:
        """With what the request asks for itself."""
        return Promises(terms.ttft_slo_s or self.ttft_s, terms.tpot_slo_s or self.tpot_s)


NOTHING_PROMISED: Final = Promises()


class LetIn(NamedTuple):
    """A request that was let in and may not have arrived."""

    until_s: float
    tokens: int
    expected: Expected


class Gate:
    """Refuses what can't be served as promised."""

    def __init__(
        self, promises: Promises, placement: Placement, view: View, backlog: Backlog
    ) -> None:
        self.sizes = PromptSizes()
        self.ttft_factor, self.tpot_factor = Factor(), Factor()
        """By which what was promised to be near took longer than predicted."""
        self._promises = promises
        self._placement = placement
        self._view = view
        self._backlog = backlog
        self._coming: dict[TicketId, LetIn] = {}
        self._coming_s = 0.0

    def ask(self, now_s: float, asked: TicketAsked) -> TicketRefused | None:
        """Why it is not let in; None if it is, and then it is counted until it arrives."""
        terms = asked.terms
        promised = self._promises.of_request(terms)
        if promised.ttft_s is None and promised.tpot_s is None:
            return None
        guess = self.sizes.guess(kind_of(terms, asked.path), terms.body_bytes)
        shape = Shape(
            guess.tokens, None, kind=kind_of(terms, asked.path), cached_tokens=guess.cached_tokens,
            ttft_slo_s=promised.ttft_s, tpot_slo_s=promised.tpot_s,
        )  # fmt: skip
        self._forget_due(now_s)
        waits = self._backlog.before(terms.tenant, self._due_s(now_s, terms))
        before = Before(waits.work_s + self._coming_s, waits.requests + len(self._coming))
        expected = self._placement.expect(now_s, self._view, shape, before)
        if expected is None:
            return None
        refusal = self._refusal(expected, promised, SURE[terms.priority])
        if refusal is None:
            let_in = LetIn(now_s + ARRIVES_WITHIN_S, guess.tokens, expected)
            self._coming[asked.ticket] = let_in
            self._coming_s += expected.prefill_s
        return refusal

    def _refusal(self, expected: Expected, promised: Promises, sure: float) -> TicketRefused | None:
        if promised.ttft_s is not None:
            ttft_s = _at_most(expected.ttft_s, self.ttft_factor, sure)
            if ttft_s > promised.ttft_s:
                what = "first token would come after"
                return _refuse(what, ttft_s, promised.ttft_s, ttft_s - promised.ttft_s)
        if promised.tpot_s is not None:
            tpot_s = _at_most(expected.tpot_s, self.tpot_factor, sure)
            if tpot_s > promised.tpot_s:
                # As many must end first as make steps too long.
                late_s = (tpot_s - promised.tpot_s) * expected.output_tokens
                return _refuse("tokens would be apart by", tpot_s, promised.tpot_s, late_s)
        return None

    def arrived(
        self, now_s: float, ticket: TicketId | None, terms: Terms, prompt_tokens: int
    ) -> tuple[Waiting, Expected | None]:
        """It is counted elsewhere from now on. Returns as what it waits for its turn, and what it
        was let in with."""
        promised_s = self._promises.of_request(terms).ttft_s or math.inf
        let_in = self._coming.pop(ticket, None) if ticket is not None else None
        prefill_s = 0.0
        if let_in is not None:
            self._coming_s -= let_in.expected.prefill_s
            prefill_s = let_in.expected.prefill_s * prompt_tokens / let_in.tokens
        due_s = self._due_s(now_s, terms)
        waiting = Waiting(terms.tenant, due_s, now_s + promised_s, prefill_s)
        return waiting, None if let_in is None else let_in.expected

    def learn(self, expected: Expected, terms: Terms, ended: Ended) -> None:
        """A request that was let in is complete: hold its times against what was expected."""
        promised = self._promises.of_request(terms)
        for expected_s, measured_s, promised_s, factor in (
            (expected.ttft_s, ended.time_to_first_token_s, promised.ttft_s, self.ttft_factor),
            (expected.tpot_s, ended.time_per_output_token_s, promised.tpot_s, self.tpot_factor),
        ):
            if measured_s and promised_s and expected_s >= NEAR * promised_s:
                factor.observe(measured_s, expected_s)

    def _due_s(self, now_s: float, terms: Terms) -> float:
        promised_s = self._promises.of_request(terms).ttft_s or DUE_UNPROMISED_S
        return now_s + DUE_AFTER[terms.priority] * promised_s

    def _forget_due(self, now_s: float) -> None:
        while self._coming:
            ticket, let_in = next(iter(self._coming.items()))
            if let_in.until_s > now_s:
                return
            del self._coming[ticket]
            self._coming_s -= let_in.expected.prefill_s
        self._coming_s = 0.0  # What rounding left.


def kind_of(terms: Terms, path: str) -> str:
    """Requests of one tenant on one route are alike."""
    return f"{terms.tenant} {path}"


def _at_most(expected_s: float, factor: Factor, sure: float) -> float:
    return expected_s * min(LARGEST_MARGIN, factor.value * math.exp(sure * factor.spread))


def _refuse(what: str, expected_s: float, promised_s: float, late_s: float) -> TicketRefused:
    retry_s = min(LONGEST_RETRY_S, max(1, math.ceil(late_s)))
    message = (
        f"Its {what} about {expected_s:.3g} s, and {promised_s:.3g} s were promised; "
        f"try again in {retry_s} s."
    )
    return TicketRefused(429, retry_s, message)
