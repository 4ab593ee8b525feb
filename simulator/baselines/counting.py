"""What a router knows of its own doing: which requests are where, and how much of them is left.

A prompt that is computed on a worker of its own counts there until its first token; what generates
counts from placing to end. Nothing here looks at the pool, so a worker that vanished does no harm:
its counts go down as its requests end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from protos.ids import RequestKey, WorkerId
from router.core.workers import Worker


@dataclass(slots=True)
class WorkerCount:
    """What was put on one worker and is not over."""

    in_flight: int = 0
    """Requests, each once, whatever of it runs here."""
    uncached_tokens: int = 0
    """To be computed here, of the prompts that have no first token yet."""
    prefill_ns: int = 0
    """Predicted for these. An integer, so that it returns to zero."""
    context_tokens: int = 0
    """Of the requests in flight: the prompt, and what was generated when it was placed."""


_NOTHING: Final = WorkerCount()


@dataclass(slots=True)
class _Placed:
    prompt_on: WorkerId | None
    """Until the first token."""
    decode_on: WorkerId | None
    context_tokens: int
    uncached_tokens: int
    prefill_ns: int


class Counts:
    """Requests by key, and their sums by worker."""

    def __init__(self) -> None:
        self._workers: dict[WorkerId, WorkerCount] = {}
        self._requests: dict[RequestKey, _Placed] = {}

    def at(self, worker: WorkerId) -> WorkerCount:
        """To be read only: one stands for all workers that were given nothing."""
        return self._workers.get(worker, _NOTHING)

    def in_flight(self, worker: WorkerId) -> int:
        """Requests on this worker."""
        return self._workers.get(worker, _NOTHING).in_flight

    @property
    def idle(self) -> bool:
        """Nothing is counted anywhere."""
        return not self._requests and all(each == _NOTHING for each in self._workers.values())

    def add(
        self,
        key: RequestKey,
        prompt_on: WorkerId | None,
        decode_on: WorkerId | None,
        context_tokens: int,
        uncached_tokens: int = 0,
        prefill_ns: int = 0,
    ) -> None:
        """A request is placed. On one worker as a whole, both are the same."""
        placed = _Placed(prompt_on, decode_on, context_tokens, uncached_tokens, prefill_ns)
        self._requests[key] = placed
        if prompt_on is not None:
            there = self._of(prompt_on)
            there.in_flight += 1
            there.context_tokens += context_tokens
            there.uncached_tokens += uncached_tokens
            there.prefill_ns += prefill_ns
        if decode_on is not None and decode_on != prompt_on:
            there = self._of(decode_on)
            there.in_flight += 1
            there.context_tokens += context_tokens

    def first_token(self, key: RequestKey) -> None:
        """Its prompt is computed; again or unknown: nothing happens."""
        placed = self._requests.get(key)
        if placed is None or placed.prompt_on is None:
            return
        there = self._workers[placed.prompt_on]
        there.uncached_tokens -= placed.uncached_tokens
        there.prefill_ns -= placed.prefill_ns
        if placed.prompt_on != placed.decode_on:
            there.in_flight -= 1
            there.context_tokens -= placed.context_tokens
        placed.prompt_on = None

    def ended(self, key: RequestKey) -> WorkerId | None:
        """It is nowhere any more; returns where it generated, if it is known and did."""
        self.first_token(key)
        placed = self._requests.pop(key, None)
        if placed is None or placed.decode_on is None:
            return None
        there = self._workers[placed.decode_on]
        there.in_flight -= 1
        there.context_tokens -= placed.context_tokens
        return placed.decode_on

    def _of(self, worker: WorkerId) -> WorkerCount:
        count = self._workers.get(worker)
        if count is None:
            count = self._workers[worker] = WorkerCount()
        return count


@dataclass(slots=True)
class _Blocks:
    requests: dict[bytes, int] = field(default_factory=dict)
    """By address, how many requests share the block."""
    unshared: int = 0


@dataclass(slots=True)
class _Held:
    worker: WorkerId
    addresses: Sequence[bytes]
    unshared: int


class LiveBlocks:
    """Distinct prompt blocks of the requests that are live on each worker."""

    def __init__(self) -> None:
        self._workers: dict[WorkerId, _Blocks] = {}
        self._requests: dict[RequestKey, _Held] = {}

    @property
    def idle(self) -> bool:
        """Nothing is counted anywhere."""
        return not self._requests and not any(
            each.requests or each.unshared for each in self._workers.values()
        )

    def add(
        self, key: RequestKey, worker: WorkerId, addresses: Sequence[bytes], unshared_blocks: int
    ) -> None:
        """A request is placed: with blocks that others may have too, and with its own."""
        self._requests[key] = _Held(worker, addresses, unshared_blocks)
        blocks = self._workers.setdefault(worker, _Blocks())
        requests = blocks.requests
        for address in addresses:
            requests[address] = requests.get(address, 0) + 1
        blocks.unshared += unshared_blocks

    def ended(self, key: RequestKey) -> None:
        """Its blocks are not live any more, where no other request has them."""
        held = self._requests.pop(key, None)
        if held is None:
            return
        blocks = self._workers[held.worker]
        requests = blocks.requests
        for address in held.addresses:
            if requests[address] == 1:
                del requests[address]
            else:
                requests[address] -= 1
        blocks.unshared -= held.unshared

    def on_each(self, workers: Sequence[Worker], own_blocks: int = 0) -> list[int]:
        """How many are live on each, with so many of one more request."""
        return [
            own_blocks
            if (blocks := self._workers.get(worker.id)) is None
            else own_blocks + len(blocks.requests) + blocks.unshared
            for worker in workers
        ]

    def shared_with_each(self, workers: Sequence[Worker], addresses: Sequence[bytes]) -> list[int]:
        """How many of a prompt's blocks are live on each."""
        if not addresses:
            return [0] * len(workers)
        first = addresses[0]
        shared = []
        for worker in workers:
            blocks = self._workers.get(worker.id)
            if blocks is None or first not in blocks.requests:
                shared.append(0)
                continue
            # Each request holds its prompt's beginning, so the end of the match can be bisected.
            requests = blocks.requests
            low, high = 1, len(addresses)
            while low < high:
                middle = (low + high) // 2
                if addresses[middle] in requests:
                    low = middle + 1
                else:
                    high = middle
            shared.append(low)
        return shared
