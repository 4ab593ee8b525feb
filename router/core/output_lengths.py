"""How long outputs get: learned from those that ended, by whoever asks and what for. Pure."""

from __future__ import annotations

from collections import OrderedDict
from typing import Final

FIRST_GUESS_TOKENS: Final = 256.0
WEIGHT: Final = 0.02
"""Of the newest output."""
SHAPE_WEIGHT: Final = 0.002
"""The same for how unequal outputs are: a few short ones decide that."""
FIRST_GUESS_SHAPE: Final = 4.0
"""The mean of one over a length, in ones over the mean length."""
KINDS_KEPT: Final = 10_000


class OutputLengths:
    """Mean output tokens by kind of request: tenant and route. A new kind starts as all others.
    How unequal they are, of all kinds together, which decode side by side."""

    def __init__(self) -> None:
        self._all = FIRST_GUESS_TOKENS
        self._seen = 0
        self._with_gaps = 0
        self._gaps = FIRST_GUESS_TOKENS
        self._per_gap = FIRST_GUESS_SHAPE / FIRST_GUESS_TOKENS
        self._by_kind: OrderedDict[str, float] = OrderedDict()

    def expect(
        self, kind: str, max_tokens: int | None, made_tokens: int = 0, hint: int | None = None
    ) -> float:
        """Tokens still to come, at least one. A client's limit is a bound, not a guess; its hint is
        one, and goes before what was learned."""
        expected = self._by_kind.get(kind, self._all) if hint is None else float(hint)
        # One that has outlived the mean goes on for about as long again (its tail is heavy).
        left = expected - made_tokens if made_tokens < expected else expected
        if max_tokens is not None:
            left = min(left, max_tokens - made_tokens)
        return max(1.0, left)

    @property
    def mean_tokens(self) -> float:
        """Of all kinds."""
        return self._all

    @property
    def delayed_square(self) -> float:
        """The mean square of what a delay of one second adds to the time between tokens of a
        request that decodes meanwhile, in seconds: of n gaps between its tokens each gets 1 / n.
        One is met at a moment in proportion to n, so it is the mean of 1 / n over that of n."""
        return self._per_gap / self._gaps

    def observe(self, kind: str, output_tokens: int) -> None:
        """A request ended by itself after so many."""
        self._seen += 1
        before = self._by_kind.pop(kind, self._all)
        self._all += max(WEIGHT, 1 / (self._seen + 1)) * (output_tokens - self._all)
        self._by_kind[kind] = before + WEIGHT * (output_tokens - before)
        if (gaps := output_tokens - 1) > 0:
            self._with_gaps += 1
            weight = max(SHAPE_WEIGHT, 1 / (self._with_gaps + 1))
            self._gaps += weight * (gaps - self._gaps)
            self._per_gap += weight * (1 / gaps - self._per_gap)
        if len(self._by_kind) > KINDS_KEPT:
            self._by_kind.popitem(last=False)
