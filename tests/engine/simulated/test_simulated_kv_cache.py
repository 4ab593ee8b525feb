from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.simulated.kv_cache import BlockPool, chained_hash, salted_root


def _hashes(tokens: list[int], salt: str | None = None, size: int = 2) -> list[bytes]:
    chain = [salted_root(salt)]
    for start in range(0, len(tokens) - size + 1, size):
        chain.append(chained_hash(chain[-1], tokens[start : start + size]))
    return chain[1:]


def _filled(pool: BlockPool, hashes: list[bytes]) -> list[int]:
    blocks = pool.hold((), len(hashes))
    for block, content in zip(blocks, hashes, strict=True):
        pool.publish(block, content)
    return blocks


def test_content_is_found_until_it_is_overwritten() -> None:
    pool = BlockPool(4)
    hashes = _hashes([1, 2, 3, 4])
    blocks = _filled(pool, hashes)
    pool.release(blocks)
    assert pool.free_blocks == 4
    assert pool.match(hashes) == blocks
    pool.hold((), 4)
    assert pool.match(hashes) == []


def test_a_prefix_outlives_its_tail_and_the_oldest_goes_first() -> None:
    pool = BlockPool(4)
    old, new = _hashes([1, 2, 3, 4]), _hashes([5, 6, 7, 8])
    pool.release(_filled(pool, old))
    pool.release(_filled(pool, new))
    pool.hold((), 1)
    assert len(pool.match(old)) == 1
    assert len(pool.match(new)) == 2


def test_blocks_without_content_go_before_cached_ones() -> None:
    pool = BlockPool(4)
    hashes = _hashes([1, 2, 3, 4])
    pool.release(_filled(pool, hashes))
    pool.release(pool.hold((), 2))
    pool.hold((), 2)
    assert len(pool.match(hashes)) == 2


def test_a_shared_block_is_freed_by_its_last_holder() -> None:
    pool = BlockPool(2)
    hashes = _hashes([1, 2])
    blocks = _filled(pool, hashes)
    assert pool.hold(pool.match(hashes), 0) == blocks
    pool.release(blocks)
    assert pool.used_blocks == 1
    pool.release(blocks)
    assert pool.used_blocks == 0


def test_cached_blocks_that_are_free_count_as_needed() -> None:
    pool = BlockPool(2)
    hashes = _hashes([1, 2])
    pool.release(_filled(pool, hashes))
    assert pool.can_hold(pool.match(hashes), 1)
    assert not pool.can_hold(pool.match(hashes), 2)


def test_hashes_depend_on_everything_before_and_on_the_salt() -> None:
    assert _hashes([1, 2, 3, 4])[1] != _hashes([9, 2, 3, 4])[1]
    assert _hashes([1, 2], "tenant")[0] != _hashes([1, 2])[0]
    with pytest.raises(OverflowError):
        chained_hash(salted_root(None), [-1])


@given(st.lists(st.tuples(st.sampled_from("abcd"), st.integers(0, 4), st.booleans()), max_size=40))
def test_no_block_is_lost_or_given_twice(steps: list[tuple[str, int, bool]]) -> None:
    """Any mix of holding known or new content and releasing it."""
    pool = BlockPool(8)
    held: list[list[int]] = []
    for name, length, release in steps:
        hashes = _hashes([ord(name)] * 2 * length)
        cached = pool.match(hashes)
        if release and held:
            pool.release(held.pop(0))
        elif pool.can_hold(cached, length - len(cached)):
            blocks = pool.hold(cached, length - len(cached))
            assert len(set(blocks)) == length
            for block, content in zip(blocks, hashes, strict=True):
                pool.publish(block, content)
            held.append(blocks)
        pool.check_integrity(Counter(block for blocks in held for block in blocks))
