"""How much of a trace's prompts one prefix cache holds: the bound for every way to route them.

The cache is the simulated engine's own, a block of the trace taken for one of the engine's.
"""

from __future__ import annotations

from collections.abc import Iterable

from engine.simulated.kv_cache import BlockPool
from simulator.traces import BLOCK_TOKENS, TracedRequest


def token_hit_rate(requests: Iterable[TracedRequest], capacity_tokens: int) -> float:
    """The share of all prompt tokens that were cached when their request came, from 0 to 1.

    One request at a time; what was used longest ago makes room, a prompt's end before its
    beginning. A prompt that is longer than the cache is computed without it.
    """
    pool = BlockPool(capacity_tokens // BLOCK_TOKENS)
    prompt_tokens = hit_tokens = 0
    for request in requests:
        contents = [block_id.to_bytes(8, "big") for block_id in request.block_ids]
        prompt_tokens += request.input_tokens
        if len(contents) > pool.blocks_total:
            continue
        cached = pool.match(contents)
        hit_tokens += min(len(cached) * BLOCK_TOKENS, request.input_tokens)
        held = pool.hold(cached, len(contents) - len(cached))
        for block, content in zip(held[len(cached) :], contents[len(cached) :], strict=True):
            pool.publish(block, content)
        pool.release(held)
    return hit_tokens / prompt_tokens


def distinct_tokens(requests: Iterable[TracedRequest]) -> int:
    """A cache of so many tokens holds everything that a trace ever asked for."""
    return BLOCK_TOKENS * len({block_id for each in requests for block_id in each.block_ids})
