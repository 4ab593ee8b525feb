"""Requests that no trace holds: made from a seed, in the order of their arrival.

`SYNTHETIC` names what can be made. Prompts that begin alike are made of blocks with equal ids, as
in a trace; lengths are log-normal around their means (ServeGen, arXiv 2505.09999, finds such bodies
in production), arrivals a Poisson process unless the name says otherwise.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np

from simulator.traces import BLOCK_TOKENS, TracedRequest

_LENGTH_SIGMA: Final = 0.6
"""Of the logarithm of lengths."""
_LONGEST_TOKENS: Final = 100_000


@dataclass(frozen=True, slots=True)
class Wish:
    """How much of it."""

    rate_rps: float
    """Mean requests per second."""
    duration_s: float
    seed: int = 0


def jittered(
    requests: Iterable[TracedRequest], grid_s: float, seed: int
) -> Iterator[TracedRequest]:
    """Spread requests that a coarse clock put at one time over what the clock stands for."""
    rng = np.random.default_rng(seed)
    for arrival_s, group in itertools.groupby(requests, key=lambda each: each.arrival_s):
        together = list(group)
        for offset_s, request in zip(
            np.sort(rng.uniform(0, grid_s, len(together))), together, strict=True
        ):
            yield request._replace(arrival_s=arrival_s + float(offset_s))


def sped_up(requests: Iterable[TracedRequest], factor: float) -> Iterator[TracedRequest]:
    """So many times as many requests a second."""
    for request in requests:
        yield request._replace(arrival_s=request.arrival_s / factor)


def until(requests: Iterable[TracedRequest], end_s: float) -> Iterator[TracedRequest]:
    """Those that arrive before."""
    return itertools.takewhile(lambda each: each.arrival_s < end_s, requests)


def poisson(wish: Wish) -> Iterator[TracedRequest]:
    """Unrelated prompts of about 1,000 tokens, 200 tokens of output."""
    rng = np.random.default_rng(wish.seed)
    return _unrelated(rng, _arrivals(rng, wish))


def bursty(wish: Wish) -> Iterator[TracedRequest]:
    """The same, with gamma-distributed gaps whose coefficient of variation is 3."""
    rng = np.random.default_rng(wish.seed)
    return _unrelated(rng, _arrivals(rng, wish, variation=3.0))


def sine(wish: Wish) -> Iterator[TracedRequest]:
    """The same, with a rate that swings by 80 % around its mean, every 5 minutes."""
    rng = np.random.default_rng(wish.seed)
    swing, period_s = 0.8, 300.0
    thinned = (
        at_s
        for at_s in _arrivals(rng, Wish(wish.rate_rps * (1 + swing), wish.duration_s))
        if rng.uniform() * (1 + swing) < 1 + swing * math.sin(2 * math.pi * at_s / period_s)
    )
    return _unrelated(rng, thinned)


def prefix_groups(wish: Wish) -> Iterator[TracedRequest]:
    """150 groups that share 6,144 tokens each, 1,200 tokens of their own, 200 of output.

    After the workload of llm-d's benchmarks; groups are asked for evenly.
    """
    return grouped(wish, groups=150, shared_tokens=6144, own_tokens=1200, output_tokens=200)


def grouped(
    wish: Wish, groups: int, shared_tokens: int, own_tokens: int, output_tokens: int
) -> Iterator[TracedRequest]:
    """Groups whose prompts begin alike, asked for evenly; lengths but the shared one are means."""
    rng = np.random.default_rng(wish.seed)
    ids = itertools.count(1)
    shared_blocks = shared_tokens // BLOCK_TOKENS
    shared = [tuple(itertools.islice(ids, shared_blocks)) for _ in range(groups)]
    for at_s in _arrivals(rng, wish):
        own = _length(rng, own_tokens)
        prefix = shared[int(rng.integers(groups))]
        blocks = prefix + tuple(itertools.islice(ids, _blocks(own)))
        tokens = shared_blocks * BLOCK_TOKENS + own
        yield TracedRequest(at_s, tokens, _length(rng, output_tokens), blocks)


def sessions(wish: Wish) -> Iterator[TracedRequest]:
    """Chats of 6 turns on average, 30 s of thought between; each prompt repeats all before it."""
    return _conversations(
        wish, turns_mean=6, system_tokens=512, user_tokens=300, answer_tokens=250, pause_s=30.0
    )


def agents(wish: Wish) -> Iterator[TracedRequest]:
    """Chains of 12 tool calls on average, 2 s apart, behind one of a few long system prompts."""
    return _conversations(
        wish, turns_mean=12, system_tokens=8192, user_tokens=700, answer_tokens=80, pause_s=2.0,
        systems=8,
    )  # fmt: skip


SYNTHETIC: Final[dict[str, Callable[[Wish], Iterator[TracedRequest]]]] = {
    "poisson": poisson,
    "bursty": bursty,
    "sine": sine,
    "prefix-groups": prefix_groups,
    "sessions": sessions,
    "agents": agents,
}

_ANSWER_S_PER_TOKEN: Final = 0.02
"""About how long an answer takes before its reader can go on; the system's own pace is not known
while a workload is made."""


def _conversations(
    wish: Wish, turns_mean: float, system_tokens: int, user_tokens: int, answer_tokens: int,
    pause_s: float, systems: int = 1,
) -> Iterator[TracedRequest]:  # fmt: skip
    rng = np.random.default_rng(wish.seed)
    ids = itertools.count(1)
    prefixes = [tuple(itertools.islice(ids, system_tokens // BLOCK_TOKENS)) for _ in range(systems)]
    starts = _arrivals(rng, Wish(wish.rate_rps / turns_mean, wish.duration_s))
    next_start_s = next(starts, math.inf)
    order = itertools.count()
    due: list[tuple[float, int, _Conversation]] = []
    while due or next_start_s < math.inf:
        if not due or next_start_s < due[0][0]:
            turns = int(rng.geometric(1 / turns_mean))
            prefix = prefixes[int(rng.integers(systems))]
            begun = _Conversation(prefix, system_tokens, turns)
            heapq.heappush(due, (next_start_s, next(order), begun))
            next_start_s = next(starts, math.inf)
            continue
        at_s, _, talk = heapq.heappop(due)
        if at_s >= wish.duration_s:
            continue
        answer = _length(rng, answer_tokens)
        yield talk.ask(at_s, _length(rng, user_tokens), answer, ids)
        if talk.turns_left and talk.tokens < _LONGEST_TOKENS:
            wait_s = answer * _ANSWER_S_PER_TOKEN + rng.exponential(pause_s)
            heapq.heappush(due, (at_s + float(wait_s), next(order), talk))


@dataclass(slots=True)
class _Conversation:
    """All that was said so far."""

    blocks: tuple[int, ...]
    """Of the whole blocks of it."""
    tokens: int
    turns_left: int

    def ask(
        self, at_s: float, user_tokens: int, answer_tokens: int, ids: Iterator[int]
    ) -> TracedRequest:
        """One more turn."""
        self.turns_left -= 1
        prompt_tokens = self.tokens + user_tokens
        self._grow(prompt_tokens, ids)
        part = (next(ids),) if prompt_tokens % BLOCK_TOKENS else ()
        asked = TracedRequest(at_s, prompt_tokens, answer_tokens, self.blocks + part)
        self._grow(prompt_tokens + answer_tokens, ids)
        return asked

    def _grow(self, tokens: int, ids: Iterator[int]) -> None:
        more = tokens // BLOCK_TOKENS - len(self.blocks)
        self.blocks += tuple(itertools.islice(ids, more))
        self.tokens = tokens


def _arrivals(rng: np.random.Generator, wish: Wish, variation: float = 1.0) -> Iterator[float]:
    """Gamma-distributed gaps; with a coefficient of variation of 1 a Poisson process."""
    shape = 1 / variation**2
    at_s = 0.0
    while True:
        at_s += float(rng.gamma(shape, 1 / (shape * wish.rate_rps)))
        if at_s >= wish.duration_s:
            return
        yield at_s


def _unrelated(rng: np.random.Generator, arrivals_s: Iterable[float]) -> Iterator[TracedRequest]:
    for at_s in arrivals_s:
        yield TracedRequest(at_s, _length(rng, 1000), _length(rng, 200))


def _length(rng: np.random.Generator, mean_tokens: float) -> int:
    mu = math.log(mean_tokens) - _LENGTH_SIGMA**2 / 2
    return min(_LONGEST_TOKENS, max(1, round(float(rng.lognormal(mu, _LENGTH_SIGMA)))))


def _blocks(tokens: int) -> int:
    return -(-tokens // BLOCK_TOKENS)
