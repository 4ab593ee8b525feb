"""What a worker says of its prefix cache: the other end of `index_feed`. Pure.

Each change has a number. Changes are kept for a while, so that one who listens slowly gets several
as one; who is further behind than that begins again with a snapshot.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from itertools import islice
from typing import Final

from kvstore.engine_blocks import EngineBlocks
from kvstore.index_feed import CacheChange, CacheSnapshot
from protos.block_events import BlockEvent

KEPT_ADDRESSES: Final = 65_536
"""In kept changes; some 6 MB."""


class CacheReports:
    """One engine's prefix cache, as routers are told of it."""

    def __init__(self, blocks: EngineBlocks, kept_addresses: int = KEPT_ADDRESSES) -> None:
        self._blocks = blocks
        self._kept_limit = kept_addresses
        self._kept: deque[CacheChange] = deque()
        self._kept_addresses = 0
        self.number = 0
        """Of the latest change."""

    @property
    def block_tokens(self) -> int:
        """What an address stands for."""
        return self._blocks.block_tokens

    def take(self, events: Iterable[BlockEvent]) -> bool:
        """Follow the engine; whether there is a new change."""
        removed, stored = self._blocks.take(events)
        if not removed and not stored:
            return False
        self.number += 1
        self._kept.append(CacheChange(self.number, removed, stored))
        self._kept_addresses += len(removed) + len(stored)
        while self._kept_addresses > self._kept_limit:
            oldest = self._kept.popleft()
            self._kept_addresses -= len(oldest.removed) + len(oldest.stored)
        return True

    def snapshot(self) -> CacheSnapshot:
        """All that is held now."""
        return CacheSnapshot(self.number, tuple(self._blocks.held))

    def since(self, number: int) -> CacheChange | None:
        """What changed after `number`, which is not the latest, as one; None: it was too much to
        keep."""
        count = self.number - number
        assert count > 0, "nothing changed since"
        if count > len(self._kept):
            return None
        return _merged(list(islice(self._kept, len(self._kept) - count, None)))


def _merged(changes: list[CacheChange]) -> CacheChange:
    if len(changes) == 1:
        return changes[0]
    removed: dict[bytes, None] = {}
    stored: dict[bytes, None] = {}
    for change in changes:
        for address in change.removed:
            if address in stored:
                del stored[address]
            else:
                removed[address] = None
        for address in change.stored:
            if address in removed:
                del removed[address]
            else:
                stored[address] = None
    return CacheChange(changes[-1].number, list(removed), list(stored), merged=len(changes))
