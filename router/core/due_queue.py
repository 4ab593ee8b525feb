"""Requests in the order in which they are due, and sums of what goes before a time: pure.

Kept sorted in blocks, each with its sum, so that asking what goes before looks at each block and
into one of them, however many wait.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from typing import Final, NamedTuple

from protos.ids import RequestKey

BLOCK_ENTRIES: Final = 256
"""Of the fullest block."""


class Due(NamedTuple):
    """One request's place."""

    due_s: float
    number: int
    """Unique: of those that are due at one time the lower goes first."""
    key: RequestKey
    prefill_s: float


class _Block:
    __slots__ = ("entries", "work_s")

    def __init__(self, entries: list[Due]) -> None:
        self.entries = entries
        self.work_s = sum(each.prefill_s for each in entries)


class DueQueue:
    """Those of one tenant."""

    def __init__(self) -> None:
        self._blocks: list[_Block] = []
        """In order; none is empty."""
        self.work_s = 0.0
        """Of all."""
        self._entries = 0

    def __len__(self) -> int:
        return self._entries

    def add(self, entry: Due) -> None:
        """It takes its place."""
        self._entries += 1
        self.work_s += entry.prefill_s
        if not self._blocks:
            self._blocks.append(_Block([entry]))
            return
        at = min(self._at(entry), len(self._blocks) - 1)
        block = self._blocks[at]
        insort(block.entries, entry)
        block.work_s += entry.prefill_s
        if len(block.entries) > BLOCK_ENTRIES:
            half = len(block.entries) // 2
            self._blocks[at : at + 1] = _Block(block.entries[:half]), _Block(block.entries[half:])

    def remove(self, entry: Due) -> None:
        """One that was added leaves."""
        self._entries -= 1
        self.work_s -= entry.prefill_s
        at = self._at(entry)
        block = self._blocks[at]
        del block.entries[bisect_left(block.entries, entry)]
        block.work_s -= entry.prefill_s
        if not block.entries:
            del self._blocks[at]

    def first(self) -> Due:
        """Who is due first; raises IndexError if nobody is here."""
        return self._blocks[0].entries[0]

    def before(self, due_s: float) -> tuple[float, int]:
        """The prefill seconds of those that are due by then, and how many these are."""
        work_s, count = 0.0, 0
        for block in self._blocks:
            if block.entries[-1].due_s > due_s:
                inside = block.entries[: bisect_right(block.entries, due_s, key=_due_s)]
                return work_s + sum([each.prefill_s for each in inside]), count + len(inside)
            work_s += block.work_s
            count += len(block.entries)
        return work_s, count

    def _at(self, entry: Due) -> int:
        """The block that it belongs to; the number of blocks if it comes after all."""
        return bisect_left(self._blocks, entry, key=_last)


def _due_s(entry: Due) -> float:
    return entry.due_s


def _last(block: _Block) -> Due:
    return block.entries[-1]
