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

import math
from dataclasses import dataclass
from typing import Final, NamedTuple

from engine.latency_model import StepTimes
from engine.learned_times import Factor
from engine.spec import SimulatedTiming
from protos.ids import RequestKey, WorkerId
from router.core.ahead import Ahead
from router.core.events import Role, Shape
from router.core.forecast import LARGEST_SHARE, Forecast, Part
from router.core.output_lengths import OutputLengths
from router.core.placement import (
    Candidate,
    Decision,
    Predicted,
    Reason,
    TieBreak,
    View,
    never_split_because,
)
from router.core.workers import Worker

_GONE_KEPT: Final = 16
_FULL: Final = 0.9
"""Of a KV cache: beyond that, requests wait for others to end."""
_FULL_COST: Final = 10.0


@dataclass(frozen=True, slots=True)
class Slo:
    """What clients were promised, where a request does not say."""

    ttft_s: float
    tpot_s: float


@dataclass(frozen=True, slots=True)
class Weights:
    """What the parts of a cost weigh: docs/adr/0007 tells how they were found."""

    later: float = 20.0
    """Prompts that will come after this one and lose its time, beyond as many as wait now."""
    floor: float = 0.02
    """What a prompt's time costs at least, where nothing waits: so caches are used."""
    share_window_s: float = 10.0
    """Over how long the share of its time that a worker spends on prompts is averaged."""


@dataclass(slots=True)
class _Placed:
    """One request; the part whose prompt is to be computed comes first."""

    kind: str
    addresses: tuple[bytes, ...]
    parts: list[Part]


