"""AIBrix: prefix-cache routing, and its routing over prefill and decode pods.

Source: AIBrix @e3e10f9e `pkg/plugins/gateway/algorithms/{prefix_cache,pd_disaggregation}.go` and
`pd/*`.

Sees: requests in flight n_i, kept by the gateway; a table of the prompts that it routed (200,000
blocks of 4 characters, 20 minutes; event sync is off by default); for decode also scraped
throughput and KV use.

prefix-cache: if max n - min n > 8, only pods with the least n are matched. Matched pods by match %
down, n up, then random: the first with n <= mean + 1 standard deviation of all pods. None: least n.

P/D, always remote. Prefill: if max n - min n > 16, least n; else least of
`0.1 * (100 - match %) + n / nmax`, without pods over mean + 1 standard deviation. Decode, in this
order: request spread >= 16 -> least n; throughput spread > 2,048 tokens/s -> lowest throughput;
most over least n / (completions per s) > 1.5 -> least of these; else the least of
`(n / nmax + 1 - thr / thrmax) / (free % / free %max)`. Random among equals.

Ignores: prompt lengths, transfers, deadlines.

Deviations: the table's blocks are the index's, and its limit is in tokens, one for 4 characters
(knob `table_tokens`: 200,000, which is few prompts). There are no role sets, so P and D are chosen
each by itself. Engines here report no throughput: it is the engine model's for the requests that
they report as running, of the mean context that is counted there, scraped every 50 ms. Completions
are counted over the last minute, and that rule is skipped until each pod has one.
`aibrix_pd` without a prefill pool, and for whole requests, is prefix-cache; `aibrix_prefix` with
one is prefix-cache in either pool, which AIBrix has no routing for.
"""

from __future__ import annotations

import math
from collections import OrderedDict, defaultdict, deque
from collections.abc import Sequence
from typing import ClassVar, Final, NamedTuple

from engine.latency_model import StepWork
from protos.ids import RequestKey, WorkerId
from router.core.candidates import Candidate
from router.core.workers import Worker
from simulator.baselines.policy import Ask, Choice, Part, PeerPolicy, least
from simulator.baselines.sampling import Sampled
from simulator.baselines.sent_prefixes import SentPrefixes
from simulator.baselines.setup import Setup

SCRAPE_PERIOD_S: Final = 0.05
DRAIN_WINDOW_S: Final = 60.0
MIN_DRAIN_PER_S: Final = 0.1
MIN_FREE_PERCENT: Final = 0.1

PREFIX_KNOBS: Final = {
    "prefix_spread": 8.0,
    "deviations": 1.0,
    "table_tokens": 200_000.0,
    "table_ttl_s": 1200.0,
}
PD_KNOBS: Final = {
    **PREFIX_KNOBS,
    "prefill_spread": 16.0,
    "decode_spread": 16.0,
    "throughput_spread": 2048.0,
    "drain_ratio": 1.5,
}


class _Table:
    """Sent prefixes, the least recently used of which are dropped."""

    def __init__(self, limit_tokens: float, ttl_s: float) -> None:
        self.sent = SentPrefixes()
        self._limit_tokens = limit_tokens
        self._ttl_s = ttl_s
        self._used_s: OrderedDict[bytes, float] = OrderedDict()

    def match(self, ask: Ask, workers: Sequence[Worker]) -> dict[WorkerId, int]:
        used_s = self._used_s
        while used_s and next(iter(used_s.values())) <= ask.now_s - self._ttl_s:
            self._drop_oldest()
        return self.sent.match(ask.shape.addresses, workers)

    def send(self, ask: Ask, worker: WorkerId) -> None:
        addresses, used_s = ask.shape.addresses, self._used_s
        self.sent.send(worker, addresses)
        for address in reversed(addresses):
            used_s[address] = ask.now_s
            used_s.move_to_end(address)
        limit_blocks = self._limit_tokens // ask.view.block_tokens
        while len(used_s) > limit_blocks:
            self._drop_oldest()

    def _drop_oldest(self) -> None:
        address, _ = self._used_s.popitem(last=False)
        self.sent.drop(address)


