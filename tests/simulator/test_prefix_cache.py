"""One prefix cache over a trace."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.prefix_hit_rate import REFERENCE_PERCENT, percentages
from simulator.prefix_cache import distinct_tokens, token_hit_rate
from simulator.traces import BLOCK_TOKENS, TracedRequest

TOLERANCE_POINTS = 0.5


def asked(*prompts: tuple[int, ...], last_tokens: int = BLOCK_TOKENS) -> list[TracedRequest]:
    """One request after the other for these blocks, the last block so long."""
    return [
        TracedRequest(0.0, (len(blocks) - 1) * BLOCK_TOKENS + last_tokens, 1, blocks)
        for blocks in prompts
    ]


@pytest.mark.parametrize(
    ("prompts", "capacity_blocks", "hit_blocks"),
    [
        (asked((1, 2), (1, 2)), 2, 2),
        (asked((1, 2), (1, 3)), 9, 1),
        # Only what both begin with: the 2 comes after something else.
        (asked((1, 2), (3, 2)), 9, 0),
        # 3 makes room by the end of the first prompt, not by its beginning.
        (asked((1, 2), (3,), (1, 2)), 2, 1),
        # What was used last stays.
        (asked((1,), (2,), (1,), (3,), (1,), (2,)), 2, 2),
        # Too long for the cache: it neither uses it nor empties it.
        (asked((1,), (1, 2, 3), (1,)), 2, 1),
        (asked((1,), (1,)), 0, 0),
    ],
)
def test_hits(prompts: list[TracedRequest], capacity_blocks: int, hit_blocks: int) -> None:
    total = sum(len(each.block_ids) for each in prompts)
    rate = token_hit_rate(prompts, capacity_blocks * BLOCK_TOKENS)
    assert rate * total == pytest.approx(hit_blocks)


def test_a_prompts_last_block_counts_with_the_tokens_that_it_has() -> None:
    prompts = asked((1, 2), (1, 2), last_tokens=100)
    assert token_hit_rate(prompts, 2 * BLOCK_TOKENS) == 0.5


def test_distinct_tokens() -> None:
    assert distinct_tokens(asked((1, 2), (1, 3), (1,))) == 3 * BLOCK_TOKENS


def test_the_conversation_traces_hit_rates(shared: Path) -> None:
    """At every size within half a point of the reference."""
    found = percentages(shared / "traces/mooncake_conversation.jsonl.gz")
    assert found == pytest.approx(REFERENCE_PERCENT, abs=TOLERANCE_POINTS)