class JointPlacement:
    """See the module."""

    def __init__(
        self, tie_break: TieBreak, times: StepTimes, max_step_tokens: int, slo: Slo,
        weights: Weights = Weights(),
    ) -> None:  # fmt: skip
        self._tie_break = tie_break
        self._times = times
        self._max_step_tokens = max_step_tokens
        self._slo = slo
        self._weights = weights
        self.prefill_factor = Factor()
        """By which prompts take longer than the profile says."""
        self._lengths = OutputLengths()
        self.forecasts: dict[WorkerId, Forecast] = {}
        self._placed: dict[RequestKey, _Placed] = {}
        self._ahead = Ahead()

    # What is asked

    def place(self, now_s: float, view: View, key: RequestKey, shape: Shape) -> Decision | None:
        """The least predicted cost."""
        pool = view.pool
        prefill, decode = pool.usable(Role.PREFILL), pool.usable(Role.DECODE)
        if not prefill and not decode:
            return None
        self._prune(view)
        held = self._held(view, shape)
        length = self._lengths.expect(shape.kind, shape.max_tokens, shape.output_tokens)
        context = shape.prompt_tokens + shape.output_tokens + length / 2
        ttft_slo_s = shape.ttft_slo_s or self._slo.ttft_s
        tpot_slo_s = shape.tpot_slo_s or self._slo.tpot_s
        ask = _Asked(now_s, shape, held, length, context, ttft_slo_s, tpot_slo_s)
        there = [self._look(ask, worker) for worker in decode or prefill]
        if shape.fetchable and decode:
            fetching = [self._decode(ask, each) for each in there]
            chosen = self._least(fetching)
            self._count(ask, view, key, chosen, None, computed_on=None)
            return Decision(
                Reason.RESUME, shape.prompt_tokens, chosen.worker, None, _COMPARED, fetching,
                predicted=Predicted(None, chosen.numbers[_TPOT]),
            )  # fmt: skip
        whole = [self._whole(ask, each) for each in there]
        best_whole = self._least(whole)
        reason: Reason | None = Reason.DECODE_DOWN
        if decode:
            reason = never_split_because(view, shape, bool(prefill))
        candidates = whole
        chosen, first = best_whole, None
        if reason is None:
            firsts = [self._prefill(ask, self._look(ask, worker)) for worker in prefill]
            seconds = [self._decode(ask, each) for each in there]
            candidates = whole + firsts + seconds
            best_first, best_second = self._least(firsts), self._least(seconds)
            if best_first.cost + best_second.cost < best_whole.cost:
                chosen, first, reason = best_second, best_first, Reason.SPLIT_COSTS_LESS
            else:
                reason = Reason.WHOLE_COSTS_LESS
        self._count(ask, view, key, chosen, first, computed_on=(first or chosen).worker)
        return Decision(
            reason, shape.prompt_tokens, chosen.worker, first.worker if first else None,
            _COMPARED, candidates,
            predicted=Predicted((first or chosen).numbers[_TTFT], chosen.numbers[_TPOT]),
        )  # fmt: skip

    def first_token(self, now_s: float, key: RequestKey) -> None:
        """Its prompt is computed."""
        placed = self._placed.get(key)
        if placed is None:
            return
        computed = placed.parts[0]
        if computed.due_s:
            forecast = self.forecasts[computed.worker]
            forecast.end_prefill(now_s, key)
            forecast.done.add(now_s, computed, self.prefill_factor)
            self._ahead.remove(computed.worker, placed.addresses)
            computed.due_s = 0.0
            forecast.has_come(computed)
            if len(placed.parts) > 1:
                del placed.parts[0]  # The other one makes the tokens.
        else:
            self.forecasts[placed.parts[-1].worker].has_come(placed.parts[-1])

    def ended(self, now_s: float, key: RequestKey, output_tokens: int | None) -> None:
        """It is on no worker any more."""
        placed = self._placed.pop(key, None)
        if placed is None:
            return
        if output_tokens is not None:
            self._lengths.observe(placed.kind, output_tokens)
        for part in placed.parts:
            forecast = self.forecasts[part.worker]
            if part.due_s:
                forecast.end_prefill(now_s, key)
                self._ahead.remove(part.worker, placed.addresses)
            forecast.end(part)

    def _prune(self, view: View) -> None:
        """Forget workers that are gone for good, now and then."""
        if len(self.forecasts) <= 2 * view.pool.size + _GONE_KEPT:
            return
        for worker, forecast in list(self.forecasts.items()):
            if view.pool.get(worker) is None and forecast.idle:
                del self.forecasts[worker]
                self._ahead.drop(worker)

    # What is predicted

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

    def _look(self, ask: _Asked, worker: Worker) -> _There:
        forecast = self.forecasts.get(worker.id)
        if forecast is None:
            forecast = self.forecasts[worker.id] = Forecast()
        cached = ask.held.get(worker.id, 0)
        tokens = ask.tokens - cached
        timing = self._times.timing
        before_s = _step_s(timing, forecast.decodes, forecast.context_tokens)
        running_s = _step_s(timing, forecast.running, forecast.running_context_tokens)
        # In chunks, each beside what decodes there by now.
        steps = tokens / max(1, self._max_step_tokens - forecast.running)
        work_s = tokens * (timing.prefill_token_s + (cached + tokens / 2) * timing.prefill_pair_s)
        takes_s = self.prefill_factor.value * work_s
        base_s = math.ceil(steps) * running_s
        return _There(
            worker, forecast, cached, forecast.queue_s(ask.now_s), work_s, base_s,
            takes_s + base_s, takes_s + steps * running_s, before_s,
            before_s + timing.decode_request_s
            + ask.context_tokens * timing.decode_context_token_s,
            forecast.prefill_share(ask.now_s, self._weights.share_window_s),
        )  # fmt: skip

    def _prefill(self, ask: _Asked, there: _There) -> Candidate:
        ttft_s = there.queue_s + there.prefill_s
        cost = self._hurt_behind(ask, there, ttft_s)
        if there.forecast.decodes:
            share = there.share_with_it(self._weights.share_window_s)
            cost += _hurt_beside(ask, there, there.before_s / (1 - share))
        numbers = (there.cached, there.queue_s, there.prefill_s, ttft_s, 0.0)
        return Candidate(there.worker.id, Role.PREFILL, cost, numbers)

    def _decode(self, ask: _Asked, there: _There) -> Candidate:
        blocks = (ask.tokens - there.cached) / there.worker.block_size_tokens
        transfer_s = blocks * self._times.timing.transfer_block_s
        tpot_s = there.with_it_s / (1 - there.share)
        cost = _hurt_beside(ask, there, tpot_s) + _crowding(ask, there)
        # Its client waits for the second token while the prompt's state moves.
        tpot_s += transfer_s / ask.length_tokens
        cost += (tpot_s / ask.tpot_slo_s) ** 2
        numbers = (there.cached, 0.0, 0.0, transfer_s, tpot_s)
        return Candidate(there.worker.id, Role.DECODE, cost, numbers)

    def _whole(self, ask: _Asked, there: _There) -> Candidate:
        ttft_s = there.queue_s + there.prefill_s
        share = there.share_with_it(self._weights.share_window_s)
        tpot_s = there.with_it_s / (1 - share)
        cost = self._hurt_behind(ask, there, ttft_s) + (tpot_s / ask.tpot_slo_s) ** 2
        cost += _hurt_beside(ask, there, tpot_s) + _crowding(ask, there)
        numbers = (there.cached, there.queue_s, there.prefill_s, ttft_s, tpot_s)
        return Candidate(there.worker.id, Role.DECODE, cost, numbers)

    def _hurt_behind(self, ask: _Asked, there: _There, ttft_s: float) -> float:
        """What this prompt's wait and time are worth to itself and to those that come after it: as
        many as wait now, and some."""
        share = ttft_s / ask.ttft_slo_s
        price = max(self._weights.floor, 2 * share)
        later = self._weights.later + len(there.forecast.prefills)
        return share * share + later * price * there.occupies_s / ask.ttft_slo_s

    # What follows

    def _least(self, candidates: list[Candidate]) -> Candidate:
        least = min(each.cost for each in candidates)
        best = [each for each in candidates if each.cost == least]
        return best[self._tie_break(len(best)) if len(best) > 1 else 0]

    def _count(
        self, ask: _Asked, view: View, key: RequestKey, chosen: Candidate,
        first: Candidate | None, computed_on: WorkerId | None,
    ) -> None:  # fmt: skip
        shape = ask.shape
        decoding = Part(chosen.worker, context_tokens=ask.context_tokens)
        self.forecasts[chosen.worker].will_decode(decoding)
        parts = [decoding] if first is None else [Part(first.worker), decoding]
        if computed_on is not None:
            worker = view.pool.get(computed_on)
            assert worker is not None, "it was compared just now"
            there, computing = self._look(ask, worker), parts[0]
            computing.placed_s, computing.occupies_s = ask.now_s, there.occupies_s
            computing.work_s, computing.base_s = there.work_s, there.base_s
            window_s = self._weights.share_window_s
            there.forecast.add_prefill(ask.now_s, key, computing, window_s)
            self._ahead.store(computed_on, shape.addresses)
        for part in parts:
            part.coming_tokens = ask.tokens - ask.held.get(part.worker, 0)
            self.forecasts[part.worker].coming_tokens += part.coming_tokens
        self._placed[key] = _Placed(shape.kind, tuple(shape.addresses), parts)


