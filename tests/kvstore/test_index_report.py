"""A worker's reports, read at any pace, against what it holds."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kvstore.content import block_addresses, root_address
from kvstore.engine_blocks import EngineBlocks
from kvstore.index import KvIndex
from kvstore.index_feed import CacheChange, CacheSnapshot, IndexFeed
from kvstore.index_report import CacheReports
from protos.block_events import AllBlocksRemoved, BlockEvent, BlocksRemoved, BlocksStored


def block(number: int) -> BlocksStored:
    """One that begins a prompt."""
    return BlocksStored([bytes([number])], None, [number] * 128)


def address(number: int) -> bytes:
    return block_addresses(root_address("m", "", "", 128), [number] * 128, 128)[0]


def gone(number: int) -> BlocksRemoved:
    return BlocksRemoved([bytes([number])])


def test_numbers_count_changes_and_not_steps() -> None:
    reports = CacheReports(EngineBlocks("m", 128))
    assert reports.snapshot() == CacheSnapshot(0, ())
    assert reports.take([block(1)])
    assert not reports.take([])
    assert not reports.take([block(1)])  # Another copy.
    assert reports.take([block(2)])
    assert reports.since(1) == CacheChange(2, [], [address(2)])
    assert reports.snapshot() == CacheSnapshot(2, (address(1), address(2)))


def test_several_changes_go_as_one_without_what_came_and_went() -> None:
    reports = CacheReports(EngineBlocks("m", 128))
    for events in ([block(1)], [block(2)], [gone(1), block(3)], [gone(2), block(1)]):
        reports.take(events)
    assert reports.since(1) == CacheChange(4, [], [address(3)], merged=3)
    assert reports.since(0) == CacheChange(4, [], [address(3), address(1)], merged=4)


def test_who_is_too_far_behind_begins_again() -> None:
    reports = CacheReports(EngineBlocks("m", 128), kept_addresses=3)
    for number in range(5):
        reports.take([block(number)])
    assert reports.since(1) is None
    assert reports.since(2) == CacheChange(5, [], [address(n) for n in (2, 3, 4)], merged=3)
    reports.take([AllBlocksRemoved()])  # More than may be kept, by itself.
    assert reports.since(5) is None
    assert reports.snapshot() == CacheSnapshot(6, ())


events = st.one_of(
    st.integers(0, 5).map(block), st.integers(0, 5).map(gone), st.just(AllBlocksRemoved())
)


@given(st.lists(st.tuples(st.lists(events, max_size=4), st.booleans()), max_size=30))
def test_a_router_that_reads_at_any_pace_knows_what_is_held(
    steps: list[tuple[list[BlockEvent], bool]],
) -> None:
    blocks = EngineBlocks("m", 128)
    reports = CacheReports(blocks, kept_addresses=8)
    index = KvIndex(100)
    feed = IndexFeed(index, "w")
    feed.begin(reports.snapshot())
    read = reports.number
    for told, reads in steps:
        reports.take(told)
        if reads and read != reports.number:
            change = reports.since(read)
            if change is None:
                feed.begin(reports.snapshot())
            else:
                assert feed.change(change)
            read = reports.number
            held = {number for number in range(6) if index.match([address(number)])}
            assert {address(number) for number in held} == {*blocks.held}
