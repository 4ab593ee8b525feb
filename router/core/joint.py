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

from dataclasses import dataclass
from typing import Final, NamedTuple

from engine.latency_model import StepTimes
from engine.learned_times import Factor
from kvstore.index import KvIndex
from protos.ids import RequestKey, WorkerId
from router.core.events import Role, Shape
from router.core.forecast import LARGEST_SHARE, Forecast, Part
from router.core.output_lengths import OutputLengths
from router.core.placement import Candidate, Decision, Reason, TieBreak, View
from router.core.workers import Worker

AHEAD_ENTRIES: Final = 1_000_000
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
    """What the parts of a cost weigh. Found by `python -m benchmarks.tune`."""

    later: float = 20.0
    """Prompts that will come after this one and lose its time, beyond those that wait already."""
    floor: float = 0.02
    """What a prompt's time costs at least, where nothing waits: so caches are used."""
    share_window_s: float = 10.0
    """Over how long the share of its time that a worker spends on prompts is averaged."""


@dataclass(slots=True)
class _Placed:
    """One request."""

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
        self._ahead = KvIndex(AHEAD_ENTRIES)
        """Who will hold which prompts' blocks once they are computed."""

    # What is asked

    def place(self, now_s: float, view: View, key: RequestKey, shape: Shape) -> Decision | None:
        """The least predicted cost."""
        pool = view.pool
        prefill, decode = pool.usable(Role.PREFILL), pool.usable(Role.DECODE)
        if not prefill and not decode:
            return None
        held = self._held(view, shape)
        length = self._lengths.expect(shape.kind, shape.max_tokens, shape.output_tokens)
        context = shape.prompt_tokens + shape.output_tokens + length / 2
        ttft_slo_s = shape.ttft_slo_s or self._slo.ttft_s
        tpot_slo_s = shape.tpot_slo_s or self._slo.tpot_s
        ask = _Asked(now_s, shape, held, length, context, ttft_slo_s, tpot_slo_s)
        there = [self._look(ask, worker) for worker in decode or prefill]
        whole = [self._whole(ask, each) for each in there]
        best_whole = self._least(whole)
        reason = self._stays_whole(view, shape, bool(prefill), bool(decode))
        candidates = whole
        chosen, first = best_whole, None
        if reason is None:
            firsts = [self._prefill(ask, self._look(ask, worker)) for worker in prefill]
            seconds = [self._decode(ask, each) for each in there]
            candidates = whole + firsts + seconds
            best_first, best_second = self._least(firsts), self._least(seconds)
            if best_first.cost + best_second.cost < best_whole.cost:
                chosen, first, reason = best_second, best_first, Reason.LONG_PROMPT
            else:
                reason = Reason.SHORT_PROMPT
        self._count(ask, key, chosen, first)
        return Decision(
            reason, shape.prompt_tokens, chosen.worker, first.worker if first else None,
            _COMPARED, candidates,
        )  # fmt: skip

    def first_token(self, now_s: float, key: RequestKey) -> None:
        """Its prompt is computed."""
        placed = self._placed.get(key)
        if placed is None:
            return
        computed = placed.parts[0]
        if computed.due_s:
            forecast = self.forecasts[computed.worker]
            forecast.end_prefill(now_s, key, computed=True)
            forecast.done.add(now_s, computed, self.prefill_factor)
            self._ahead.remove(computed.worker, placed.addresses)
            computed.due_s = 0.0
            self._has_come(computed)
        else:
            self._has_come(placed.parts[-1])

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
                forecast.end_prefill(now_s, key, computed=False)
                self._ahead.remove(part.worker, placed.addresses)
            self._has_come(part)
            if part.context_tokens:
                forecast.decodes -= 1
                forecast.context_tokens -= part.context_tokens

    def _has_come(self, part: Part) -> None:
        self.forecasts[part.worker].coming_tokens -= part.coming_tokens
        part.coming_tokens = 0

    # What is predicted

    def _held(self, view: View, shape: Shape) -> dict[str, int]:
        """Tokens of the prompt that each worker holds, or will when its turn comes."""
        found = view.index.match(shape.addresses)
        for worker, blocks in self._ahead.match(shape.addresses).items():
            if blocks > found.get(worker, 0):
                found[worker] = blocks
        return {
            worker: min(blocks * view.block_tokens, shape.prompt_tokens - 1)
            for worker, blocks in found.items()
        }

    def _look(self, ask: _Asked, worker: Worker) -> _There:
        forecast = self.forecasts.get(worker.id)
        if forecast is None:
            forecast = self.forecasts[worker.id] = Forecast()
        cached = ask.held.get(worker.id, 0)
        tokens = ask.tokens - cached
        decodes, context = forecast.decodes, forecast.context_tokens
        timing = self._times.timing
        before_s = (
            timing.step_base_s
            + decodes * timing.decode_request_s
            + context * timing.decode_context_token_s
        )
        # In chunks, each beside what decodes there.
        steps = -(-tokens // max(1, self._max_step_tokens - decodes))
        prefill_s = steps * before_s + self.prefill_factor.value * tokens * (
            timing.prefill_token_s + (cached + tokens / 2) * timing.prefill_pair_s
        )
        return _There(
            worker, forecast, cached, forecast.queue_s(ask.now_s), prefill_s, before_s,
            before_s + timing.decode_request_s
            + ask.context_tokens * timing.decode_context_token_s,
            forecast.prefill_share(ask.now_s, self._weights.share_window_s),
        )  # fmt: skip

    def _prefill(self, ask: _Asked, there: _There) -> Candidate:
        ttft_s = there.queue_s + there.prefill_s
        cost = self._hurt_behind(ask, there, ttft_s)
        if there.forecast.decodes:
            share = there.share_with(there.prefill_s, self._weights.share_window_s)
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
        share = there.share_with(there.prefill_s, self._weights.share_window_s)
        tpot_s = there.with_it_s / (1 - share)
        cost = self._hurt_behind(ask, there, ttft_s) + (tpot_s / ask.tpot_slo_s) ** 2
        cost += _hurt_beside(ask, there, tpot_s) + _crowding(ask, there)
        numbers = (there.cached, there.queue_s, there.prefill_s, ttft_s, tpot_s)
        return Candidate(there.worker.id, Role.DECODE, cost, numbers)

    def _hurt_behind(self, ask: _Asked, there: _There, ttft_s: float) -> float:
        """What this prompt's wait and time are worth to itself and to those behind it."""
        share = ttft_s / ask.ttft_slo_s
        price = max(self._weights.floor, 2 * share)
        later = self._weights.later + len(there.forecast.prefills)
        return share * share + later * price * there.prefill_s / ask.ttft_slo_s

    # What follows

    def _least(self, candidates: list[Candidate]) -> Candidate:
        least = min(each.cost for each in candidates)
        best = [each for each in candidates if each.cost == least]
        return best[self._tie_break(len(best)) if len(best) > 1 else 0]

    def _stays_whole(
        self, view: View, shape: Shape, prefill_up: bool, decode_up: bool
    ) -> Reason | None:
        if not decode_up:
            return Reason.DECODE_DOWN
        if shape.output_tokens:
            return Reason.RESUME
        if not prefill_up:
            return Reason.PREFILL_DOWN if view.expect_prefill else Reason.NO_PREFILL_POOL
        if shape.prompt_logprobs:
            return Reason.PROMPT_LOGPROBS
        if shape.max_tokens == 1:
            return Reason.ONE_TOKEN
        return None

    def _count(
        self, ask: _Asked, key: RequestKey, chosen: Candidate, first: Candidate | None
    ) -> None:
        computes = first or chosen
        shape = ask.shape
        decoding = Part(chosen.worker, context_tokens=ask.context_tokens)
        forecast = self.forecasts[chosen.worker]
        forecast.decodes += 1
        forecast.context_tokens += ask.context_tokens
        computing = decoding if first is None else Part(first.worker)
        computing.placed_s, computing.prefill_s = ask.now_s, computes.numbers[2]
        self.forecasts[computes.worker].add_prefill(
            ask.now_s, key, computing, self._weights.share_window_s
        )
        self._ahead.store(computes.worker, shape.addresses)
        parts = [decoding] if first is None else [computing, decoding]
        for part in parts:
            part.coming_tokens = ask.tokens - ask.held.get(part.worker, 0)
            self.forecasts[part.worker].coming_tokens += part.coming_tokens
        self._placed[key] = _Placed(shape.kind, tuple(shape.addresses), parts)


_COMPARED: Final = ("cached_tokens", "queue_s", "prefill_s", "ttft_s", "tpot_s")


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
    prefill_s: float
    """Of the rest of the prompt, once its turn has come."""
    before_s: float
    """A decode step, without the request."""
    with_it_s: float
    """A decode step, with it."""
    share: float
    """Of the worker's time, what goes to prompts."""

    def share_with(self, more_s: float, window_s: float) -> float:
        """With another prompt's time."""
        return min(LARGEST_SHARE, self.share + more_s / window_s)


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