_COMPARED: Final = ("cached_tokens", "queue_s", "prefill_s", "ttft_s", "tpot_s")
_TTFT: Final = _COMPARED.index("ttft_s")
_TPOT: Final = _COMPARED.index("tpot_s")


@dataclass(frozen=True, slots=True)
class _Asked:
    """One question, and what is the same for all workers."""

    now_s: float
    shape: Shape
    held: dict[str, int]
    length_tokens: float
    context_tokens: float
    ttft_slo_s: float
    tpot_slo_s: float

    @property
    def tokens(self) -> int:
        return self.shape.prompt_tokens + self.shape.output_tokens


class _There(NamedTuple):
    """One worker as the request finds it."""

    worker: Worker
    forecast: Forecast
    cached: int
    """Tokens of the prompt."""
    queue_s: float
    work_s: float
    """What the profile says of the rest of the prompt's tokens."""
    base_s: float
    """What its steps take beside that."""
    prefill_s: float
    """Of the rest of the prompt, once its turn has come."""
    occupies_s: float
    """By how much it delays what comes after it: prompts share steps."""
    before_s: float
    """A decode step of all that are to decode there, without the request."""
    with_it_s: float
    """A decode step, with it."""
    share: float
    """Of the worker's time, what goes to prompts."""

    def share_with_it(self, window_s: float) -> float:
        """With this prompt's time."""
        return min(LARGEST_SHARE, self.share + self.occupies_s / window_s)


def _step_s(timing: SimulatedTiming, requests: int, context_tokens: float) -> float:
    """Of decodes alone; `StepTimes.step_s` without making a StepWork for every worker."""
    return (
        timing.step_base_s
        + requests * timing.decode_request_s
        + context_tokens * timing.decode_context_token_s
    )


def _hurt_beside(ask: _Asked, there: _There, tpot_s: float) -> float:
    """What all that decode there are hurt, if their tokens come so far apart with this one."""
    before_s = there.before_s / (1 - there.share)
    slo_s = ask.tpot_slo_s
    return there.forecast.decodes * (tpot_s * tpot_s - before_s * before_s) / (slo_s * slo_s)


def _crowding(ask: _Asked, there: _There) -> float:
    """What it costs that a KV cache has no room: requests wait for others to end.

    What is there is reported, so that what requests share counts once.
    """
    worker, forecast = there.worker, there.forecast
    coming_tokens = forecast.coming_tokens + ask.tokens - there.cached
    blocks = worker.load.kv_blocks_used + coming_tokens / worker.block_size_tokens
    use = blocks / max(1, worker.kv_blocks_total)
    return (forecast.decodes + 1) * max(0.0, use - _FULL) * _FULL_COST
