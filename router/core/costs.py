"""What a request costs on each worker: to itself, to those beside it and to those behind it.

A latency that is the share x of its SLO costs x squared, of which the expectation is taken: a time
that is spread wide costs more than its median says (`engine.learned_times`).

Pure; all workers at once, in columns. docs/adr/0007 tells how costs came to be squared shares of
the SLOs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import Final, Generic, NamedTuple, TypeVar

import numpy as np

from engine.learned_times import LearnedTimes
from engine.spec import EngineTimes, PoolTimes
from router.core.arrivals import Arrivals
from router.core.backlog import Before
from router.core.candidates import Column
from router.core.columns import Columns
from router.core.events import Role
from router.core.forecast import LARGEST_SHARE

Amount = TypeVar("Amount", float, Column)

COMPARED: Final = ("cached_tokens", "queue_s", "prefill_s", "transfer_s", "ttft_s", "tpot_s")
LEAST_STEP_S: Final = 1e-6
LEAST_TOKEN_S: Final = 1e-9
LARGE: Final = 4.0
"""Who needs more room than so many of those that run waits for no more than that."""
FULL: Final = 1e6
"""More than anything else costs: to be handed to a worker whose KV cache has no room."""


@dataclass(frozen=True, slots=True)
class Slo:
    """What clients were promised, where a request does not say."""

    ttft_s: float
    tpot_s: float


@dataclass(frozen=True, slots=True)
class Weights:
    """What the parts of a cost weigh."""

    arriving: float = 4.0
    """Those count so many times that will come while what waits on a worker and one prompt more are
    computed, and lose a prompt's time: docs/adr/0007 tells how this and `later` were found."""
    later: float = 20.0
    """As how many they count at most, beside those that wait now; and while nobody knows how often
    they come."""
    delayed: float = 8.0
    """How much it weighs that a prompt's time falls on few tokens of those outputs beside it that
    are short: docs/adr/0007."""
    floor: float = 0.02
    """What a prompt's time costs at least, where nothing waits: so caches are used."""
    hold: float = 0.3
    """Requests wait at the router, where they can still be ordered and go to whoever is free first,
    while on every worker the prompts before it take this share of the TTFT that is promised to all:
    docs/adr/0008."""
    share_window_s: float = 10.0
    """Over how long the share of its time that a worker spends on prompts is averaged."""


WEIGHTS: Final = Weights()


@dataclass(frozen=True, slots=True)
class Asked:
    """One question: what is the same for all workers."""

    now_s: float
    tokens: int
    """To be computed or cached: the prompt, and what is generated already."""
    length_tokens: float
    """Expected to come."""
    context_tokens: float
    """What the request adds to decode steps, on average over its life."""
    slo: Slo
    """What it was promised."""
    others_slo: Slo
    """What those were that it delays: who asks for less has no right to more of their time."""
    delayed_square: float
    """See `OutputLengths`."""
    others_tokens: float
    """How long outputs get, whoever asks."""


@dataclass(frozen=True, slots=True)
class Profile(Generic[Amount]):
    """What the work of an engine's steps takes, of one engine or in columns: the terms of
    `SimulatedTiming`."""

    step_base_s: Amount
    prefill_token_s: Amount
    prefill_pair_s: Amount
    decode_request_s: Amount
    decode_context_token_s: Amount
    transfer_block_s: Amount
    transfer_base_s: Amount
    max_step_tokens: Amount

    def step_s(self, requests: Amount, context_tokens: Amount) -> Amount:
        """A step that only decodes: `StepTimes.step_s`."""
        return (
            self.step_base_s
            + requests * self.decode_request_s
            + context_tokens * self.decode_context_token_s
        )

    def transfer_s(self, blocks: Amount, step_s: Amount) -> Amount:
        """From a hand-off until the request is in a step: it waits for its blocks, then for the end
        of a step that is under way, half of one on average."""
        return self.transfer_base_s + blocks * self.transfer_block_s + step_s / 2


def profile_of(engine: EngineTimes) -> Profile[float]:
    """In columns' terms."""
    timing = engine.timing
    return Profile(
        # Steps that take no time at all leave nothing to compare.
        max(LEAST_STEP_S, timing.step_base_s), timing.prefill_token_s, timing.prefill_pair_s,
        timing.decode_request_s, timing.decode_context_token_s, timing.transfer_block_s,
        timing.transfer_base_s, engine.max_step_tokens,
    )  # fmt: skip


