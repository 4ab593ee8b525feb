"""A worker's reports, in order, again, and with some lost."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kvstore.index import KvIndex
from kvstore.index_feed import CacheChange, CacheSnapshot, IndexFeed

A, B, C = b"a", b"b", b"c"


def test_changes_follow_a_snapshot() -> None:
    index = KvIndex(100)
    feed = IndexFeed(index, "w")
    assert not feed.in_step
    assert not feed.change(CacheChange(1, stored=[A]))
    assert index.match([A]) == {}
    feed.begin(CacheSnapshot(7, [A]))
    assert feed.change(CacheChange(8, stored=[B]))
    assert index.match([A, B, C]) == {"w": 2}
    assert feed.change(CacheChange(9, removed=[B], stored=[C]))
    assert index.match([A, B]) == {"w": 1}
    assert feed.change(CacheChange(12, stored=[B], merged=3))
    assert index.match([A, B, C]) == {"w": 3}


def test_a_change_that_comes_again_changes_nothing() -> None:
    index = KvIndex(100)
    feed = IndexFeed(index, "w")
    feed.begin(CacheSnapshot(1, [A]))
    change = CacheChange(2, removed=[A])
    assert feed.change(change)
    assert feed.change(CacheChange(3, stored=[A]))
    assert feed.change(change)
    assert feed.change(CacheChange(1, removed=[A]))
    assert index.match([A]) == {"w": 1}


def test_after_a_gap_nothing_is_known_until_the_next_snapshot() -> None:
    index = KvIndex(100)
    feed, other = IndexFeed(index, "w"), IndexFeed(index, "other")
    for each in (feed, other):
        each.begin(CacheSnapshot(1, [A, B]))
    assert not feed.change(CacheChange(3, removed=[C]))
    assert not feed.in_step
    assert index.match([A, B]) == {"other": 2}
    assert not feed.change(CacheChange(4, stored=[A]))
    feed.begin(CacheSnapshot(5, [A]))
    assert index.match([A, B]) == {"other": 2, "w": 1}
    feed.end()
    assert index.match([A, B]) == {"other": 2}


def test_changes_of_which_a_part_was_taken_before_are_a_gap() -> None:
    """Together they may say nothing of what the part left."""
    feed = IndexFeed(KvIndex(100), "w")
    feed.begin(CacheSnapshot(5, [A]))
    assert not feed.change(CacheChange(6, merged=2))
    assert not feed.in_step


changes = st.lists(
    st.builds(
        CacheChange,
        number=st.just(0),
        removed=st.lists(st.sampled_from([A, B, C])),
        stored=st.lists(st.sampled_from([A, B, C])),
    ),
    max_size=10,
)


@given(changes, st.sets(st.integers(0, 9)))
def test_whatever_is_lost_the_index_is_right_or_knows_nothing(
    told: list[CacheChange], lost: set[int]
) -> None:
    index = KvIndex(100)
    feed = IndexFeed(index, "w")
    feed.begin(CacheSnapshot(0, []))
    held: set[bytes] = set()
    for number, each in enumerate(told):
        held = (held - {*each.removed}) | {*each.stored}
        if number not in lost:
            feed.change(CacheChange(number + 1, each.removed, each.stored))
            seen = {address for address in (A, B, C) if index.match([address])}
            assert seen == (held if feed.in_step else set())
