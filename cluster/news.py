"""What `baton serve` tells the person at the terminal while the cluster runs."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

Kind: TypeAlias = Literal["starting", "ready", "failed", "died"]
_KEPT: Final = 1000


@dataclass(frozen=True, slots=True)
class News:
    """One thing that happened."""

    number: int
    subject: str
    """A worker's id or a router's."""
    kind: Kind
    reason: str
    """Why it failed or died; for `starting`, why the one died whose place it takes."""
    duration_s: float
    """For `ready`: how long the start took."""
    fatal: bool
    """Nothing like it has ever been ready: another attempt would end the same way."""


class NewsLog:
    """The latest news; numbers begin at 1."""

    def __init__(self) -> None:
        self.count = 0
        self._kept: deque[News] = deque(maxlen=_KEPT)

    def add(
        self,
        subject: str,
        kind: Kind,
        reason: str,
        duration_s: float,
        fatal: bool,
    ) -> None:
        self.count += 1
        self._kept.append(News(self.count, subject, kind, reason, duration_s, fatal))

    def after(self, number: int) -> list[News]:
        """What followed the news of that number."""
        return [news for news in self._kept if news.number > number]
