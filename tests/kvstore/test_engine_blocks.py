"""An engine's block events against a model that looks at all it holds, each time."""

from __future__ import annotations

from collections import Counter
from hashlib import blake2b

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.content import block_addresses, index_block_tokens, root_address
from kvstore.engine_blocks import AddressChange, EngineBlocks
from protos.block_events import (
    AllBlocksRemoved,
    BlockEvent,
    BlocksRemoved,
    BlocksStored,
    decode_block_events,
    encode_block_events,
)

MODEL = "the model"
BLOCK_SIZES = (16, 48, 128)


def engine_hash(salt: str, tokens: list[int]) -> bytes:
    return blake2b(repr((salt, tokens)).encode(), digest_size=16).digest()


def stored(size: int, tokens: list[int], first: int = 0, salt: str = "") -> BlocksStored:
    """The event of a prompt's whole blocks from the `first` on."""
    ends = range((first + 1) * size, len(tokens) + 1, size)
    parent = engine_hash(salt, tokens[: first * size]) if first else None
    hashes = [engine_hash(salt, tokens[:end]) for end in ends]
    told_salt = "" if first else salt
    return BlocksStored(hashes, parent, tokens[first * size : ends[-1]], cache_salt=told_salt)


def addresses(size: int, tokens: list[int], salt: str = "") -> list[bytes]:
    """As a router makes them of a request."""
    whole = index_block_tokens(size)
    return block_addresses(root_address(MODEL, "", salt, whole), tokens, whole)


