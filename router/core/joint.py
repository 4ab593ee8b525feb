"""Joint placement: prefill worker, decode worker, or one for both, by predicted times.

For each request it predicts, on every worker, when the first token would come and how far apart
the later ones would, and weighs both against what was promised (the SLOs), together with what the
request does to others: the time that its prompt takes from the requests behind it, and from those
that decode beside it. The sum of a prefill's and a decode's cost is least where each is, since a
transfer costs the same from anywhere; so pairs need not be enumerated, and one worker for both is
compared with the best pair.

What it puts on a worker it counts in the same call, in a forecast of that worker: the prompts that
wait there, in order, and when each should be computed; the requests that decode there, and their
context. First tokens that come earlier or later than predicted move the forecast.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Final

from engine.latency_model import StepTimes
from engine.learned_times import Factor
from kvstore.index import KvIndex
from protos.ids import RequestKey, WorkerId
from router.core.events import Role, Shape
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

    power: float = 2.0
    """A latency that is the share x of its SLO hurts by x to this power: so work goes where there
    is room, and how fast the fast ones are matters little."""
    later: float = 20.0
    """Prompts that will come after this one and lose its time, beyond those that wait already."""
    floor: float = 0.02
    """What a prompt's time costs at least, where nothing waits: so caches are used."""
    share_window_s: float = 10.0
    """Over how long the share of its time that a worker spends on prompts is averaged."""


@dataclass(slots=True)
class _Part:
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
class _Placed:
    """One request."""

    kind: str
    addresses: tuple[bytes, ...]
    parts: list[_Part]


