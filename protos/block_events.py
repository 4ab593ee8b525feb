"""What an engine says of the blocks in its prefix cache: they came, or they went.

Made in the engine process and carried with its steps; read by `kvstore.engine_blocks`. Hashes are
the engine's own: they name a block in its events, and mean nothing to anybody else.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import msgspec
from msgspec import Struct


class BlocksStored(Struct, array_like=True, frozen=True, gc=False, tag=0):
    """Blocks that follow one another came into the cache, each one copy more of its content."""

    hashes: list[bytes]
    parent: bytes | None
    """The block before the first; None: they begin a prompt."""
    token_ids: Sequence[int]
    """Of all of them, one after another."""
    adapter: str = ""
    cache_salt: str = ""
    """Told with the blocks that begin a prompt."""


class BlocksRemoved(Struct, array_like=True, frozen=True, gc=False, tag=1):
    """One copy of each went."""

    hashes: list[bytes]


class AllBlocksRemoved(Struct, array_like=True, frozen=True, gc=False, tag=2):
    """The cache was emptied."""


BlockEvent: TypeAlias = BlocksStored | BlocksRemoved | AllBlocksRemoved

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(list[BlockEvent])


def encode_block_events(events: Sequence[BlockEvent]) -> bytes:
    """As msgpack."""
    return _encoder.encode(events)


def decode_block_events(payload: bytes) -> list[BlockEvent]:
    """Raises msgspec.DecodeError for anything else."""
    return _decoder.decode(payload)
