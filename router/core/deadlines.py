"""Which requests have run out of time: pure, ordered by deadline."""

from __future__ import annotations

import heapq

from protos.ids import RequestKey


class Deadlines:
    """Keys by deadline; those of requests that have ended come up too, and are ignored then."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, RequestKey]] = []

    def add(self, deadline_s: float, key: RequestKey) -> None:
        """It must have ended by then."""
        heapq.heappush(self._heap, (deadline_s, key))

    def due(self, now_s: float) -> list[RequestKey]:
        """Take those whose deadline has passed."""
        keys = []
        while self._heap and self._heap[0][0] <= now_s:
            keys.append(heapq.heappop(self._heap)[1])
        return keys
