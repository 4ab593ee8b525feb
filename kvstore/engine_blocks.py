"""From what an engine says of its own blocks to the content addresses that it holds: pure.

An address stands for one or several engine blocks (say 8 of 16 tokens); it is held while all of
them are. Engines may have several copies of one content, and say so for each.

Boundary: it keeps only what stands for blocks that the engine holds. How a router computes the same
addresses is `content`'s knowledge; who is told of them, `index_report`'s.
"""

from __future__ import annotations

from array import array
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import NamedTuple

from kvstore.content import block_addresses, index_block_tokens, root_address
from protos.block_events import BlockEvent, BlocksRemoved, BlocksStored


class AddressChange(NamedTuple):
    """Addresses that are not held any more, and those that are now, beginnings before ends."""

    removed: list[bytes]
    stored: list[bytes]


class _Begun(NamedTuple):
    """The beginning of an address's blocks."""

    follows: bytes
    """The address before, or the root."""
    tokens: bytes
    """So far, 4 bytes each."""
    members: tuple[bytes, ...]
    """The engine's hashes."""


@dataclass(slots=True)
class _Block:
    """A block that the engine holds. It has `begun`, or an address if it is the last of one, or
    neither: what came before it is not known."""

    copies: int = 0
    begun: _Begun | None = None
    address: bytes | None = None
    members: tuple[bytes, ...] = ()
    """Of the address: the blocks before it."""
    missing: int = 0
    """Of those, how many the engine does not hold."""


class EngineBlocks:
    """What one engine holds."""

    def __init__(self, weights: str, engine_block_tokens: int) -> None:
        self.block_tokens = index_block_tokens(engine_block_tokens)
        """What an address stands for."""
        self._weights = weights
        self._engine_block_tokens = engine_block_tokens
        self._blocks_per_address = self.block_tokens // engine_block_tokens
        self._blocks: dict[bytes, _Block] = {}
        self._ends: dict[bytes, set[bytes]] = {}
        """By member: the last blocks, held, of addresses that need it."""
        self._held: dict[bytes, int] = {}
        """How many last blocks stand for an address: engines may tell apart what it does not."""
        self._changed: dict[bytes, bool] = {}
        """Whether it was held before the events that are being taken."""

    @property
    def held(self) -> Collection[bytes]:
        """Every address, beginnings mostly before ends."""
        return self._held.keys()

    def take(self, events: Iterable[BlockEvent]) -> AddressChange:
        """Follow the engine; returns what that changed altogether."""
        for event in events:
            if isinstance(event, BlocksStored):
                self._store(event)
            elif isinstance(event, BlocksRemoved):
                for engine_hash in event.hashes:
                    self._remove(engine_hash)
            else:
                self._remove_all()
        changed, self._changed = self._changed, {}
        held = self._held
        return AddressChange(
            [address for address, before in changed.items() if before and address not in held],
            [address for address, before in changed.items() if not before and address in held],
        )

    def _store(self, event: BlocksStored) -> None:
        size = self._engine_block_tokens
        assert len(event.token_ids) == size * len(event.hashes), "blocks are of one size"
        content, width = array("I", event.token_ids).tobytes(), 4 * size
        begun = self._beginning(event)
        for index, engine_hash in enumerate(event.hashes):
            block = self._blocks.get(engine_hash)
            if block is None:
                block = self._blocks[engine_hash] = _Block()
                self._came(engine_hash)
            block.copies += 1
            if begun is not None and block.begun is None and block.address is None:
                tokens = content[index * width : (index + 1) * width]
                self._place(block, engine_hash, begun, tokens)
            begun = _after(block)

    def _beginning(self, event: BlocksStored) -> _Begun | None:
        if event.parent is not None:
            before = self._blocks.get(event.parent)
            return None if before is None else _after(before)
        root = root_address(self._weights, event.adapter, event.cache_salt, self.block_tokens)
        return _Begun(root, b"", ())

    def _place(self, block: _Block, engine_hash: bytes, begun: _Begun, tokens: bytes) -> None:
        """Now it is known what came before."""
        tokens = begun.tokens + tokens
        if len(begun.members) + 1 < self._blocks_per_address:
            block.begun = _Begun(begun.follows, tokens, (*begun.members, engine_hash))
            return
        (block.address,) = block_addresses(begun.follows, array("I", tokens), self.block_tokens)
        block.members = begun.members
        for member in begun.members:
            self._ends.setdefault(member, set()).add(engine_hash)
        block.missing = sum(member not in self._blocks for member in begun.members)
        if not block.missing:
            self._hold(block.address)

    def _came(self, engine_hash: bytes) -> None:
        """It completes addresses whose later blocks are still there."""
        for end in self._ends.get(engine_hash, ()):
            block = self._blocks[end]
            block.missing -= 1
            if not block.missing and block.address is not None:
                self._hold(block.address)

    def _remove(self, engine_hash: bytes) -> None:
        block = self._blocks.get(engine_hash)
        if block is None:
            return  # It came with nothing that could be understood.
        block.copies -= 1
        if block.copies:
            return
        del self._blocks[engine_hash]
        if block.address is not None:
            self._forget_members(engine_hash, block)
            if not block.missing:
                self._release(block.address)
        for end in self._ends.get(engine_hash, ()):
            last = self._blocks[end]
            if not last.missing and last.address is not None:
                self._release(last.address)
            last.missing += 1

    def _forget_members(self, engine_hash: bytes, block: _Block) -> None:
        for member in block.members:
            ends = self._ends[member]
            ends.remove(engine_hash)
            if not ends:
                del self._ends[member]

    def _remove_all(self) -> None:
        for address in self._held:
            self._changed.setdefault(address, True)
        self._blocks.clear()
        self._ends.clear()
        self._held.clear()

    def _hold(self, address: bytes) -> None:
        count = self._held.get(address, 0)
        self._held[address] = count + 1
        if not count:
            self._changed.setdefault(address, False)

    def _release(self, address: bytes) -> None:
        count = self._held[address] - 1
        if count:
            self._held[address] = count
        else:
            del self._held[address]
            self._changed.setdefault(address, True)


def _after(block: _Block) -> _Begun | None:
    """What the next block goes on with."""
    return block.begun if block.address is None else _Begun(block.address, b"", ())
