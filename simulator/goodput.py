"""The highest rate at which requests are served as promised: found by bisection."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from protos.errors import ConfigError

LONGEST_STEP: Final = 2.0
"""From a rate to the next while neither end is known; the first is about twice as long as the
search is fine, for a start that is nearly right."""
MOST_RPS: Final = 1e6
"""Nobody asks for more: a search that finds it would not end."""


def highest_rate(
    serves: Callable[[float], bool], start_rps: float, least_rps: float, precision: float = 0.03
) -> float:
    """The highest rate that is served, to within this share of it; 0 if not even the least is.
    Raises ConfigError if more is than anyone asks for: then there are too few requests.

    `serves` is asked as if rates beyond one that is not served were not served either.
    """
    low = high = start_rps
    step = 1 + precision
    if serves(start_rps):
        while serves(high := low * (step := min(LONGEST_STEP, step * step))):
            low = high
            if low > MOST_RPS:
                raise ConfigError(
                    f"even {low:.0f} requests/s are served as promised: there are too few requests "
                    "to tell a highest rate; take more"
                )
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
