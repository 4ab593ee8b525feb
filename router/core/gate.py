"""Whether a request is let in: decided at its ticket, while an HTTP status can still be chosen.

What it will get is predicted for when its turn comes, behind all that waits and all that was let in
and has not arrived; if that is not what was promised (the SLOs), it is refused at once, which costs
its client less than a late answer, and those that are served nothing. Of requests of which nothing
was promised none is refused here.

Pure. Boundary: what a prediction is, placement knows; who goes before whom, the backlog.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Final, NamedTuple

from protos.ids import TicketId
from router.core.backlog import Backlog, Before, Waiting
from router.core.elsewhere import Elsewhere
from router.core.events import (
    End,
    Ended,
    Fault,
    Grounds,
    LearnedElsewhere,
    Outlook,
    Priority,
    Shape,
    Terms,
    TicketAsked,
    TicketRefused,
)
from router.core.placement import Expected, Placement, View
from router.core.prompt_sizes import PromptSizes
from router.core.shared_margin import Learned, SharedMargin

SURER: Final = {Priority.HIGH: -0.75, Priority.NORMAL: 0.0, Priority.LOW: 1.25}
"""By how many spreads (standard deviations of the logarithm) more than for others a prediction must
stay below what was promised: who matters less is refused sooner."""
NEAR: Final = 0.5
"""Only predictions of loads that take as much of the room for them tell how wrong those are that
count."""
IDLE: Final = 0.1
"""Others who do less to a request than this share of its own time are not there."""
NEWEST_WEIGHT: Final = 0.01
"""Of a measurement in what is foreseen next. Who is let in now gets its times as many admissions
later as wait, when another mix of requests is served: what a few got must not be passed on as if it
lasted (docs/adr/0008)."""
LARGEST_MARGIN: Final = 1.6
"""Under 1 / NEAR: however wrong predictions were, some that tell how wrong still get in."""
DUE_AFTER: Final = {Priority.HIGH: 0.5, Priority.NORMAL: 1.0, Priority.LOW: 4.0}
"""A request is due after so many times the promised TTFT: what matters more goes first, and none
waits forever."""
DUE_UNPROMISED_S: Final = 10.0
LEARNED_TOLD_S: Final = 1.0
"""How often at most others are told what was learned here."""
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


class Foreseen(NamedTuple):
    """What a request was let in with."""

    expected: Expected
    ttft_factor: float
    tpot_factor: float
    """By which what others do to it was taken to be wrong then."""


class LetIn(NamedTuple):
    """A request that was let in and may not have arrived."""

    until_s: float
    tokens: int
    foreseen: Foreseen

    @property
    def prefill_s(self) -> float:
        """Of its prompt."""
        return self.foreseen.expected.alone_ttft_s


class Gate:
    """Refuses what can't be served as promised."""

    def __init__(
        self, promises: Promises, placement: Placement, view: View, backlog: Backlog,
        elsewhere: Elsewhere,
    ) -> None:  # fmt: skip
        self.sizes = PromptSizes()
        self.ttft_margin = SharedMargin(NEWEST_WEIGHT)
        self.tpot_margin = SharedMargin(NEWEST_WEIGHT)
        """By which what others do to a request took longer than predicted."""
        self._promises = promises
        self._placement = placement
        self._view = view
        self._backlog = backlog
        self._elsewhere = elsewhere
        self._coming: dict[TicketId, LetIn] = {}
        self._coming_s = 0.0
        self._told_s = -math.inf
        self._told_news = 0

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
            hinted_output_tokens=terms.output_tokens,
        )  # fmt: skip
        self._forget_due(now_s)
        due_s = self._due_s(now_s, terms)
        waits = self._elsewhere.before(now_s, due_s, self._backlog.before(terms.tenant, due_s))
        before = Before(waits.work_s + self._coming_s, waits.requests + len(self._coming))
        expected = self._placement.expect(now_s, self._view, shape, before)
        if expected is None:
            return None
        ttft_known, tpot_known = self.ttft_margin.known(now_s), self.tpot_margin.known(now_s)
        surer = SURER[terms.priority]
        ttft = _Load(expected.ttft_s, expected.alone_ttft_s, promised.ttft_s)
        tpot = _Load(expected.tpot_s, expected.alone_tpot_s, promised.tpot_s)
        ttft_s = ttft.at_most_s(ttft_known.times(surer))
        tpot_s = tpot.at_most_s(tpot_known.times(surer))
        if ttft.is_too_much(ttft_s):
            too_late = _TooLate("first token would come after", ttft, ttft_s, 1.0)
        elif tpot.is_too_much(tpot_s):
            # As many must end first as make steps too long.
            too_late = _TooLate("tokens would be apart by", tpot, tpot_s, expected.output_tokens)
        else:
            foreseen = Foreseen(expected, ttft_known.factor, tpot_known.factor)
            let_in = LetIn(now_s + ARRIVES_WITHIN_S, guess.tokens, foreseen)
            self._coming[asked.ticket] = let_in
            self._coming_s += let_in.prefill_s
            return None
        grounds = Grounds(
            guess.tokens, expected.output_tokens, before.requests, before.work_s,
            ttft.outlook(ttft_s), tpot.outlook(tpot_s),
        )  # fmt: skip
        return TicketRefused(429, too_late.retry_s, too_late.message, asked.ticket, grounds)

    def arrived(
        self, now_s: float, ticket: TicketId | None, terms: Terms, prompt_tokens: int
    ) -> tuple[Waiting, Foreseen | None]:
        """It is counted elsewhere from now on. Returns as what it waits for its turn, and what it
        was let in with."""
        promised_s = self._promises.of_request(terms).ttft_s
        let_in = self._coming.pop(ticket, None) if ticket is not None else None
        if let_in is not None:
            self._coming_s -= let_in.prefill_s
            prefill_s = let_in.prefill_s * prompt_tokens / let_in.tokens
        else:
            prefill_s = self._prefill_s(now_s, prompt_tokens) if self._backlog else 0.0
        due_s = self._due_s(now_s, terms)
        waiting = Waiting(terms.tenant, due_s, prefill_s=prefill_s)
        if promised_s is not None:
            waiting = replace(waiting, late_s=now_s + promised_s, promised_s=promised_s)
        return waiting, None if let_in is None else let_in.foreseen

    def learn_first_token(
        self, now_s: float, foreseen: Foreseen, terms: Terms, measured_s: float
    ) -> None:
        """A request that was let in gets its first token: at once, since by its end many more will
        have been let in."""
        promised_s = self._promises.of_request(terms).ttft_s
        load = _Load(foreseen.expected.ttft_s, foreseen.expected.alone_ttft_s, promised_s)
        _learn(now_s, load, measured_s, self.ttft_margin, foreseen.ttft_factor)

    def learn_late(self, now_s: float, foreseen: Foreseen, terms: Terms) -> Foreseen:
        """A request that was let in waits, and would not be in time any more: it goes behind those
        that are. Returns what is left to be held against its times, since when its first token
        comes will tell nothing of the load."""
        promised_s, expected = self._promises.of_request(terms).ttft_s, foreseen.expected
        if _Load(expected.ttft_s, expected.alone_ttft_s, promised_s).is_for_the_margin:
            self.ttft_margin.judge(now_s, late=True)
        return foreseen._replace(expected=expected._replace(ttft_s=expected.alone_ttft_s))

    def learn(self, now_s: float, foreseen: Foreseen, terms: Terms, ended: Ended) -> None:
        """A request that was let in is over: hold its tokens' distance against what was expected,
        and its first token's time if it gave up waiting for that."""
        if ended.end is End.FAILED and ended.fault is not Fault.DEADLINE:
            return  # What broke says nothing of the load.
        promised, expected = self._promises.of_request(terms), foreseen.expected
        # Of who left early it is mostly the wait for the second token, while state moves.
        if ended.time_per_output_token_s is not None and ended.end is End.COMPLETE:
            tpot = _Load(expected.tpot_s, expected.alone_tpot_s, promised.tpot_s)
            _learn(
                now_s, tpot, ended.time_per_output_token_s, self.tpot_margin,
                foreseen.tpot_factor,
            )  # fmt: skip
        ttft = _Load(expected.ttft_s, expected.alone_ttft_s, promised.ttft_s)
        if ended.time_to_first_token_s is None and ttft.is_for_the_margin:
            # Its client gave up, and nobody knows what it would have got; but whoever waited for
            # longer than promised was late.
            assert ttft.promised_s is not None
            if (ended.duration_s or 0.0) > ttft.promised_s:
                self.ttft_margin.judge(now_s, late=True)

    def hear(self, now_s: float, event: LearnedElsewhere) -> None:
        """Another router has learned something."""
        self.ttft_margin.hear(now_s, event.router_id, event.learned.ttft, event.age_s)
        self.tpot_margin.hear(now_s, event.router_id, event.learned.tpot, event.age_s)

    def news(self, now_s: float) -> Learned | None:
        """What was learned here, if others are to know of it and do not."""
        news = self.ttft_margin.news + self.tpot_margin.news
        if news == self._told_news or now_s - self._told_s < LEARNED_TOLD_S:
            return None
        self._told_news, self._told_s = news, now_s
        return Learned(self.ttft_margin.learned(now_s), self.tpot_margin.learned(now_s))

    def _due_s(self, now_s: float, terms: Terms) -> float:
        promised_s = self._promises.of_request(terms).ttft_s or DUE_UNPROMISED_S
        return now_s + DUE_AFTER[terms.priority] * promised_s

    def left(self, ticket: TicketId) -> None:
        """Its response is over: nothing more comes with it."""
        let_in = self._coming.pop(ticket, None)
        if let_in is not None:
            self._coming_s -= let_in.prefill_s

    def _prefill_s(self, now_s: float, prompt_tokens: int) -> float:
        """Of a prompt that will wait before others, and of which that was not asked."""
        expected = self._placement.expect(now_s, self._view, Shape(prompt_tokens, None), Before())
        return 0.0 if expected is None else expected.alone_ttft_s

    def _forget_due(self, now_s: float) -> None:
        while self._coming:
            ticket, let_in = next(iter(self._coming.items()))
            if let_in.until_s > now_s:
                return
            del self._coming[ticket]
            self._coming_s -= let_in.prefill_s
        self._coming_s = 0.0  # What rounding left.


