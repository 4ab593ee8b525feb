"""Which prompts' blocks workers will hold once they have computed what waits there: pure.

Beside the KV index, which knows what is there by now. Prompts of one worker may share blocks; a
block counts until the last of them is computed, or will not be.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Final

from kvstore.index import KvIndex
from protos.ids import WorkerId

_ENTRIES: Final = 1_000_000


class Ahead:
    """Blocks by worker."""

    def __init__(self) -> None:
        self._index = KvIndex(_ENTRIES)
        self._waiting: dict[WorkerId, Counter[bytes]] = {}
        """How many prompts that wait at a worker have a block."""

    def store(self, worker: WorkerId, addresses: Sequence[bytes]) -> None:
        """A prompt waits there."""
        self._waiting.setdefault(worker, Counter()).update(addresses)
        self._index.store(worker, addresses)

    def remove(self, worker: WorkerId, addresses: Sequence[bytes]) -> None:
        """A prompt that waited there does not any more."""
        waiting = self._waiting[worker]
        over = []
        for address in addresses:
            waiting[address] -= 1
            if not waiting[address]:
                del waiting[address]
                over.append(address)
        self._index.remove(worker, over)

    def drop(self, worker: WorkerId) -> None:
        """Nothing waits there, and nothing will."""
        self._waiting.pop(worker, None)
        self._index.drop(worker)

    def match(self, addresses: Sequence[bytes]) -> dict[str, int]:
        """How many blocks of a prompt's beginning each worker will hold."""
        return self._index.match(addresses)