class Found(NamedTuple):
    """All workers as the request finds them."""

    columns: Columns
    profile: Profile[Column]
    cached: Column
    """Tokens of the prompt."""
    later: Column
    """How many prompts come after it and lose its time."""
    queue_s: Column
    work_s: Column
    """What the profile says of the rest of the prompt's tokens."""
    base_s: Column
    """What its steps take beside that."""
    prefill_s: Column
    """Of the rest of the prompt, once its turn has come."""
    occupies_s: Column
    """By how much it delays what comes after it: prompts share steps."""
    before_s: Column
    """A decode step of all that are to decode there, without the request."""
    left: Column
    """Of the worker's time, what prompts leave."""
    left_with_it: Column
    """With this prompt's time."""
    tpot_before_s: Column
    ttft_s: Column
    """If its prompt is computed there."""
    missing_tokens: Column
    """Of room for it in the KV cache; below 0 there is more than enough."""
    full: Column
    """Whether it has no room, neither for it nor for `LARGE` of those that run there, and something
    there will make some. So one that needs much more than others does not keep them waiting until
    a worker is as good as empty."""
    room_s: Column
    """Until it has room: see `_room_s`."""
    used_tokens: Column
    """Of its KV cache, as reported: what requests share counts once."""

    @property
    def all_full(self) -> bool:
        """No worker that makes tokens has room."""
        return bool(self.full[self.columns.last].all())