class AibrixPrefix(PeerPolicy):
    """Best match that is not overloaded."""

    compared: ClassVar[tuple[str, ...]] = ("requests", "match_percent")
    knobs: ClassVar = PREFIX_KNOBS

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        knobs = setup.read(self.knobs)
        self._prefix_spread = knobs["prefix_spread"]
        self._deviations = knobs["deviations"]
        self._table = _Table(knobs["table_tokens"], knobs["table_ttl_s"])

    def choose(self, ask: Ask, workers: Sequence[Worker], part: Part) -> Choice:
        """See `PeerPolicy`."""
        requests = [self.counts.in_flight(worker.id) for worker in workers]
        matched = self._table.match(ask, workers)
        candidates = self._matched(ask, part, workers, requests, matched)
        if not candidates:
            candidates = self._by_requests(part, workers, requests)
        chosen = least(candidates, self._rng)
        self._table.send(ask, chosen)
        return Choice(chosen, candidates)

    def _matched(
        self,
        ask: Ask,
        part: Part,
        workers: Sequence[Worker],
        requests: list[int],
        matched: dict[WorkerId, int],
    ) -> list[Candidate]:
        fewest, limit = min(requests), self._limit(requests)
        if max(requests) - fewest > self._prefix_spread:
            limit = min(limit, fewest)
        tie_scale, role = 1 + max(requests), part.role
        candidates = []
        for worker, count in zip(workers, requests, strict=True):
            if count <= limit and worker.id in matched:
                percent = _percent(ask, matched[worker.id])
                # Whole percents first, then requests, which make less than one.
                cost = count / tie_scale - percent
                candidates.append(Candidate(worker.id, role, cost, self._numbers(count, percent)))
        return candidates

    def _by_requests(
        self, part: Part, workers: Sequence[Worker], requests: list[int]
    ) -> list[Candidate]:
        role = part.role
        return [
            Candidate(worker.id, role, count, self._numbers(count, 0))
            for worker, count in zip(workers, requests, strict=True)
        ]

    def _limit(self, requests: list[int]) -> float:
        """Mean and so many standard deviations, of a sample as upstream."""
        mean = sum(requests) / len(requests)
        if len(requests) == 1:
            return mean
        squares = sum([(count - mean) ** 2 for count in requests])
        return mean + self._deviations * math.sqrt(squares / (len(requests) - 1))

    def _numbers(self, requests: int, percent: int) -> tuple[float, ...]:
        return (requests, percent)


class _Scraped(NamedTuple):
    tokens_per_s: float
    free_percent: float


