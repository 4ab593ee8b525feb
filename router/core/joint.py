"""Joint placement: prefill worker, decode worker, or one for both, by predicted times.

For each request it predicts, on every worker, when the first token would come and how far apart
the later ones would, and weighs both against what was promised (the SLOs), together with what the
request does to others: the time that its prompt takes from the requests behind it, and from those
that decode beside it. The sum of a prefill's and a decode's cost is least where each is, since a
transfer costs the same from anywhere; so pairs need not be enumerated, and one worker for both is
compared with the best pair.

A latency that is the share x of its SLO hurts by x squared: so work goes where there is room, and
how fast the fast ones are matters little.

What it puts on a worker it counts in the same call, in a forecast of that worker: the prompts that
wait there, in order, and when each should be computed; the requests that decode there, and their
context. First tokens that come earlier or later than predicted move the forecast.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np

from engine.base import NOTHING_PLACED
from engine.learned_times import LearnedTimes
from engine.spec import PoolTimes
from protos.ids import RequestKey, WorkerId
from router.core.ahead import Ahead
from router.core.arrivals import Arrivals
from router.core.backlog import Before
from router.core.candidates import Column, Shortlist
from router.core.columns import Columns
from router.core.costs import COMPARED, WEIGHTS, Asked, Found, Pricing, Slo, Weights
from router.core.events import Role, Shape
from router.core.forecast import Forecast, Part
from router.core.others import hear
from router.core.output_lengths import OutputLengths
from router.core.placement import (
    NEVER_SPLIT,
    Decision,
    Expected,
    Predicted,
    Reason,
    TieBreak,
    View,
    never_split_because,
)
from router.core.workers import Worker

_GONE_KEPT: Final = 16
_AGED_AT_ONCE: Final = 2
_LATE: Final = 4.0
"""What takes so many times as long as predicted, and a minute, counts as over."""
_LATE_S: Final = 60.0
_LONG: Final = 10.0
"""Outputs without a limit are taken to be so many times as long as expected at most."""
_TTFT: Final = COMPARED.index("ttft_s")
_TPOT: Final = COMPARED.index("tpot_s")


@dataclass(slots=True)
class _Placed:
    """One request; the part whose prompt is to be computed comes first."""

    kind: str
    addresses: tuple[bytes, ...]
    parts: list[Part]
    first_token_by_s: float
    """After this, nobody waits for its first token any more."""
    over_by_s: float


class _Choice(NamedTuple):
    """The best worker for one part."""

    at: int
    """Its place in the columns."""
    worker: WorkerId
    cost: float
    numbers: Sequence[float]
    """By `COMPARED`."""


class _Best(NamedTuple):
    """The least predicted cost."""

    reason: Reason
    chosen: _Choice
    """It makes the tokens, and without a first also computes the prompt."""
    first: _Choice | None
    computing: slice
    """Of the columns: those of which one computes the prompt."""


class JointPlacement:
    """See the module."""

    def __init__(
        self, tie_break: TieBreak, engines: PoolTimes, slo: Slo, weights: Weights = WEIGHTS
    ) -> None:
        self._tie_break = tie_break
        self.learned = LearnedTimes()
        self._pricing = Pricing(engines, weights, self.learned)
        self._slo = slo
        self._weights = weights
        self.held_share = weights.hold
        self._lengths = OutputLengths()
        self._arrivals = Arrivals(weights.share_window_s)
        self.forecasts: dict[WorkerId, Forecast] = {}
        self._columns: Columns | None = None
        self._changed: set[WorkerId] = set()
        """Whose forecast is not as the columns say."""
        self._placed: OrderedDict[RequestKey, _Placed] = OrderedDict()
        """Those that were looked at longest ago, by `_age`, first."""
        self._ahead = Ahead()

    # What is asked

    def place(self, now_s: float, view: View, key: RequestKey, shape: Shape) -> Decision | None:
        """The least predicted cost."""
        prefill, decode = view.pool.usable(Role.PREFILL), view.pool.usable(Role.DECODE)
        if not prefill and not decode:
            return None
        self._prune(view)
        self._age(now_s)
        ask = self._asked(now_s, shape)
        there = self._find(ask, view, shape, prefill, decode)
        columns, pricing, kept = there.columns, self._pricing, Shortlist()
        if shape.fetchable and decode:
            rests = pricing.decode(ask, there)
            rest = self._least(Role.DECODE, columns, columns.last, rests, kept)
            self._count(ask, there, key, shape, rest, None, computed=False)
            return _decision(Reason.RESUME, shape, rest, None, kept, to_compute_tokens=0)
        best = self._best(ask, view, shape, there, kept)
        # What can't be split must not stand before others while workers of the other pool are idle.
        able = slice(None) if best.reason in NEVER_SPLIT else best.computing
        if not shape.output_tokens and (
            there.all_full or pricing.all_busy(there, able, self._slo.ttft_s)
        ):
            # Who waits for room comes to a worker that is idle by then.
            self.held_share = 0.0 if there.all_full else self._weights.hold
            return None
        self._count(ask, there, key, shape, best.chosen, best.first, computed=True)
        to_compute_tokens = ask.tokens - int(there.cached[(best.first or best.chosen).at])
        return _decision(
            best.reason, shape, best.chosen, best.first, kept, to_compute_tokens=to_compute_tokens
        )

    def expect(self, now_s: float, view: View, shape: Shape, before: Before) -> Expected | None:
        """By the worker, or the two, that it would go to now."""
        prefill, decode = view.pool.usable(Role.PREFILL), view.pool.usable(Role.DECODE)
        if not prefill and not decode:
            return None
        self._age(now_s)
        ask = self._asked(now_s, shape)
        there = self._find(ask, view, shape, prefill, decode)
        best = self._best(ask, view, shape, there, Shortlist())
        first = best.first or best.chosen
        queues_s = there.queue_s[best.computing]
        # What waits fills up the shortest queues first; those that caches made longer stay so.
        level_s = float(queues_s.sum() + before.work_s) / len(queues_s)
        prefill_s = float(there.prefill_s[first.at])
        until_room_s = self._pricing.until_room_s(ask, there, before)
        ttft_s = max(float(there.queue_s[first.at]), level_s, until_room_s) + prefill_s
        at, tpot_s = best.chosen.at, best.chosen.numbers[_TPOT]
        if best.first is None and there.columns.decodes[at]:
            # What was promised to those beside it counts as well: its prompt takes time from them.
            tpot_s *= float(there.left[at] / there.left_with_it[at])
        joined = before.requests / len(decode or prefill)
        tpot_s = self._pricing.tpot_after(ask, there.columns, at, tpot_s, ttft_s, joined)
        alone_s = self._pricing.step_s(there.columns.role(at), 1.0, ask.context_tokens)
        return Expected(ttft_s, tpot_s, prefill_s, alone_s, ask.length_tokens)

    def _best(self, ask: Asked, view: View, shape: Shape, there: Found, kept: Shortlist) -> _Best:
        """One worker for all of it, or two."""
        columns, pricing = there.columns, self._pricing
        has_decode = bool(view.pool.usable(Role.DECODE))
        last = columns.last
        whole = self._least(Role.DECODE, columns, last, pricing.whole(ask, there), kept)
        if not has_decode:
            return _Best(Reason.DECODE_DOWN, whole, None, last)
        reason = never_split_because(view, shape, bool(view.pool.usable(Role.PREFILL)))
        if reason is not None:
            return _Best(reason, whole, None, last)
        prompts, rests = pricing.prefill(ask, there), pricing.decode(ask, there)
        prompt = self._least(Role.PREFILL, columns, columns.prefill, prompts, kept)
        rest = self._least(Role.DECODE, columns, last, rests, kept)
        if prompt.cost + rest.cost < whole.cost:
            return _Best(Reason.SPLIT_COSTS_LESS, rest, prompt, columns.prefill)
        return _Best(Reason.WHOLE_COSTS_LESS, whole, None, last)

    def adopted(self, now_s: float, key: RequestKey, worker: Worker, shape: Shape) -> None:
        """It decodes there, or will. A prompt that is not computed yet is not counted: how much of
        it is left nobody knows, and it is gone soon."""
        self.ended(now_s, key, None)
        if worker.role is Role.PREFILL:
            return  # It goes on to a worker that is chosen then.
        ask = self._asked(now_s, shape)
        part = Part(worker.id, placed_s=now_s, context_tokens=ask.context_tokens)
        forecast = self._forecast(worker.id)
        self._changed.add(worker.id)
        forecast.will_decode(part)
        if shape.output_tokens:
            forecast.has_come(part)
        there = forecast.figures()
        step_s = self._pricing.step_s(worker.role, there.decodes, there.context_tokens)
        self._place_until_over(key, shape, [part], ask, now_s, step_s)

    def first_token(self, now_s: float, key: RequestKey) -> None:
        """Its prompt is computed."""
        placed = self._placed.get(key)
        if placed is None:
            return
        part = placed.parts[0]
        if part.due_s:
            forecast = self._change(part.worker)
            self._end_prompt(now_s, key, placed)
            forecast.done.add(now_s, part.placed_s, part.work_s, part.base_s, self.learned.prefill)
            self.learned.first_token.observe(now_s - part.placed_s, part.ttft_s, part.ttft_share)
            forecast.has_come(part)
        if len(placed.parts) > 1:  # The other one makes the tokens.
            self._change(part.worker).end(part)
            del placed.parts[0]
            placed.parts[0].placed_s = now_s
        elif not part.decoding:
            self._has_come(now_s, part)

    def stepped(self, now_s: float, worker: Worker) -> None:
        """What others have there is told; and a step of decodes alone tells how long those take."""
        forecast = self.forecasts.get(worker.id)
        before = NOTHING_PLACED if forecast is None else forecast.others.placed
        if worker.others != before:
            forecast = self._forecast(worker.id)
            hear(
                now_s, worker.role, forecast, worker.others, self._pricing, self.learned.prefill,
                self._weights.share_window_s,
            )  # fmt: skip
            if self._columns is not None:  # At once, since questions wait for nobody's reports.
                self._columns.write(worker.id, forecast)
        if forecast is None or not (there := forecast.figures()).running or there.waiting:
            return
        if before.prompts or worker.others.computed_tokens != before.computed_tokens:
            return  # It computed others' prompts.
        # What runs there before it is told of is taken to be like the rest.
        running = max(there.running, worker.load.running)
        context_tokens = there.running_context_tokens * running / there.running
        profiled_s = self._pricing.of(worker.role).step_s(running, context_tokens)
        self.learned.step.observe(worker.load.step_time_s, profiled_s)

    def ended(self, now_s: float, key: RequestKey, output_tokens: int | None) -> None:
        """It is on no worker any more."""
        placed = self._placed.pop(key, None)
        if placed is None:
            return
        if output_tokens is not None:
            self._lengths.observe(placed.kind, output_tokens)
        self._take_off(now_s, key, placed)

    def stopped(self, kind: str, output_tokens: int) -> None:
        """That is how long its output got."""
        self._lengths.observe(kind, output_tokens)

    def _take_off(self, now_s: float, key: RequestKey, placed: _Placed) -> None:
        self._end_prompt(now_s, key, placed)
        for part in placed.parts:
            self._change(part.worker).end(part)

    def _end_prompt(self, now_s: float, key: RequestKey, placed: _Placed) -> None:
        """It waits no more, if it did."""
        part = placed.parts[0]
        if part.due_s:
            self._change(part.worker).end_prefill(now_s, key)
            self._ahead.remove(part.worker, placed.addresses)
            part.due_s = 0.0

    def _age(self, now_s: float) -> None:
        """Take off what must be over, though nobody said so: a few with each question, so that
        each has its turn."""
        for _ in range(min(_AGED_AT_ONCE, len(self._placed))):
            key, placed = self._placed.popitem(last=False)
            if now_s > placed.over_by_s:
                self._take_off(now_s, key, placed)
                continue
            if now_s > placed.first_token_by_s:
                self._end_prompt(now_s, key, placed)
            self._placed[key] = placed

    def _has_come(self, now_s: float, part: Part) -> None:
        """What it fetched is there, and a step has used it."""
        forecast = self._change(part.worker)
        forecast.has_come(part)
        if not part.fetched_blocks:
            return
        there = forecast.figures()
        # Who fetches makes the tokens.
        step_s = self._pricing.step_s(Role.DECODE, there.running, there.running_context_tokens)
        profiled_s = self._pricing.of(Role.DECODE).transfer_s(part.fetched_blocks, step_s)
        known = profiled_s / (profiled_s + step_s)
        self.learned.transfer.observe(now_s - part.placed_s - step_s, profiled_s, known)

    # What is known

    def _asked(self, now_s: float, shape: Shape) -> Asked:
        length = self._lengths.expect(
            shape.kind, shape.max_tokens, shape.output_tokens, shape.hinted_output_tokens
        )
        tokens = shape.prompt_tokens + shape.output_tokens
        slo = Slo(shape.ttft_slo_s or self._slo.ttft_s, shape.tpot_slo_s or self._slo.tpot_s)
        return Asked(
            now_s, tokens, length, tokens + length / 2, slo, self._slo,
            self._lengths.delayed_square, self._lengths.mean_tokens,
        )  # fmt: skip

    def _held(self, view: View, shape: Shape) -> dict[str, int]:
        """Tokens of the prompt that each worker holds, or will when its turn comes."""
        # The last token is computed whatever is held, and with it its block.
        computable = (shape.prompt_tokens - 1) // view.block_tokens
        found = view.index.match(shape.addresses)
        for worker, blocks in self._ahead.match(shape.addresses).items():
            if blocks > found.get(worker, 0):
                found[worker] = blocks
        return {
            worker: min(blocks, computable) * view.block_tokens for worker, blocks in found.items()
        }

    def _find(
        self, ask: Asked, view: View, shape: Shape, prefill: Sequence[Worker],
        decode: Sequence[Worker],
    ) -> Found:  # fmt: skip
        columns = self._columns
        if columns is None or not columns.is_of(prefill, decode):
            columns = self._columns = Columns(prefill, decode, self._forecast)
        else:
            for worker in self._changed & self.forecasts.keys():
                columns.write(worker, self.forecasts[worker])
        self._changed.clear()
        cached = columns.spread(self._held(view, shape), shape.cached_tokens)
        return self._pricing.find(ask, columns, cached, self._arrivals)

    def _forecast(self, worker: WorkerId) -> Forecast:
        return self.forecasts.setdefault(worker, Forecast())

    def _change(self, worker: WorkerId) -> Forecast:
        """A forecast that is about to change."""
        self._changed.add(worker)
        return self.forecasts[worker]

    def _prune(self, view: View) -> None:
        """Forget workers that are gone for good, now and then."""
        if len(self.forecasts) <= 2 * view.pool.size + _GONE_KEPT:
            return
        for worker, forecast in list(self.forecasts.items()):
            if view.pool.get(worker) is None and forecast.idle:
                del self.forecasts[worker]
                self._ahead.drop(worker)

    # What follows

    def _least(
        self, role: Role, columns: Columns, pool: slice, priced: Sequence[Column], kept: Shortlist
    ) -> _Choice:
        compared = np.array(priced)[:, pool]
        costs: list[float] = compared[0].tolist()
        least = min(costs)
        at = costs.index(least)
        if (equals := costs.count(least)) > 1:
            best = [at for at, cost in enumerate(costs) if cost == least]
            at = best[self._tie_break(equals)]
        workers = columns.ids[pool]
        kept.add(role, workers, at, compared)
        return _Choice(pool.start + at, workers[at], least, compared[1:, at].tolist())

    def _count(
        self, ask: Asked, there: Found, key: RequestKey, shape: Shape, chosen: _Choice,
        first: _Choice | None, computed: bool,
    ) -> None:  # fmt: skip
        decoding = Part(chosen.worker, context_tokens=ask.context_tokens)
        self._change(chosen.worker).will_decode(decoding)
        placed = [(decoding, chosen.at)]
        if first is not None:
            placed.insert(0, (Part(first.worker), first.at))
        if computed:
            computing, at = placed[0]
            computing.placed_s, computing.occupies_s = ask.now_s, float(there.occupies_s[at])
            computing.work_s, computing.base_s = float(there.work_s[at]), float(there.base_s[at])
            computing.ttft_s = float(there.ttft_s[at])
            computing.ttft_share = computing.ttft_s / ask.slo.ttft_s
            window_s = self._weights.share_window_s
            self._change(computing.worker).add_prefill(ask.now_s, key, computing, window_s)
            self._arrivals.add(ask.now_s, computing.occupies_s)
            self._ahead.store(computing.worker, shape.addresses)
        else:
            decoding.placed_s = ask.now_s
        for part, at in placed:
            part.coming_tokens = ask.tokens - int(there.cached[at])
            self._change(part.worker).coming_tokens += part.coming_tokens
        if first is not None or not computed:
            block_tokens = float(there.columns.block_tokens[chosen.at])
            decoding.fetched_blocks = decoding.coming_tokens / block_tokens
        parts = [part for part, _ in placed]
        computed_s = ask.now_s + _LATE * parts[0].ttft_s
        self._place_until_over(key, shape, parts, ask, computed_s, chosen.numbers[_TPOT])

    def _place_until_over(
        self, key: RequestKey, shape: Shape, parts: list[Part], ask: Asked, computed_s: float,
        tpot_s: float,
    ) -> None:  # fmt: skip
        first_token_by_s = computed_s + _LATE_S
        most_tokens = shape.max_tokens or _LONG * ask.length_tokens
        over_by_s = first_token_by_s + _LATE * most_tokens * tpot_s
        self._placed[key] = _Placed(
            shape.kind, tuple(shape.addresses), parts, first_token_by_s, over_by_s
        )


def _decision(
    reason: Reason, shape: Shape, chosen: _Choice, first: _Choice | None, kept: Shortlist,
    to_compute_tokens: int,
) -> Decision:  # fmt: skip
    ttft_s = (first or chosen).numbers[_TTFT]
    return Decision(
        reason, shape.prompt_tokens, chosen.worker, first.worker if first else None, COMPARED,
        kept, predicted=Predicted(None if shape.output_tokens else ttft_s, chosen.numbers[_TPOT]),
        left_out=kept.left_out, to_compute_tokens=to_compute_tokens,
    )  # fmt: skip