class Pricing:
    """Predicts times and weighs them. Parts are priced as columns: costs, then `COMPARED`."""

    def __init__(self, engines: PoolTimes, weights: Weights, learned: LearnedTimes) -> None:
        self._profiles = {
            Role.PREFILL: profile_of(engines.prefill), Role.DECODE: profile_of(engines.decode)
        }  # fmt: skip
        self._learned = learned
        self._weights = weights
        self._columns: Columns | None = None

    def of(self, role: Role) -> Profile[float]:
        """What is known of a pool's engines."""
        return self._profiles[role]

    def step_s(self, role: Role, requests: float, context_tokens: float) -> float:
        """A step of one engine of that pool, that only decodes."""
        return self._learned.step.value * self._profiles[role].step_s(requests, context_tokens)

    def prompts(
        self, role: Role, tokens: float, pairs: float, running: float
    ) -> tuple[float, float]:
        """What the profile says of prompts' tokens, and how many steps they take."""
        profile = self._profiles[role]
        work_s = tokens * profile.prefill_token_s + pairs * profile.prefill_pair_s
        return work_s, tokens / max(1.0, profile.max_step_tokens - running)

    def _of(self, columns: Columns) -> Profile[Column]:
        if columns is not self._columns:
            self._columns = columns
            pools = astuple(self._profiles[Role.PREFILL]), astuple(self._profiles[Role.DECODE])
            self._in_columns = Profile(*map(columns.by_role, *pools))
        return self._in_columns

    def find(self, ask: Asked, columns: Columns, cached: Column, arrivals: Arrivals) -> Found:
        """What is predicted for the request on each worker."""
        profile, weights, step = self._of(columns), self._weights, self._learned.step.value
        window_s = weights.share_window_s
        tokens = ask.tokens - cached
        before_s = step * profile.step_s(columns.decodes, columns.context_tokens)
        running_s = step * profile.step_s(columns.running, columns.running_context_tokens)
        # In chunks, each beside what decodes there by now.
        steps = tokens / np.maximum(1.0, profile.max_step_tokens - columns.running)
        work_s = tokens * (profile.prefill_token_s + (cached + tokens / 2) * profile.prefill_pair_s)
        takes_s = self._learned.prefill.value * work_s
        base_s = np.ceil(steps) * running_s
        prefill_s, occupies_s = takes_s + base_s, takes_s + steps * running_s
        queue_s, share = columns.queue_s(ask.now_s), columns.prefill_share(ask.now_s, window_s)
        left = 1 - share
        left_with_it = 1 - np.minimum(LARGEST_SHARE, share + occupies_s / window_s)
        used_tokens = columns.kv_blocks_used() * columns.block_tokens
        missing_tokens = _missing_tokens(columns, used_tokens, ask.context_tokens - cached)
        each_tokens = _each_tokens(columns, used_tokens)
        most_tokens = _missing_tokens(columns, used_tokens, LARGE * each_tokens)
        later = columns.waiting + weights.later
        if (rate_rps := arrivals.rate_rps(ask.now_s)) is not None:
            # To each of those that compute prompts; other routers get as many as this one.
            each_rps = columns.routers * rate_rps / columns.computing
            coming = weights.arriving * each_rps * (queue_s + arrivals.mean_s)
            later = columns.waiting + np.minimum(weights.later, coming)
        return Found(
            columns, profile, cached, later, queue_s, work_s, base_s, prefill_s, occupies_s,
            before_s, left, left_with_it, before_s / left, queue_s + prefill_s, missing_tokens,
            (np.minimum(missing_tokens, most_tokens) > 0) & (columns.decodes > 0),
            _room_s(ask, columns, used_tokens, missing_tokens, running_s / left), used_tokens,
        )  # fmt: skip

    def all_busy(self, there: Found, computing: slice, promised_ttft_s: float) -> bool:
        """Whether each of these has enough prompts before it for now."""
        enough_s = self._weights.hold * promised_ttft_s
        return bool((there.queue_s > enough_s)[computing].all())

    def until_room_s(self, ask: Asked, there: Found, before: Before) -> float:
        """How long until some worker has room, behind what waits. That is spread over all, and
        needs room for what is computed of its prompts and for outputs; and each of it for as much
        as this request or one of those that are there, whichever is less."""
        columns = there.columns
        last, computing = columns.last, self._profiles[columns.role(0)]
        token_s = max(LEAST_TOKEN_S, self._learned.prefill.value * computing.prefill_token_s)
        computed_tokens = before.work_s / token_s + before.requests * ask.others_tokens / 2
        each_tokens = np.minimum(ask.context_tokens, _each_tokens(columns, there.used_tokens))
        before_tokens = np.maximum(computed_tokens, before.requests * each_tokens)
        missing_tokens = there.missing_tokens + before_tokens / (last.stop - last.start)
        wait_s = _room_s(ask, columns, there.used_tokens, missing_tokens, there.tpot_before_s)
        return float(np.where(columns.decodes > 0, wait_s, 0.0)[last].min())

    def tpot_after(
        self, ask: Asked, columns: Columns, at: int, tpot_s: float, after_s: float, joined: float
    ) -> float:
        """What a predicted time between tokens at one worker will be after a while, when some of
        those that decode there now will have ended, and others will have joined them."""
        gone = -math.expm1(-after_s / (tpot_s * ask.length_tokens))
        running, running_tokens = columns.running[at], columns.running_context_tokens[at]
        requests = joined - gone * running
        tokens = joined * ask.context_tokens - gone * running_tokens
        role = columns.role(at)
        step_s = self.step_s(role, requests, tokens) - self.step_s(role, 0.0, 0.0)
        return tpot_s + float(step_s)

    def prefill(self, ask: Asked, there: Found) -> Sequence[Column]:
        """Its prompt alone."""
        tpot_s = there.before_s / there.left_with_it
        cost = self._behind(ask, there) + self._beside(ask, there, tpot_s)
        none = there.columns.none
        return cost, there.cached, there.queue_s, there.prefill_s, none, there.ttft_s, none

    def decode(self, ask: Asked, there: Found) -> Sequence[Column]:
        """What comes after a prompt that another worker computes."""
        blocks = (ask.tokens - there.cached) / there.columns.block_tokens
        profiled_s = there.profile.transfer_s(blocks, there.before_s)
        transfer_s = self._learned.transfer.mean * profiled_s
        tpot_s = self._with_it_s(ask, there) / there.left
        cost = self._beside(ask, there, tpot_s)
        # Its client waits for the second token while the prompt's state moves.
        tpot_s = tpot_s + transfer_s / ask.length_tokens
        cost += self._own(ask, tpot_s + there.room_s / ask.length_tokens)
        if not there.all_full:
            # A wait between the first token and the second is more than short outputs can bear.
            cost += FULL * there.full
        none = there.columns.none
        return cost, there.cached, none, none, transfer_s, none, tpot_s

    def whole(self, ask: Asked, there: Found) -> Sequence[Column]:
        """Both."""
        step_s = self._with_it_s(ask, there)
        # Its own tokens come after its prompt, which takes time from others' alone. Its cost counts
        # that as its own too: without it prompts are sent past caches.
        tpot_s, others_s = step_s / there.left, step_s / there.left_with_it
        cost = self._behind(ask, there) + self._own(ask, others_s)
        cost += self._beside(ask, there, others_s) + self._delayed(ask, there)
        cost += (there.room_s / ask.slo.ttft_s) ** 2
        none = there.columns.none
        return cost, there.cached, there.queue_s, there.prefill_s, none, there.ttft_s, tpot_s

    def _with_it_s(self, ask: Asked, there: Found) -> Column:
        """A decode step of all that are to decode there and the request."""
        profile = there.profile
        added_s = profile.decode_request_s + ask.context_tokens * profile.decode_context_token_s
        return there.before_s + self._learned.step.value * added_s

    def _behind(self, ask: Asked, there: Found) -> Column:
        """What this prompt's wait and time are worth to itself and to those that come after it."""
        dearer, others_s = self._learned.first_token.square_over_median, ask.others_slo.ttft_s
        price = np.maximum(self._weights.floor, 2 * dearer * there.ttft_s / others_s)
        cost: Column = there.later * price * there.occupies_s / others_s
        cost += dearer * (there.ttft_s / ask.slo.ttft_s) ** 2
        return cost

    def _beside(self, ask: Asked, there: Found, tpot_s: Column) -> Column:
        """What all that decode there are hurt, if their tokens come so far apart with this one."""
        before_s = there.tpot_before_s
        more = (tpot_s * tpot_s - before_s * before_s) / ask.others_slo.tpot_s**2
        cost: Column = self._learned.step.square_over_median * there.columns.decodes * more
        return cost

    def _delayed(self, ask: Asked, there: Found) -> Column:
        """What those are hurt beyond that, because their outputs are not equally long: spread over
        a window, as `_beside` does, a long prompt's time seems to fall on everyone alike."""
        each = ask.delayed_square * (there.occupies_s / ask.others_slo.tpot_s) ** 2
        weight = self._weights.delayed * self._learned.step.square_over_median
        cost: Column = weight * there.columns.decodes * each
        return cost

    def _own(self, ask: Asked, tpot_s: Column) -> Column:
        """What its own tokens' distance is worth to it."""
        share = tpot_s / ask.slo.tpot_s
        cost: Column = self._learned.step.square_over_median * share * share
        return cost