class AibrixPd(AibrixPrefix):
    """Prefill by match and requests; decode by requests, throughput and room."""

    compared: ClassVar = ("requests", "match_percent", "tokens_per_s", "free_percent")
    knobs: ClassVar = PD_KNOBS

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        knobs = setup.read(self.knobs)
        self._prefill_spread = knobs["prefill_spread"]
        self._decode_spread = knobs["decode_spread"]
        self._throughput_spread = knobs["throughput_spread"]
        self._drain_ratio = knobs["drain_ratio"]
        self._step_s = setup.decode_times.step_s
        self._scraped = Sampled[_Scraped](SCRAPE_PERIOD_S, self._scrape)
        self._completed_s: defaultdict[WorkerId, deque[float]] = defaultdict(deque)

    def choose(self, ask: Ask, workers: Sequence[Worker], part: Part) -> Choice:
        """See `PeerPolicy`."""
        if part is Part.WHOLE:
            return super().choose(ask, workers, part)
        requests = [self.counts.in_flight(worker.id) for worker in workers]
        if part is Part.DECODE:
            candidates = self._decode(ask, workers, requests)
            return Choice(least(candidates, self._rng), candidates)
        candidates = self._prefill(ask, workers, requests)
        chosen = least(candidates, self._rng)
        self._table.send(ask, chosen)
        return Choice(chosen, candidates)

    def ended(self, now_s: float, key: RequestKey, output_tokens: int | None = None) -> None:
        """See `Placement`."""
        worker = self.counts.ended(key)
        if worker is not None and output_tokens is not None:
            self._completed_s[worker].append(now_s)

    def _prefill(self, ask: Ask, workers: Sequence[Worker], requests: list[int]) -> list[Candidate]:
        if max(requests) - min(requests) > self._prefill_spread:
            return self._by_requests(Part.PREFILL, workers, requests)
        matched = self._table.match(ask, workers)
        limit, most, role = self._limit(requests), max(1, *requests), Part.PREFILL.role
        candidates = []
        for worker, count in zip(workers, requests, strict=True):
            if count <= limit:
                percent = _percent(ask, matched.get(worker.id, 0))
                cost = 0.1 * (100 - percent) + count / most
                candidates.append(Candidate(worker.id, role, cost, self._numbers(count, percent)))
        return candidates

    def _decode(self, ask: Ask, workers: Sequence[Worker], requests: list[int]) -> list[Candidate]:
        samples = self._scraped.at(ask.now_s, ask.view.pool)
        scraped = [samples[worker.id] for worker in workers]
        costs = self._decode_costs(ask.now_s, workers, requests, scraped)
        role = Part.DECODE.role
        return [
            Candidate(worker.id, role, cost, (count, 0, each.tokens_per_s, each.free_percent))
            for worker, count, each, cost in zip(workers, requests, scraped, costs, strict=True)
        ]

    def _decode_costs(
        self,
        now_s: float,
        workers: Sequence[Worker],
        requests: list[int],
        scraped: list[_Scraped],
    ) -> Sequence[float]:
        """By the first rule that applies."""
        if max(requests) - min(requests) >= self._decode_spread:
            return requests
        throughputs = [each.tokens_per_s for each in scraped]
        if max(throughputs) - min(throughputs) > self._throughput_spread:
            return throughputs
        drains_s = self._drains_s(now_s, workers, requests)
        if drains_s and 0 < min(drains_s) * self._drain_ratio < max(drains_s):
            return drains_s
        most = max(1, *requests)
        fastest = max(1.0, *throughputs)
        roomiest = max(1.0, *[each.free_percent for each in scraped])
        return [
            (count / most + 1 - each.tokens_per_s / fastest) / (each.free_percent / roomiest)
            for count, each in zip(requests, scraped, strict=True)
        ]

    def _drains_s(
        self, now_s: float, workers: Sequence[Worker], requests: list[int]
    ) -> list[float]:
        """How long each would take for what it has; empty unless each completed something."""
        drains_s = []
        for worker, count in zip(workers, requests, strict=True):
            completed_s = self._completed_s[worker.id]
            while completed_s and completed_s[0] <= now_s - DRAIN_WINDOW_S:
                completed_s.popleft()
            if not completed_s:
                return []
            drains_s.append(count / max(MIN_DRAIN_PER_S, len(completed_s) / DRAIN_WINDOW_S))
        return drains_s

    def _numbers(self, requests: int, percent: int) -> tuple[float, ...]:
        return (requests, percent, 0.0, 0.0)

    def _scrape(self, worker: Worker) -> _Scraped:
        load, count = worker.load, self.counts.at(worker.id)
        tokens_per_s = 0.0
        if load.running:
            context_tokens = round(load.running * count.context_tokens / max(1, count.in_flight))
            step_s = self._step_s(StepWork(0, 0.0, load.running, context_tokens))
            tokens_per_s = load.running / step_s
        used = load.kv_blocks_used / load.kv_blocks_total if load.kv_blocks_total else 0.0
        return _Scraped(tokens_per_s, max(MIN_FREE_PERCENT, round(100 - 100 * used)))


def _percent(ask: Ask, blocks: int) -> int:
    return 100 * ask.tokens(blocks) // max(1, ask.shape.prompt_tokens)