class Engine:
    """Copies of blocks, by their salt and all tokens up to their end."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.copies: Counter[tuple[str, tuple[int, ...]]] = Counter()

    def run(self, salt: str, tokens: list[int], reuse: int) -> BlocksStored | None:
        """Compute a prompt, after at most `reuse` blocks of it that are cached."""
        blocks = [(salt, tuple(tokens[:end])) for end in self._ends(tokens)]
        first = 0
        while first < min(reuse, len(blocks)) and blocks[first] in self.copies:
            first += 1
        # It holds what it reuses, so what is stored follows what is there.
        self.copies.update(blocks[first:])
        return stored(self.size, tokens, first, salt) if blocks[first:] else None

    def evict(self, choice: int) -> BlocksRemoved | None:
        """One copy of any block."""
        if not self.copies:
            return None
        salt, tokens = block = sorted(self.copies)[choice % len(self.copies)]
        self.copies[block] -= 1
        self.copies += Counter()
        return BlocksRemoved([engine_hash(salt, list(tokens))])

    def clear(self) -> AllBlocksRemoved:
        self.copies.clear()
        return AllBlocksRemoved()

    def addresses(self) -> set[bytes]:
        """Those all of whose blocks are there."""
        whole = index_block_tokens(self.size)
        return {
            addresses(self.size, list(tokens), salt)[-1]
            for salt, tokens in self.copies
            if len(tokens) % whole == 0
            and all(
                (salt, tokens[:end]) in self.copies for end in self._ends(tokens)[-self._each :]
            )
        }

    @property
    def _each(self) -> int:
        return index_block_tokens(self.size) // self.size

    def _ends(self, tokens: list[int] | tuple[int, ...]) -> range:
        return range(self.size, len(tokens) + 1, self.size)


runs = st.tuples(
    st.sampled_from(["", "tenant"]),
    st.lists(st.integers(0, 1), min_size=1, max_size=20),
    st.integers(0, 20),
)
turns = st.lists(st.one_of(runs, st.integers(0, 1000), st.none()), min_size=1, max_size=30)


@pytest.mark.parametrize("size", BLOCK_SIZES)
@given(steps=st.lists(turns, max_size=6))
@settings(deadline=None, max_examples=60)
def test_what_is_said_is_what_the_engine_holds(
    size: int, steps: list[list[tuple[str, list[int], int] | int | None]]
) -> None:
    engine, blocks = Engine(size), EngineBlocks(MODEL, size)
    told: set[bytes] = set()
    for step in steps:
        events: list[BlockEvent | None] = []
        for turn in step:
            if turn is None:
                events.append(engine.clear())
            elif isinstance(turn, int):
                events.append(engine.evict(turn))
            else:
                salt, contents, reuse = turn
                tokens = [content for content in contents for _ in range(size)]
                events.append(engine.run(salt, tokens, reuse))
        change = blocks.take(event for event in events if event is not None)
        assert told.issuperset(change.removed)
        assert told.isdisjoint(change.stored)
        told = (told - {*change.removed}) | {*change.stored}
        assert told == engine.addresses() == {*blocks.held}
        assert_bounded(blocks, engine)


def assert_bounded(blocks: EngineBlocks, engine: Engine) -> None:
    """It keeps nothing for a block that the engine does not hold, or that no other waits for."""
    assert len(blocks._blocks) == len(engine.copies)
    needed = {member for block in blocks._blocks.values() for member in block.members}
    assert blocks._ends.keys() == needed
    assert not blocks._changed


@pytest.mark.parametrize("size", BLOCK_SIZES)
def test_a_prompts_whole_blocks_have_the_addresses_that_a_router_makes(size: int) -> None:
    tokens = list(range(700))
    blocks = EngineBlocks(MODEL, size)
    wanted = addresses(size, tokens)
    assert blocks.block_tokens == {16: 128, 48: 144, 128: 128}[size]
    assert blocks.take([stored(size, tokens)]) == AddressChange([], wanted)
    assert blocks.take([stored(size, tokens)]) == AddressChange([], [])
    assert list(blocks.held) == wanted


def test_an_address_comes_with_its_last_block_and_goes_with_its_first() -> None:
    tokens, blocks = list(range(256)), EngineBlocks(MODEL, 16)
    first, second = addresses(16, tokens)
    assert blocks.take([stored(16, tokens[:112])]) == AddressChange([], [])
    assert blocks.take([stored(16, tokens[:128], first=7)]) == AddressChange([], [first])
    assert blocks.take([stored(16, tokens, first=8)]) == AddressChange([], [second])
    gone = BlocksRemoved([engine_hash("", tokens[:16])])
    assert blocks.take([gone]) == AddressChange([first], [])
    assert blocks.take([stored(16, tokens[:16])]) == AddressChange([], [first])


def test_salts_and_adapters_share_nothing() -> None:
    tokens, blocks = [7] * 128, EngineBlocks(MODEL, 128)
    plain = stored(128, tokens)
    salted = stored(128, tokens, salt="tenant")
    adapted = BlocksStored([b"adapted"], None, tokens, adapter="tuned")
    assert len(set(blocks.take([plain, salted, adapted]).stored)) == 3
    whole = root_address(MODEL, "tuned", "", 128)
    assert [*blocks.held] == [
        *addresses(128, tokens),
        *addresses(128, tokens, "tenant"),
        *block_addresses(whole, tokens, 128),
    ]


def test_what_follows_an_unknown_block_is_left_out_until_it_is_known() -> None:
    tokens, blocks = list(range(256)), EngineBlocks(MODEL, 128)
    assert blocks.take([stored(128, tokens, first=1)]) == AddressChange([], [])
    assert blocks.take([stored(128, tokens)]) == AddressChange([], addresses(128, tokens))
    second = BlocksRemoved([engine_hash("", tokens)])
    assert blocks.take([second]) == AddressChange([], [])
    assert blocks.take([second]) == AddressChange(addresses(128, tokens)[1:], [])
    assert blocks.take([second]) == AddressChange([], [])


def test_what_comes_and_goes_within_a_step_is_no_change() -> None:
    tokens, blocks = list(range(128)), EngineBlocks(MODEL, 128)
    comes, goes = stored(128, tokens), BlocksRemoved([engine_hash("", tokens)])
    assert blocks.take([comes, goes]) == AddressChange([], [])
    blocks.take([comes])
    assert blocks.take([goes, comes]) == AddressChange([], [])
    assert blocks.take([AllBlocksRemoved(), comes]) == AddressChange([], [])


def test_what_the_engine_alone_tells_apart_is_one_address() -> None:
    """An adapter's name that stands for other files now."""
    blocks = EngineBlocks(MODEL, 128)
    before, after = (BlocksStored([name], None, [1] * 128, "tuned") for name in (b"1", b"2"))
    (address,) = blocks.take([before]).stored
    assert blocks.take([after]) == AddressChange([], [])
    assert blocks.take([BlocksRemoved([b"1"])]) == AddressChange([], [])
    assert blocks.take([BlocksRemoved([b"2"])]) == AddressChange([address], [])


def test_events_survive_the_way_from_the_engines_process() -> None:
    events = [
        BlocksStored([b"1", b"2"], None, [1, 2], "adapter", "salt"),
        BlocksStored([b"3"], b"2", [3]),
        BlocksRemoved([b"1"]),
        AllBlocksRemoved(),
    ]
    assert decode_block_events(encode_block_events(events)) == events
