"""How many tokens a body has, and how many of them are cached: learned, by kind of request. Pure.

At the ticket a prompt is bytes; what became of those of the same kind says what to expect.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Final

FIRST_TOKENS_PER_BYTE: Final = 0.25
FIRST_TOKENS: Final = 512.0
"""Of a body whose length is not told."""
WEIGHT: Final = 0.02
"""Of the newest request."""
KINDS_KEPT: Final = 10_000


@dataclass(slots=True)
class _Kind:
    """Exponentially weighted sums; in their ratios prompts weigh what they are long."""

    requests: float = 0.0
    body_bytes: float = 0.0
    tokens: float = 0.0
    sized_tokens: float = 0.0
    """Of those whose bodies' lengths were told."""
    cached_tokens: float = 0.0

    def observe(self, body_bytes: int | None, tokens: int, cached_tokens: int) -> None:
        keep = 1 - WEIGHT
        self.requests = keep * self.requests + 1
        self.tokens = keep * self.tokens + tokens
        self.cached_tokens = keep * self.cached_tokens + cached_tokens
        if body_bytes:
            self.body_bytes = keep * self.body_bytes + body_bytes
            self.sized_tokens = keep * self.sized_tokens + tokens


@dataclass(frozen=True, slots=True)
class PromptGuess:
    """What is thought of a prompt before it is tokenised."""

    tokens: int
    cached_tokens: int


class PromptSizes:
    """Tokens per byte and cached share, by kind; a new kind starts as all others."""

    def __init__(self) -> None:
        self._all = _Kind()
        self._kinds: OrderedDict[str, _Kind] = OrderedDict()

    def guess(self, kind: str, body_bytes: int | None) -> PromptGuess:
        """At least one token."""
        known = self._kinds.get(kind, self._all)
        if body_bytes is None:
            tokens = known.tokens / known.requests if known.requests else FIRST_TOKENS
        elif known.body_bytes:
            tokens = body_bytes * known.sized_tokens / known.body_bytes
        else:
            tokens = body_bytes * FIRST_TOKENS_PER_BYTE
        tokens = max(1.0, tokens)
        share = known.cached_tokens / known.tokens if known.tokens else 0.0
        return PromptGuess(round(tokens), int(share * tokens))

    def observe(self, kind: str, body_bytes: int | None, tokens: int, cached_tokens: int) -> None:
        """All prompts of one body had so many tokens together."""
        self._all.observe(body_bytes, tokens, cached_tokens)
        known = self._kinds.get(kind)
        if known is None:
            known = self._kinds[kind] = _Kind()
            if len(self._kinds) > KINDS_KEPT:
                self._kinds.popitem(last=False)
        self._kinds.move_to_end(kind)
        known.observe(body_bytes, tokens, cached_tokens)
