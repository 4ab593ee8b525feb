"""Whether a peer that should answer pings still does: pure.

Who looks may itself have been stopped or starved; the time that it slept does not count against
the peer.
"""

from __future__ import annotations


class Pulse:
    """One peer's pings and answers, on the clock of who looks. Call both often."""

    def __init__(self, every_s: float, limit_s: float) -> None:
        self._every_s = every_s
        self._limit_s = limit_s
        self._looked_s: float | None = None
        self._asked_s: float | None = None
        """When the ping that is unanswered was sent, later by what the looker slept since."""
        self._next_s = 0.0

    def due(self, now_s: float) -> bool:
        """Whether to send a ping now; if so, it counts as sent."""
        self._look(now_s)
        if self._asked_s is not None or now_s < self._next_s:
            return False
        self._asked_s = now_s
        self._next_s = now_s + self._every_s
        return True

    def answered(self) -> None:
        """The peer answered."""
        self._asked_s = None

    def stopped(self, now_s: float) -> bool:
        """Whether an answer is overdue."""
        self._look(now_s)
        return self._asked_s is not None and now_s - self._asked_s > self._limit_s

    def _look(self, now_s: float) -> None:
        slept_s = 0.0 if self._looked_s is None else now_s - self._looked_s - self._every_s
        if self._asked_s is not None and slept_s > 0:
            self._asked_s = min(now_s, self._asked_s + slept_s)
        self._looked_s = now_s
