"""What vLLM's KV cache manager says of its blocks, in Baton's words.

vLLM hands the events of each step to a publisher; this one keeps them until the step's figures take
them along, so they reach the worker with the step and by no socket of their own. Loaded by vLLM in
the engine process.
"""

from __future__ import annotations

from typing import Any

from vllm.distributed.kv_events import (
    AllBlocksCleared,
    BlockRemoved,
    BlockStored,
    EventBatch,
    EventPublisher,
)
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.kv_cache_interface import KVCacheSpecKind

from protos.block_events import AllBlocksRemoved, BlockEvent, BlocksRemoved, BlocksStored

_WHOLE_PREFIX = (
    KVCacheSpecKind.FULL_ATTENTION,
    KVCacheSpecKind.MLA_ATTENTION,
    KVCacheSpecKind.SINK_FULL_ATTENTION,
)
"""Groups whose blocks a prefix needs from its first on."""


class StepBlockEvents(EventPublisher):  # type: ignore[misc]
    """Events since the last `take`, of one group of layers: the first that needs whole prefixes.

    Other groups' blocks (sliding windows, recurrent states) come and go with those. Blocks of that
    group that are not of the engine's size are left out.
    """

    def __init__(self, manager: KVCacheManager, block_tokens: int) -> None:
        super().__init__()
        self._block_tokens = block_tokens
        kinds = [kind for kind, _ in manager.kv_cache_event_metadata]
        self._group = next((n for n, kind in enumerate(kinds) if kind in _WHOLE_PREFIX), None)
        self._medium = manager.block_pool.medium
        self._events: list[BlockEvent] = []

    def publish(self, events: EventBatch) -> None:
        """Called by the scheduler in each step that has events."""
        for event in events.events:
            self._keep(event)

    def shutdown(self) -> None:
        """There is nothing to end."""

    def take(self) -> list[BlockEvent]:
        """What to tell now."""
        events, self._events = self._events, []
        return events

    def _keep(self, event: Any) -> None:
        if isinstance(event, AllBlocksCleared):
            self._events.append(AllBlocksRemoved())
        elif event.medium != self._medium or event.group_idx != self._group:
            return
        elif isinstance(event, BlockRemoved):
            last = self._events[-1] if self._events else None
            if isinstance(last, BlocksRemoved):
                last.hashes.extend(event.block_hashes)
            else:
                self._events.append(BlocksRemoved(list(event.block_hashes)))
        elif (
            isinstance(event, BlockStored)
            and event.block_size == self._block_tokens
            and (stored := _stored(event)) is not None
        ):
            self._events.append(stored)


def _stored(event: BlockStored) -> BlocksStored | None:
    """None if there is more to them than tokens, adapter and salt, or some of them are left out."""
    if len(event.token_ids) != len(event.block_hashes) * event.block_size:
        return None
    adapter = event.lora_name or ""
    # An adapter's name comes first with each block; the salt with a prompt's first block alone.
    others = [key for keys in event.extra_keys or () for key in (keys or ())[bool(adapter) :]]
    salt = others[0] if others else ""
    if len(others) > (event.parent_block_hash is None) or not isinstance(salt, str):
        return None
    return BlocksStored(event.block_hashes, event.parent_block_hash, event.token_ids, adapter, salt)
