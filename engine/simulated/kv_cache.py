"""Paged KV blocks with a content-addressed prefix cache: who holds a block, and what is in it.

A block is *held* while its reference count is above 0, and *free* otherwise. A free block keeps
its content, and may be held again by that, until it is handed out for something else: those freed
longest ago go first. Boundary: knows block ids and hashes, not requests or tokens' meaning.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from hashlib import blake2b

_DIGEST_BYTES = 16


def salted_root(cache_salt: str | None) -> bytes:
    """What the first block's hash is chained to: requests with other salts share nothing."""
    return blake2b((cache_salt or "").encode(), digest_size=_DIGEST_BYTES).digest()


def chained_hash(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """Hash of these tokens after everything that `parent` stands for.

    Raises OverflowError for an id outside of 32 bits.
    """
    return blake2b(parent + array("I", token_ids).tobytes(), digest_size=_DIGEST_BYTES).digest()


class BlockPool:
    """The blocks of one engine."""

    def __init__(self, blocks_total: int) -> None:
        self.blocks_total = blocks_total
        self._references = [0] * blocks_total
        self._content: list[bytes | None] = [None] * blocks_total
        self._by_content: dict[bytes, int] = {}
        self._changed: dict[bytes, bool] = {}
        """By content that came or went: whether it could be found before."""
        # Ordered from the next to be handed out to the last.
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(blocks_total))

    @property
    def free_blocks(self) -> int:
        return len(self._free)

    @property
    def used_blocks(self) -> int:
        return self.blocks_total - len(self._free)

    def match(self, hashes: Sequence[bytes]) -> list[int]:
        """The blocks with the longest cached prefix of `hashes`. Does not hold them."""
        matched: list[int] = []
        for content in hashes:
            block = self._by_content.get(content)
            if block is None:
                break
            matched.append(block)
        return matched

    def can_hold(self, cached: Sequence[int], new_blocks: int) -> bool:
        """Whether `hold(cached, new_blocks)` has enough free blocks."""
        revived = sum(block in self._free for block in cached)
        return revived + new_blocks <= len(self._free)

    def hold(self, cached: Sequence[int], new_blocks: int) -> list[int]:
        """Hold these cached blocks, and so many with nothing in them; returns all in order."""
        assert self.can_hold(cached, new_blocks), "held more blocks than are free"
        for block in cached:
            self._references[block] += 1
            self._free.pop(block, None)
        return [*cached, *(self._take() for _ in range(new_blocks))]

    def publish(self, block: int, content: bytes) -> bool:
        """Make a held block findable by its content. The first block of a content stays it; says
        whether this one is."""
        assert self._references[block] > 0, "published a block that no one holds"
        if content in self._by_content:
            return False
        self._by_content[content] = block
        self._content[block] = content
        self._changed.setdefault(content, False)
        return True

    def release(self, blocks: Sequence[int]) -> None:
        """Let go of blocks in a sequence's order."""
        # A sequence's tail is of use only behind its head, so it has to be freed, and evicted,
        # first.
        for block in reversed(blocks):
            assert self._references[block] > 0, "released a block that no one holds"
            self._references[block] -= 1
            if self._references[block] == 0:
                self._free[block] = None
                if self._content[block] is None:
                    self._free.move_to_end(block, last=False)

    def take_changes(self) -> tuple[list[bytes], list[bytes]]:
        """Contents that can't be found any more, and those that can be now, since the last call."""
        changed, self._changed = self._changed, {}
        found = self._by_content
        return (
            [content for content, before in changed.items() if before and content not in found],
            [content for content, before in changed.items() if not before and content in found],
        )

    def check_integrity(self, holders: Mapping[int, int]) -> None:
        """Assert that the counts are those of `holders` (by block) and all else is free."""
        for block, references in enumerate(self._references):
            assert references == holders.get(block, 0), f"block {block}: {references} references"
            assert (references == 0) == (block in self._free), f"block {block} is on no list"
            content = self._content[block]
            assert content is None or self._by_content[content] == block
        assert len(self._by_content) == sum(content is not None for content in self._content)

    def _take(self) -> int:
        block, _ = self._free.popitem(last=False)
        content = self._content[block]
        if content is not None:
            del self._by_content[content]
            self._changed.setdefault(content, True)
            self._content[block] = None
        self._references[block] = 1
        return block