@dataclass(slots=True)
class _Done:
    """Prompts that one step completed: how long they took, and how long they should have."""

    at_s: float = 0.0
    measured_s: float = 0.0
    predicted_s: float = 0.0

    def add(self, now_s: float, part: _Part, factor: Factor) -> None:
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
    prefills: dict[RequestKey, _Part] = field(default_factory=dict)
    """In the order in which they will be computed."""
    decodes: int = 0
    context_tokens: float = 0.0
    coming_tokens: int = 0
    done: _Done = field(default_factory=lambda: _Done())
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

    def prefill_share(self, now_s: float, window_s: float, more_s: float = 0.0) -> float:
        """Of its time, what goes to prompts: exponentially averaged, with another one on top."""
        decayed_s = self._prefill_load_s * math.exp((self._load_at_s - now_s) / window_s)
        return min(0.95, (decayed_s + more_s) / window_s)

    def add_prefill(self, now_s: float, key: RequestKey, part: _Part, window_s: float) -> None:
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
        whole = [self._whole(ask, worker) for worker in decode or prefill]
        best_whole = self._least(whole)
        reason = self._stays_whole(view, shape, bool(prefill), bool(decode))
        candidates = whole
        chosen, first = best_whole, None
        if reason is None:
            firsts = [self._prefill(ask, worker) for worker in prefill]
            seconds = [self._decode(ask, worker) for worker in decode]
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

    def _has_come(self, part: _Part) -> None:
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

    def _forecast(self, worker: Worker) -> Forecast:
        forecast = self.forecasts.get(worker.id)
        if forecast is None:
            forecast = self.forecasts[worker.id] = Forecast()
        return forecast

    def _prefill_s(self, tokens: int, cached: int, forecast: Forecast) -> float:
        """Of so many tokens after the cached ones, in chunks beside what decodes there."""
        timing = self._times.timing
        room = max(1, self._max_step_tokens - forecast.decodes)
        steps = -(-tokens // room)
        return self.prefill_factor.value * (
            tokens * timing.prefill_token_s + tokens * (cached + tokens / 2) * timing.prefill_pair_s
        ) + steps * self._step_s(forecast.decodes, forecast.context_tokens)

    def _step_s(self, requests: int, context_tokens: float) -> float:
        timing = self._times.timing
        return (
            timing.step_base_s
            + requests * timing.decode_request_s
            + context_tokens * timing.decode_context_token_s
        )

    def _tpot_s(self, ask: _Asked, forecast: Forecast, prefill_s: float) -> float:
        """Of all that decode there, with this one."""
        step_s = self._step_s(forecast.decodes + 1, forecast.context_tokens + ask.context_tokens)
        share = forecast.prefill_share(ask.now_s, self._weights.share_window_s, prefill_s)
        return step_s / (1 - share)

    def _hurt_beside(self, ask: _Asked, forecast: Forecast, tpot_s: float) -> float:
        """What all that decode there are hurt by this one, itself included."""
        if not forecast.decodes:
            return self._hurt(tpot_s / ask.tpot_slo_s)
        share = forecast.prefill_share(ask.now_s, self._weights.share_window_s)
        before_s = self._step_s(forecast.decodes, forecast.context_tokens) / (1 - share)
        more = self._hurt(tpot_s / ask.tpot_slo_s) - self._hurt(before_s / ask.tpot_slo_s)
        return self._hurt(tpot_s / ask.tpot_slo_s) + forecast.decodes * more

    def _hurt_behind(
        self, ask: _Asked, forecast: Forecast, ttft_s: float, prefill_s: float
    ) -> float:
        """What this prompt's time is worth to itself and to those that will wait behind it."""
        share, weights = ttft_s / ask.ttft_slo_s, self._weights
        price = max(weights.floor, weights.power * math.pow(share, weights.power - 1))
        later = weights.later + len(forecast.prefills)
        return self._hurt(share) + later * price * prefill_s / ask.ttft_slo_s

    def _prefill(self, ask: _Asked, worker: Worker) -> Candidate:
        forecast = self._forecast(worker)
        cached = ask.held.get(worker.id, 0)
        queue_s = forecast.queue_s(ask.now_s)
        prefill_s = self._prefill_s(ask.tokens - cached, cached, forecast)
        ttft_s = queue_s + prefill_s
        cost = self._hurt_behind(ask, forecast, ttft_s, prefill_s)
        if forecast.decodes:
            tpot_s = self._tpot_s(ask, forecast, prefill_s)
            cost += self._hurt_beside(ask, forecast, tpot_s) - self._hurt(tpot_s / ask.tpot_slo_s)
        return Candidate(worker.id, Role.PREFILL, cost, (cached, queue_s, prefill_s, ttft_s, 0.0))

    def _decode(self, ask: _Asked, worker: Worker) -> Candidate:
        forecast = self._forecast(worker)
        cached = ask.held.get(worker.id, 0)
        blocks = (ask.tokens - cached) / worker.block_size_tokens
        transfer_s = blocks * self._times.timing.transfer_block_s
        tpot_s = self._tpot_s(ask, forecast, 0.0) + transfer_s / ask.length_tokens
        cost = self._hurt_beside(ask, forecast, tpot_s) + self._crowding(ask, worker, forecast)
        return Candidate(worker.id, Role.DECODE, cost, (cached, 0.0, 0.0, transfer_s, tpot_s))

    def _whole(self, ask: _Asked, worker: Worker) -> Candidate:
        forecast = self._forecast(worker)
        cached = ask.held.get(worker.id, 0)
        queue_s = forecast.queue_s(ask.now_s)
        prefill_s = self._prefill_s(ask.tokens - cached, cached, forecast)
        ttft_s = queue_s + prefill_s
        tpot_s = self._tpot_s(ask, forecast, prefill_s)
        cost = self._hurt_behind(ask, forecast, ttft_s, prefill_s)
        cost += self._hurt_beside(ask, forecast, tpot_s)
        cost += self._crowding(ask, worker, forecast)
        return Candidate(worker.id, Role.DECODE, cost, (cached, queue_s, prefill_s, ttft_s, tpot_s))

    def _crowding(self, ask: _Asked, worker: Worker, forecast: Forecast) -> float:
        """What it costs that its KV cache has no room: requests wait for others to end.

        What is there is reported, so that what requests share counts once.
        """
        load = worker.load
        coming_tokens = forecast.coming_tokens + ask.tokens - ask.held.get(worker.id, 0)
        blocks = load.kv_blocks_used + coming_tokens / worker.block_size_tokens
        use = blocks / max(1, worker.kv_blocks_total)
        return (forecast.decodes + 1) * max(0.0, use - _FULL) * _FULL_COST

    def _hurt(self, share: float) -> float:
        return math.pow(share, self._weights.power)

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
        decoding = _Part(chosen.worker, context_tokens=ask.context_tokens)
        forecast = self.forecasts[chosen.worker]
        forecast.decodes += 1
        forecast.context_tokens += ask.context_tokens
        computing = decoding if first is None else _Part(first.worker)
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
