"""When blocks that were fetched from another engine may be used: pure, no vLLM.

A one-sided read succeeds even if its owner has freed and refilled the blocks, so a read's own
success proves nothing. The owner keeps blocks until their lease ends; the reader asks *after* the
last byte has arrived whether the lease still ran. What lapsed is recomputed, never used.
"""

from __future__ import annotations

from typing import Final

CLOCK_MARGIN_S: Final = 0.25
"""What the estimate of the owner's clock may be off by: half a handshake's round trip, amply."""


def lease_still_held(
    now_s: float, lease_end_s: float | None, owner_clock_ahead_s: float | None
) -> bool:
    """Whether blocks read until `now_s` belonged to the reader's request all the while.

    `now_s` is the reader's clock, taken after the read completed; `lease_end_s` the owner's clock
    when it granted the lease. Renewals are left out on purpose: the reader can't know that they
    arrived. Without an end in the manifest, or a comparison of the clocks, it counts as lapsed.
    """
    if lease_end_s is None or owner_clock_ahead_s is None:
        return False
    return now_s + CLOCK_MARGIN_S < lease_end_s - owner_clock_ahead_s
