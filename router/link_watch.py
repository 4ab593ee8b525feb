"""Is the worker behind a link dead, or only the link? Pure: what was seen and when, then a verdict.

Three cases look alike for a while. A process that is gone refuses connections. One that hangs still
has them accepted, by its kernel, but greets nobody. A cut link lets nothing through: it is waited
for, since what runs behind it is not lost. Times are seconds that the router was awake.
"""

from __future__ import annotations

from enum import Enum
from typing import Final

SILENCE_S: Final = 5.0
"""Workers report several times a second; one that says nothing for so long counts as cut off."""
GREETING_S: Final = 2.0
"""The longest wait for a worker's Welcome, or for its port to answer."""
HANG_S: Final = 6.5
"""A worker whose port accepts, but that has said nothing for so long, hangs. More than the longest
cut that loses nothing, less than `SILENCE_S` and `GREETING_S` one after the other."""


class Reach(Enum):
    """How a try to attach to a worker ended."""

    WELCOMED = "it was attached"
    REFUSED = "its port refuses connections"
    """Nobody listens there: its process is gone."""
    SILENT = "it accepts connections but does not answer"
    ANSWERED = "it ended the link"
    """It lives, but did not say Welcome."""
    CUT = "it can't be reached"


class LinkWatch:
    """What is known of one worker's silence."""

    def __init__(self, now_s: float, reconnect_s: float) -> None:
        self._reconnect_s = reconnect_s
        self._heard_s = now_s

    def heard(self, now_s: float) -> None:
        """It said something."""
        self._heard_s = now_s

    def is_silent(self, now_s: float) -> bool:
        """Whether to give up a link that stands, and try another."""
        return now_s - self._heard_s > SILENCE_S

    def judge(self, now_s: float, reach: Reach) -> str | None:
        """After a try: why the worker is dead, if it is."""
        silence_s = now_s - self._heard_s
        if reach is Reach.REFUSED:
            return f"{reach.value}"
        if reach is Reach.SILENT and silence_s >= HANG_S:
            return f"it hangs: {reach.value}, and has said nothing for {silence_s:.1f} s"
        if reach is not Reach.WELCOMED and silence_s >= self._reconnect_s:
            return f"{reach.value} for {silence_s:.1f} s"
        return None

    def time_left_s(self, now_s: float) -> float:
        """How long a try may take at most; then it is time to judge."""
        left_s = self._heard_s + self._reconnect_s - now_s
        return min(GREETING_S, left_s) if left_s > 0 else GREETING_S
