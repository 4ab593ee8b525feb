"""How long outputs get: learned from those that ended, by whoever asks and what for. Pure."""

from __future__ import annotations

from collections import OrderedDict
from typing import Final

FIRST_GUESS_TOKENS: Final = 256.0
WEIGHT: Final = 0.02
"""Of the newest output."""
KINDS_KEPT: Final = 10_000


class OutputLengths:
    """Mean output tokens by kind of request: tenant and route. A new kind starts as all others."""

    def __init__(self) -> None:
        self._all = FIRST_GUESS_TOKENS
        self._seen = 0
        self._by_kind: OrderedDict[str, float] = OrderedDict()

    def expect(self, kind: str, max_tokens: int | None, made_tokens: int = 0) -> float:
        """Tokens still to come, at least one. A client's limit is a bound, not a guess."""
        expected = self._by_kind.get(kind, self._all)
        # One that has outlived the mean goes on for about as long again (its tail is heavy).
        left = expected - made_tokens if made_tokens < expected else expected
        if max_tokens is not None:
            left = min(left, max_tokens - made_tokens)
        return max(1.0, left)

    def observe(self, kind: str, output_tokens: int) -> None:
        """A request ended by itself after so many."""
        self._seen += 1
        before = self._by_kind.pop(kind, self._all)
        self._all += max(WEIGHT, 1 / (self._seen + 1)) * (output_tokens - self._all)
        self._by_kind[kind] = before + WEIGHT * (output_tokens - before)
        if len(self._by_kind) > KINDS_KEPT:
            self._by_kind.popitem(last=False)
