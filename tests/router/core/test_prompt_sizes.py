"""What is thought of a prompt before it is tokenised."""

from __future__ import annotations

import pytest

from router.core.prompt_sizes import (
    FIRST_TOKENS,
    FIRST_TOKENS_PER_BYTE,
    KINDS_KEPT,
    PromptGuess,
    PromptSizes,
)


def test_a_first_guess() -> None:
    sizes = PromptSizes()
    assert sizes.guess("a", 4000) == PromptGuess(round(4000 * FIRST_TOKENS_PER_BYTE), 0)
    assert sizes.guess("a", None) == PromptGuess(round(FIRST_TOKENS), 0)
    assert sizes.guess("a", 0).tokens == 1


def test_bytes_per_token_and_cached_share_are_learned_by_kind() -> None:
    sizes = PromptSizes()
    for _ in range(10):
        sizes.observe("text", 4000, 1000, 500)
        sizes.observe("tables", 2000, 1000, 0)
    assert sizes.guess("text", 8000) == PromptGuess(2000, 1000)
    assert sizes.guess("tables", 8000) == PromptGuess(4000, 0)
    other = sizes.guess("new", 6000)
    assert other.tokens == pytest.approx(2000, rel=0.05)
    assert other.cached_tokens == pytest.approx(500, rel=0.1)


def test_bodies_in_chunks_are_as_long_as_others() -> None:
    sizes = PromptSizes()
    sizes.observe("a", None, 300, 30)
    sizes.observe("a", None, 500, 50)
    assert sizes.guess("a", None) == PromptGuess(round((0.98 * 300 + 500) / 1.98), 40)
    # They say nothing of how many bytes a token has.
    assert sizes.guess("a", 400).tokens == 100


def test_it_follows_a_change() -> None:
    sizes = PromptSizes()
    for _ in range(200):
        sizes.observe("a", 4000, 1000, 0)
    for _ in range(200):
        sizes.observe("a", 4000, 2000, 0)
    assert sizes.guess("a", 4000).tokens == pytest.approx(2000, rel=0.03)


def test_kinds_are_forgotten() -> None:
    sizes = PromptSizes()
    for number in range(KINDS_KEPT + 1):
        sizes.observe(str(number), 400, 100 + (number > 0), 0)
    assert len(sizes._kinds) == KINDS_KEPT
    assert "0" not in sizes._kinds
