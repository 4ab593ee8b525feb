"""Which prompts a router sent where: the guess at engines' caches of peers that are not told.

Blocks by content address stand for the characters that peers compare: equal addresses are equal
beginnings, so no tree is needed. What engines really evict is unknown here. A peer that evicts
drops a prompt's end before its beginning, so whoever has a block has those before it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

from protos.ids import WorkerId
from router.core.workers import Worker

CHARACTERS_PER_TOKEN: Final = 4
"""To read peers' limits, which are in characters."""


class _Entry:
    __slots__ = ("bits", "last")

    def __init__(self, bits: int, last: int) -> None:
        self.bits = bits
        """The workers that it was sent to."""
        self.last = last
        """The one that it was sent to last."""


class SentPrefixes:
    """Blocks, each with the workers that it was sent to."""

    def __init__(self) -> None:
        self._entries: dict[bytes, _Entry] = {}
        self._bits: dict[WorkerId, int] = {}
        self._names: dict[int, WorkerId] = {}
        self._blocks: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def blocks_of(self, worker: WorkerId) -> int:
        """How many it was sent."""
        return self._blocks.get(self._bits.get(worker, 0), 0)

    def send(self, worker: WorkerId, addresses: Iterable[bytes]) -> None:
        """A prompt went there."""
        bit = self._bits.get(worker)
        if bit is None:
            bit = self._bits[worker] = 1 << len(self._bits)
            self._names[bit] = worker
            self._blocks[bit] = 0
        entries = self._entries
        added = 0
        for address in addresses:
            entry = entries.get(address)
            if entry is None:
                entries[address] = _Entry(bit, bit)
                added += 1
            else:
                added += not entry.bits & bit
                entry.bits |= bit
                entry.last = bit
        self._blocks[bit] += added

    def match(self, addresses: Sequence[bytes], workers: Sequence[Worker]) -> dict[WorkerId, int]:
        """How many of a prompt's blocks each of these was sent; without those that were sent
        none."""
        bits = self._bits
        left = sum([bits.get(worker.id, 0) for worker in workers])
        found: dict[WorkerId, int] = {}
        entries = self._entries
        count = 0
        for address in addresses:
            entry = entries.get(address)
            now = left & entry.bits if entry is not None else 0
            if now != left:
                self._note(found, left & ~now, count)
                left = now
            if not left:
                return found
            count += 1
        self._note(found, left, count)
        return found

    def deepest(self, addresses: Sequence[bytes]) -> tuple[int, WorkerId | None]:
        """How many of a prompt's blocks were sent to anyone, and who was sent the last of them
        last."""
        entries = self._entries
        count = 0
        last: _Entry | None = None
        for address in addresses:
            entry = entries.get(address)
            if entry is None:
                break
            last = entry
            count += 1
        return count, None if last is None else self._names[last.last]

    def forget(self, worker: WorkerId, address: bytes) -> None:
        """This worker's part of a block that it was sent."""
        bit = self._bits[worker]
        entry = self._entries[address]
        entry.bits &= ~bit
        self._blocks[bit] -= 1
        if not entry.bits:
            del self._entries[address]
        elif entry.last == bit:
            entry.last = entry.bits & -entry.bits  # Any other: who was before is not kept.

    def drop(self, address: bytes) -> None:
        """A block, whoever was sent it."""
        bits = self._entries.pop(address).bits
        while bits:
            lowest = bits & -bits
            self._blocks[lowest] -= 1
            bits ^= lowest

    def _note(self, found: dict[WorkerId, int], bits: int, count: int) -> None:
        if count == 0:
            return
        while bits:
            lowest = bits & -bits
            found[self._names[lowest]] = count
            bits ^= lowest
