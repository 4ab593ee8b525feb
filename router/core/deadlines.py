"""Which requests have run out of time: pure, ordered by deadline."""

from __future__ import annotations

import heapq
from typing import Final

from protos.ids import RequestKey

_FORGOTTEN_KEPT: Final = 64


class Deadlines:
    """Keys by deadline."""

    def __init__(self) -> None:
        self._by_key: dict[RequestKey, float] = {}
        self._heap: list[tuple[float, RequestKey]] = []
        """Also of some that were forgotten, as many as of others at most."""

    def __len__(self) -> int:
        return len(self._heap)

    def add(self, deadline_s: float, key: RequestKey) -> None:
        """It must have ended by then."""
        self._by_key[key] = deadline_s
        heapq.heappush(self._heap, (deadline_s, key))

    def forget(self, key: RequestKey) -> None:
        """It has ended; one without a deadline is ignored."""
        if self._by_key.pop(key, None) is None:
            return
        if len(self._heap) > 2 * len(self._by_key) + _FORGOTTEN_KEPT:
            self._heap = [(deadline_s, key) for key, deadline_s in self._by_key.items()]
            heapq.heapify(self._heap)

    def due(self, now_s: float) -> list[RequestKey]:
        """Take those whose deadline has passed."""
        keys = []
        while self._heap and self._heap[0][0] <= now_s:
            deadline_s, key = heapq.heappop(self._heap)
            if self._by_key.get(key) == deadline_s:
                del self._by_key[key]
                keys.append(key)
        return keys
