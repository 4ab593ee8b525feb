"""What one attached router is to be told of the engine's prefix cache: a snapshot, then changes.

Nothing is kept for a router but how far it has got; one that reads slowly gets several changes as
one, or begins again with a snapshot.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from kvstore.index_report import CacheReports
from protos import worker_pb2

PART_ADDRESSES: Final = 16_384
"""Of a snapshot, in one message: 0.5 MB."""


class CacheOutlet:
    """One router's view of the reports. Before the first `ask` there is nothing to tell."""

    def __init__(self, reports: CacheReports) -> None:
        self._reports = reports
        self._asked = False
        self._untold: Sequence[bytes] | None = None
        """Of the snapshot that is being told; None: it is told."""
        self._number: int | None = None
        """The change up to which the router knows, or will with the rest of the snapshot."""

    def ask(self) -> None:
        """Begin with a snapshot, or begin again, after one that is being told."""
        self._asked = True

    @property
    def owes_part(self) -> bool:
        """Whether there is a part of a snapshot to tell."""
        return self._asked or self._untold is not None

    def take_part(self) -> worker_pb2.CacheSnapshot:
        """The next part of the snapshot that is owed."""
        assert self.owes_part, "no part is owed"
        if self._untold is None:
            snapshot = self._reports.snapshot()
            self._asked, self._number, self._untold = False, snapshot.number, snapshot.stored
        part, rest = self._untold[:PART_ADDRESSES], self._untold[PART_ADDRESSES:]
        self._untold = rest or None
        return worker_pb2.CacheSnapshot(number=self._number, held=b"".join(part), more=bool(rest))

    def take_change(self) -> worker_pb2.CacheChange | None:
        """What changed since what was told, if that is whole."""
        if self._number is None or self.owes_part or self._number == self._reports.number:
            return None
        change = self._reports.since(self._number)
        if change is None:
            self.ask()
            return None
        self._number = change.number
        return worker_pb2.CacheChange(
            number=change.number,
            merged=change.merged,
            removed=b"".join(change.removed),
            stored=b"".join(change.stored),
        )
