"""Which worker holds which prefix: pure, in memory, and as fast as a decision needs it.

An entry is a block's content address and, as bits, the workers that hold it. A question walks a
prompt's addresses once, and with them the set of workers that hold all so far. A worker that is
dropped is out of every answer at once; what it held is cleared away with the changes that follow,
at least as much with each as it stores, so that no single one takes long and none is left behind.

Boundary: knows addresses and names. When a worker's report can be trusted is `index_feed`'s
knowledge; what a match is worth is placement's.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from typing import Final

CLEARED_AT_ONCE: Final = 256
"""Entries of dropped workers, at least, with each change: about 0.1 ms."""


class KvIndex:
    """The prefix caches of many workers.

    `entries_limit` bounds the distinct blocks; each takes about 0.2 kB, and 0.05 kB more for each
    worker that holds it.
    """

    def __init__(self, entries_limit: int) -> None:
        self._limit = entries_limit
        self._holders: dict[bytes, int] = {}
        """By address: a bit for each worker that holds it, that of a dropped one included until it
        is cleared away."""
        self._slots: dict[str, int] = {}
        self._names: dict[int, str] = {}
        self._held: dict[int, dict[bytes, None]] = {}
        """Ordered, as sets are not: what is cleared away first must be the same in a replay."""
        self._free_slots: list[int] = []
        self._slots_made = 0
        self._alive = 0
        self._dropped: deque[tuple[int, dict[bytes, None]]] = deque()
        self.left_out = 0
        """Blocks that were reported while there was no room; their prompts match shorter."""

    @property
    def entries(self) -> int:
        """Distinct blocks, those of dropped workers included until they are cleared away."""
        return len(self._holders)

    def blocks_of(self, worker: str) -> int:
        """How many entries say that this worker holds them."""
        slot = self._slots.get(worker)
        return 0 if slot is None else len(self._held[slot])

    def store(self, worker: str, addresses: Iterable[bytes]) -> None:
        """The worker holds these blocks from now on."""
        slot = self._slot(worker)
        bit = 1 << slot
        held, holders = self._held[slot], self._holders
        stored = 0
        for address in addresses:
            before = holders.get(address)
            if before is None:
                if len(holders) >= self._limit:
                    self._clear_away(CLEARED_AT_ONCE)
                # Without room the newest is left out: a prompt's beginning, which came first, is
                # worth more than its end.
                if len(holders) >= self._limit:
                    self.left_out += 1
                    continue
                holders[address] = bit
            elif not before & bit:
                holders[address] = before | bit
            held[address] = None
            stored += 1
        self._clear_away(max(stored, CLEARED_AT_ONCE))

    def remove(self, worker: str, addresses: Iterable[bytes]) -> None:
        """The worker has these blocks no more; what it did not hold is left out."""
        slot = self._slots.get(worker)
        if slot is not None:
            held = self._held[slot]
            for address in addresses:
                if address in held:
                    del held[address]
                    self._take_bit(address, 1 << slot)
        self._clear_away(CLEARED_AT_ONCE)

    def drop(self, worker: str) -> None:
        """The worker is gone, or holds nothing any more, or nobody knows what."""
        slot = self._slots.pop(worker, None)
        if slot is None:
            return
        del self._names[slot]
        self._alive &= ~(1 << slot)
        self._dropped.append((slot, self._held.pop(slot)))

    def match(self, addresses: Sequence[bytes]) -> dict[str, int]:
        """How many blocks of a prompt's beginning each worker holds; without those that hold
        none."""
        holders = self._holders
        left = self._alive
        found: dict[str, int] = {}
        count = 0
        for address in addresses:
            now = left & holders.get(address, 0)
            if now != left:
                self._note(found, left & ~now, count)
                left = now
                if not left:
                    return found
            count += 1
        self._note(found, left, count)
        return found

    def _note(self, found: dict[str, int], bits: int, count: int) -> None:
        if count == 0:
            return
        while bits:
            lowest = bits & -bits
            found[self._names[lowest.bit_length() - 1]] = count
            bits ^= lowest

    def _slot(self, worker: str) -> int:
        slot = self._slots.get(worker)
        if slot is None:
            if self._free_slots:
                slot = self._free_slots.pop()
            else:
                slot = self._slots_made
                self._slots_made += 1
            self._slots[worker] = slot
            self._names[slot] = worker
            self._held[slot] = {}
            self._alive |= 1 << slot
        return slot

    def _take_bit(self, address: bytes, bit: int) -> None:
        rest = self._holders[address] & ~bit
        if rest:
            self._holders[address] = rest
        else:
            del self._holders[address]

    def _clear_away(self, count: int) -> None:
        while self._dropped and count > 0:
            slot, held = self._dropped[0]
            while held and count > 0:
                self._take_bit(held.popitem()[0], 1 << slot)
                count -= 1
            if not held:
                self._dropped.popleft()
                # Only now: a new worker in this slot would hold what the old one did.
                self._free_slots.append(slot)
