"""How much of everybody's time one request's grammar may take.

The engine's one thread works through the grammars of all guided requests at each step. Some, such
as `(([a-z]{1,1000}){1,1000}){1,1000}`, can be matched in so many ways that each token takes
seconds, of every stream of the engine. No look at a grammar tells that, so its time is taken.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Final

from vllm.v1.structured_output.backend_types import StructuredOutputGrammar

ONCE_S: Final = 2.0
"""For building masks of a large vocabulary, which are kept."""
PER_TOKEN_S: Final = 0.05
"""Usual is less than a millisecond."""


class TimedGrammar(StructuredOutputGrammar):  # type: ignore[misc]
    """A grammar that counts the CPU time that it takes."""

    def __init__(self, grammar: StructuredOutputGrammar) -> None:
        self._grammar = grammar
        self._tokens = 0
        self.used_s = 0.0

    @property
    def is_over_budget(self) -> bool:
        """Whether it took more than what its tokens may take."""
        return self.used_s > ONCE_S + PER_TOKEN_S * self._tokens

    def accept_tokens(self, request_id: str, tokens: list[int]) -> bool:
        self._tokens += len(tokens)
        return bool(self._timed(self._grammar.accept_tokens, request_id, tokens))

    def validate_tokens(self, tokens: list[int]) -> list[int]:
        return list(self._timed(self._grammar.validate_tokens, tokens))

    def fill_bitmask(self, bitmask: Any, batch_index: int) -> None:
        self._timed(self._grammar.fill_bitmask, bitmask, batch_index)

    def rollback(self, num_tokens: int) -> None:
        self._timed(self._grammar.rollback, num_tokens)

    def is_terminated(self) -> bool:
        return bool(self._grammar.is_terminated())

    def reset(self) -> None:
        self._grammar.reset()

    def _timed(self, work: Callable[..., Any], *arguments: Any) -> Any:
        began_s = time.thread_time()
        try:
            return work(*arguments)
        finally:
            self.used_s += time.thread_time() - began_s