def _missing_tokens(columns: Columns, used_tokens: Column, needed_tokens: Column) -> Column:
    """Of so much room, beside what is used and what will be by those that come; below 0 there is
    more than enough."""
    kept_tokens = columns.kv_blocks * columns.block_tokens
    room_tokens = kept_tokens - used_tokens - columns.coming_tokens
    # Who needs all of a cache can have no more.
    missing_tokens: Column = np.minimum(needed_tokens, kept_tokens) - room_tokens
    return missing_tokens


def _each_tokens(columns: Columns, used_tokens: Column) -> Column:
    """What one of those that are there takes, or will."""
    taken_tokens = used_tokens + columns.coming_tokens
    each_tokens: Column = taken_tokens / np.maximum(1.0, columns.decodes)
    return each_tokens


def _room_s(
    ask: Asked, columns: Columns, used_tokens: Column, missing_tokens: Column, tpot_s: Column
) -> Column:
    """How long until a KV cache has so much more room: until as many of those that decode there
    have ended as hold what is missing, at least one. A guess, since nobody knows who ends when."""
    one = 1 / np.maximum(1.0, columns.running)
    ending_tokens = np.maximum(used_tokens, columns.coming_tokens)
    share = np.maximum(missing_tokens / np.maximum(1.0, ending_tokens), one)
    room_s: Column = np.where(missing_tokens > 0, share * ask.others_tokens * tpot_s, 0.0)
    return room_s
