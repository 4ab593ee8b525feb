"""What workers say of their prefix caches, as the core takes it."""

from __future__ import annotations

import pytest

from kvstore.index_feed import CacheChange, CacheSnapshot
from protos.ids import Incarnation, WorkerId
from router.core.events import AskCache, CacheReported
from tests.router.core.driving import Drive

A, B = b"a", b"b"


@pytest.fixture
def drive() -> Drive:
    drive = Drive()
    drive.members(("d", "decode"))
    drive.up("d")
    return drive


def report(drive: Drive, told: CacheSnapshot | CacheChange, incarnation: int = 1) -> list[object]:
    return drive.feed(CacheReported(WorkerId("d"), Incarnation(incarnation), told))


def held(drive: Drive) -> dict[str, int]:
    return drive.core.moves.index.match([A, B])


def test_a_snapshot_and_changes_in_order(drive: Drive) -> None:
    assert report(drive, CacheSnapshot(5, [A])) == []
    assert report(drive, CacheChange(6, stored=[B])) == []
    assert held(drive) == {"d": 2}
    assert report(drive, CacheChange(7, removed=[B])) == []
    assert held(drive) == {"d": 1}


def test_before_a_snapshot_nothing_is_known_and_nothing_is_asked(drive: Drive) -> None:
    assert report(drive, CacheChange(1, stored=[A])) == []
    assert held(drive) == {}


def test_a_gap_asks_once_and_trusts_nothing_until_the_snapshot(drive: Drive) -> None:
    report(drive, CacheSnapshot(0, [A]))
    assert report(drive, CacheChange(2, stored=[B])) == [AskCache(WorkerId("d"))]
    assert report(drive, CacheChange(3)) == []
    assert held(drive) == {}
    report(drive, CacheSnapshot(3, [A, B]))
    assert held(drive) == {"d": 2}
    report(drive, CacheChange(6, removed=[B], merged=3))
    counts = drive.core.moves.counts
    assert (counts.cache_snapshots, counts.cache_changes, counts.cache_gaps) == (2, 3, 1)


def test_a_worker_whose_link_breaks_or_that_dies_drops_out_at_once(drive: Drive) -> None:
    report(drive, CacheSnapshot(0, [A]))
    drive.broken("d")
    assert held(drive) == {}
    drive.up("d")
    report(drive, CacheSnapshot(0, [A]))
    drive.dead("d")
    assert held(drive) == {}


def test_another_incarnations_words_are_not_heard(drive: Drive) -> None:
    report(drive, CacheSnapshot(0, [A]))
    drive.up("d", incarnation=2)
    report(drive, CacheSnapshot(0, [A]), incarnation=1)
    assert held(drive) == {}
