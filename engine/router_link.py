"""What a worker has to say to one attached router: which attempts have news, the load, and what its
prefix cache holds.

The outputs themselves stay with their attempts, what changed in the cache with its reports. So a
router that reads slowly, or not at all, takes no memory beyond what is kept for it anyway, and
nobody else waits for it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from typing import Final

from engine.attempts import Attempt
from engine.cache_outlet import CacheOutlet
from engine.outputs import Output, StepColumns
from kvstore.index_report import CacheReports
from protos import worker_pb2

PAUSE_PER_OUTPUT_S: Final = 0.0002
LONGEST_PAUSE_S: Final = 0.02
"""After a message there is a pause, the longer the more outputs it had: some 5,000 events a second
are enough from one worker. What engines make meanwhile goes out together, several tokens to an
event; with few streams, or steps of usual length, no token waits. Begun streams alone pause."""
FULL_MESSAGE_BYTES: Final = 1024 * 1024
"""Outputs that wait together go out together, until they make up as much as this."""


class RouterLink:
    """An attached router: what waits to be sent to it."""

    def __init__(self, router_id: str, incarnation: int, cache: CacheReports) -> None:
        self.router_id = router_id
        self.incarnation = incarnation
        self._cache = CacheOutlet(cache)
        self._begun: dict[str, Attempt] = {}
        """By the engine's id: attempts with outputs that were not sent."""
        self._new: dict[str, Attempt] = {}
        """Those of which a router that waits for them has got nothing yet: they go first."""
        self._pause: asyncio.TimerHandle | None = None
        """Until it is over, only new ones go out."""
        self._refusals: list[Output] = []
        self._load: worker_pb2.Load | None = None
        self._metrics: worker_pb2.Metrics | None = None
        self._learned: dict[str, worker_pb2.Learned] = {}
        """By the router that learned it: the newest."""
        self._wake = asyncio.Event()
        self._closed = False

    def put(
        self,
        load: worker_pb2.Load,
        attempts: Iterable[Attempt] = (),
        metrics: worker_pb2.Metrics | None = None,
    ) -> None:
        """These have new outputs, and this is the load; what is told together goes out together."""
        for attempt in attempts:
            if attempt.sent_outputs or attempt.engine_id in self._begun:
                self._begun[attempt.engine_id] = attempt
            else:
                self._new[attempt.engine_id] = attempt
        self._load = load
        self._metrics = metrics or self._metrics
        if self._new or self._pause is None:
            self._wake.set()

    def refuse(self, refusal: Output, load: worker_pb2.Load) -> None:
        """Answer a submission of which nothing is kept."""
        self._refusals.append(refusal)
        self.put(load)
        self._wake.set()

    def ask_cache(self) -> None:
        """Tell it all that the prefix cache holds, and from then on what changes."""
        self._cache.ask()
        self._wake.set()

    def pass_on(self, learned: worker_pb2.Learned) -> None:
        """Tell it what another router has learned."""
        self._learned[learned.router_id] = learned
        self._wake.set()

    def drop(self, engine_id: str) -> None:
        """The router has all it needs of this attempt."""
        self._begun.pop(engine_id, None)
        self._new.pop(engine_id, None)

    def close(self) -> None:
        """End the stream to this router."""
        self._closed = True
        self._wake.set()

    async def messages(self) -> AsyncIterator[worker_pb2.WorkerMessage]:
        """What to send, until closed."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            # Looked at before every message: once closed, the attempts go out on another link.
            if not self._closed and self._metrics is not None:
                metrics, self._metrics = self._metrics, None
                yield worker_pb2.WorkerMessage(metrics=metrics)
            while not self._closed and self._learned:
                _, learned = self._learned.popitem()
                yield worker_pb2.WorkerMessage(learned=learned)
            if not self._closed and self._cache.owes_part:
                # One at a time: tokens don't wait for all of them.
                yield worker_pb2.WorkerMessage(cache_snapshot=self._cache.take_part())
            if not self._closed and self._load is not None:
                columns = self._next_step()
                load = self._load
                if not (self._new or self._begun):
                    self._load = None
                step = columns.message(load, self._cache.take_change())
                yield worker_pb2.WorkerMessage(step=step)
            if self._closed:
                return
            if self._new or (self._begun and self._pause is None) or self._cache.owes_part:
                self._wake.set()

    def _next_step(self) -> StepColumns:
        """What may go now, the oldest first, as much as a message may hold."""
        columns = StepColumns()
        for refusal in self._refusals:
            columns.add(refusal)
        self._refusals = []
        _fill(columns, self._new)
        if self._pause is None:
            _fill(columns, self._begun)
            if len(columns) and columns.size_bytes < FULL_MESSAGE_BYTES:
                pause_s = min(LONGEST_PAUSE_S, PAUSE_PER_OUTPUT_S * len(columns))
                self._pause = asyncio.get_running_loop().call_later(pause_s, self._end_pause)
        return columns

    def _end_pause(self) -> None:
        self._pause = None
        if self._begun or self._load is not None:
            self._wake.set()


def _fill(columns: StepColumns, waiting: dict[str, Attempt]) -> None:
    while waiting and columns.size_bytes < FULL_MESSAGE_BYTES:
        engine_id, attempt = next(iter(waiting.items()))
        del waiting[engine_id]
        for output in attempt.take_unsent():
            columns.add(output)
            if columns.size_bytes >= FULL_MESSAGE_BYTES:
                break
        if attempt.has_unsent:
            waiting[engine_id] = attempt  # Behind the others.
