"""What workers report of other routers' requests, made part of the forecasts.

Pure. A report tells sums, and how much of others' prompts was computed since the worker began; when
the rest will be follows from the profile.
"""

from __future__ import annotations

import math

from engine.base import PlacedWork
from engine.learned_times import Factor
from router.core.costs import Pricing
from router.core.events import Role
from router.core.forecast import NO_OTHERS, Forecast, Others


def hear(
    now_s: float, role: Role, forecast: Forecast, placed: PlacedWork, pricing: Pricing,
    factor: Factor, window_s: float,
) -> None:  # fmt: skip
    """A worker's report is not as the one before. `factor` is of the time that prompts' tokens
    take, and learns by others' prompts as by this router's own."""
    known, there = forecast.others, forecast.figures()
    before = known.placed
    if known is NO_OTHERS:  # What was computed before this router came is no news.
        before = before._replace(
            computed_tokens=placed.computed_tokens, computed_pairs=placed.computed_pairs
        )
    step_s = pricing.step_s(role, there.running, there.running_context_tokens)

    def takes_s(tokens: int, pairs: int) -> float:
        work_s, steps = pricing.prompts(role, tokens, pairs, there.running)
        return factor.value * work_s + steps * step_s

    waiting_s = takes_s(placed.prompt_tokens, placed.prompt_pairs)
    computed_tokens = placed.computed_tokens - before.computed_tokens
    computed_pairs = placed.computed_pairs - before.computed_pairs
    # What came is what there is more of, and what of that is over.
    added_s = takes_s(
        placed.prompt_tokens - before.prompt_tokens + computed_tokens,
        placed.prompt_pairs - before.prompt_pairs + computed_pairs,
    )
    # Of a prompt that was never reported as waiting, nobody knows when it came.
    if computed_tokens > 0 and before.prompts:
        work_s, steps = pricing.prompts(role, computed_tokens, computed_pairs, there.running)
        forecast.done.add(now_s, known.since_s, work_s, math.ceil(steps) * step_s, factor)
    since_s = known.since_s if before.prompts else now_s
    forecast.hear(now_s, Others(placed, waiting_s, since_s), max(0.0, added_s), window_s)