def kind_of(terms: Terms, path: str) -> str:
    """Requests of one tenant on one route are alike."""
    return f"{terms.tenant} {path}"


class _Load(NamedTuple):
    """A latency, what of it is the request's own, and what was promised of it. The rest is what
    others do to it: only that can be foreseen wrongly by much, and be less at another time."""

    expected_s: float
    alone_s: float
    promised_s: float | None

    @property
    def s(self) -> float:
        return max(0.0, self.expected_s - self.alone_s)

    @property
    def is_near(self) -> bool:
        """It takes up enough of what was promised to tell something."""
        if self.promised_s is None:
            return False
        return 0 < NEAR * (self.promised_s - self.alone_s) <= self.s

    @property
    def is_for_the_margin(self) -> bool:
        """Whether it is let in depends on the margin. Not so of one that has all for itself, nor of
        one that is late all alone."""
        if self.promised_s is None:
            return False
        return self.alone_s < self.promised_s and not self.is_idle

    @property
    def is_idle(self) -> bool:
        """Others do nothing to it that counts."""
        return self.s <= IDLE * self.alone_s

    def at_most_s(self, times: float) -> float:
        return self.alone_s + min(LARGEST_MARGIN, times) * self.s

    def outlook(self, at_most_s: float) -> Outlook:
        return Outlook(self.promised_s, self.alone_s, self.expected_s, at_most_s)

    def is_too_much(self, at_most_s: float) -> bool:
        """Where there is none nothing is refused: its client would gain nothing by coming later."""
        if self.promised_s is None or self.is_idle:
            return False
        return at_most_s > self.promised_s


def _learn(now_s: float, load: _Load, measured_s: float, margin: SharedMargin, used: float) -> None:
    if load.promised_s is None:
        return
    if load.is_for_the_margin:
        margin.judge(now_s, late=measured_s > load.promised_s)
    if load.is_near:
        # A load that did not come at all has no logarithm and is passed over, so that the margin is
        # a little too wide.
        margin.observe(now_s, measured_s - load.alone_s, load.s, used=used)


class _TooLate(NamedTuple):
    """Why a request is not let in."""

    what: str
    load: _Load
    at_most_s: float
    times: float
    """How often as much as it is too late by must pass until it would not be."""

    @property
    def retry_s(self) -> int:
        """When it may be."""
        late_s = self.times * (self.at_most_s - (self.load.promised_s or 0.0))
        return min(LONGEST_RETRY_S, max(1, math.ceil(late_s)))

    @property
    def message(self) -> str:
        """For its client."""
        return (
            f"Its {self.what} about {self.at_most_s:.3g} s, and {self.load.promised_s:.3g} s were "
            f"promised; try again in {self.retry_s} s."
        )
