"""What KV blocks hold, as content addresses: equal addresses are equal tokens after equal tokens.

An address is a BLAKE2b digest of 32 bytes over the address before it and the block's token ids.
The first one follows a root that names all else that the KV depends on, so other weights, adapters,
tenants or block sizes share no address, and nobody can make two prompts meet in one.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from hashlib import blake2b
from typing import Final

ADDRESS_BYTES: Final = 32
LEAST_INDEX_BLOCK_TOKENS: Final = 128


def index_block_tokens(engine_block_tokens: int) -> int:
    """What one address stands for: whole engine blocks, and few addresses for a long prompt."""
    return -(-LEAST_INDEX_BLOCK_TOKENS // engine_block_tokens) * engine_block_tokens


def root_address(weights: str, adapter: str, salt: str, block_tokens: int) -> bytes:
    """What the first block's address follows. `weights` is a digest of them (`engine.weights`)."""
    return _digest(b"baton-kv-root", weights, adapter, salt, str(block_tokens))


def tenant_salt(tenant: str, client_salt: str) -> str:
    """For a tenant's own use: whatever salt a client gives, it gets no other tenant's."""
    return _digest(b"baton-kv-tenant", tenant, client_salt).hex()


def _digest(purpose: bytes, *parts: str) -> bytes:
    digest = blake2b(digest_size=ADDRESS_BYTES, person=purpose)
    for part in parts:
        content = part.encode()
        # With its length before it, a part can't pass for the end of another.
        digest.update(len(content).to_bytes(8, "little") + content)
    return digest.digest()


def block_addresses(root: bytes, token_ids: Sequence[int], block_tokens: int) -> list[bytes]:
    """One for each whole block; tokens after the last are left out.

    Raises OverflowError for an id outside of 32 bits.
    """
    content = memoryview(array("I", token_ids).tobytes())
    width = 4 * block_tokens
    addresses = []
    parent = root
    for start in range(0, len(content) - width + 1, width):
        digest = blake2b(parent, digest_size=ADDRESS_BYTES)
        digest.update(content[start : start + width])
        parent = digest.digest()
        addresses.append(parent)
    return addresses
