"""The highest rate at which requests are served as promised: found by bisection."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

LONGEST_STEP: Final = 2.0
"""From a rate to the next while neither end is known; the first is about twice as long as the
search is fine, for a start that is nearly right."""


def highest_rate(
    serves: Callable[[float], bool], start_rps: float, least_rps: float, precision: float = 0.03
) -> float:
    """The highest rate that is served, to within this share of it; 0 if not even the least is.

    `serves` is asked as if rates beyond one that is not served were not served either.
    """
    low = high = start_rps
    step = 1 + precision
    if serves(start_rps):
        while serves(high := low * (step := min(LONGEST_STEP, step * step))):
            low = high
    else:
        while not serves(low := high / (step := min(LONGEST_STEP, step * step))):
            high = low
            if low < least_rps:
                return 0.0
    while high / low > 1 + precision:
        middle: float = (low * high) ** 0.5
        if serves(middle):
            low = middle
        else:
            high = middle
    return low
