"""What a worker tells of its prefix cache, in order or not at all: pure.

A worker numbers its changes. Each link begins with a snapshot; a change that does not follow the
one before means that something was lost, and then nothing that is known of this worker can be
trusted: it is out of the index until the next snapshot, which is to be asked for.
"""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import Struct

from kvstore.index import KvIndex


class CacheSnapshot(Struct, frozen=True, tag=True):
    """All that a worker holds; changes go on after `number`."""

    number: int
    stored: Sequence[bytes]


class CacheChange(Struct, frozen=True, tag=True):
    """What changed at a worker; `removed` happened before `stored`."""

    number: int
    removed: Sequence[bytes] = ()
    stored: Sequence[bytes] = ()
    merged: int = 1
    """How many changes it stands for: the last of them has its number."""


class IndexFeed:
    """One worker's part of the index."""

    def __init__(self, index: KvIndex, worker: str) -> None:
        self._index = index
        self._worker = worker
        self._number: int | None = None
        """Of the last change that was taken; None while a snapshot is missing."""

    @property
    def in_step(self) -> bool:
        """Whether the index knows what this worker holds."""
        return self._number is not None

    def begin(self, snapshot: CacheSnapshot) -> None:
        """Takes the place of all that was known."""
        self._index.drop(self._worker)
        self._index.store(self._worker, snapshot.stored)
        self._number = snapshot.number

    def change(self, change: CacheChange) -> bool:
        """Whether it could be taken; if not, ask for a snapshot. One that was taken before, or is
        older than the snapshot, changes nothing."""
        if self._number is None:
            return False
        if change.number <= self._number:
            return True
        if change.number - change.merged != self._number:
            self.end()
            return False
        self._number = change.number
        if change.removed:
            self._index.remove(self._worker, change.removed)
        if change.stored:
            self._index.store(self._worker, change.stored)
        return True

    def end(self) -> None:
        """The worker is dead, or its link is."""
        self._number = None
        self._index.drop(self._worker)
