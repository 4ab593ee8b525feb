"""SGLang's gateway: its thresholds, ties and cuts, by hand-made trees."""

from __future__ import annotations

import pytest

from tests.simulator.peer import Peer, costs, numbers

NAME = "sglang_cache_aware"


def test_a_match_must_exceed_three_tenths() -> None:
    peer = Peer(NAME, "d0 d1")
    assert peer.place("a", "abcdefghij").worker == "d0"
    # 3 of 10 blocks: the fewest in flight.
    assert peer.place("b", "abc" + "x" * 7).worker == "d1"
    decision = peer.place("c", "abcd" + "y" * 6)
    assert decision.worker == "d0"
    assert costs(decision) == {"d0": -0.4, "d1": 1}
    assert numbers(decision, "d0") == {"requests": 1, "matched_share": 0.4, "processed": 1}


def test_the_last_one_to_use_the_deepest_match_is_taken() -> None:
    peer = Peer(NAME, "d0 d1")
    peer.place_on("d0", 1, "abc")
    peer.place_on("d1", 1, "ab")
    assert peer.place("a", "abc").worker == "d0"
    # The blocks a and b were now used by d0 last, though d1 has them too.
    assert peer.place("b", "ab").worker == "d0"
    peer.place_on("d1", 1, "abz")
    assert peer.place("c", "ab").worker == "d1"


@pytest.mark.parametrize(
    ("busy", "idle", "chosen"),
    [
        # More than 64 apart, and more than 1.5 times as many.
        (64, 0, "d0"),
        (65, 0, "d1"),
        (200, 134, "d0"),
        (200, 133, "d1"),
        (195, 130, "d0"),
        (64, 20, "d0"),
    ],
)
def test_out_of_balance_the_fewest_in_flight_are_taken(busy: int, idle: int, chosen: str) -> None:
    peer = Peer(NAME, "d0 d1")
    peer.place_on("d0", busy, "abc")
    peer.place_on("d1", idle, "x")
    assert peer.place("a", "abc").worker == chosen


def test_out_of_balance_the_prompt_is_inserted_all_the_same() -> None:
    peer = Peer(NAME, "d0 d1")
    peer.place_on("d0", 65, "abc")
    assert peer.place("a", "abc").worker == "d1"
    for number in range(65):
        peer.ended(f"d0-abc-{number}")
    assert peer.place("b", "abc").worker == "d1"


def test_equals_by_what_they_processed_then_in_order() -> None:
    peer = Peer(NAME, "d0 d1 d2")
    chosen = []
    for name in "abcd":
        chosen.append(peer.place(name, name).worker)
        peer.ended(name)
    assert chosen == ["d0", "d1", "d2", "d0"]


def test_every_60_seconds_the_oldest_leaves_are_cut() -> None:
    for waited_s, share in ((59, 1.0), (60, 0.75)):
        peer = Peer(NAME, "d0 d1", tree_tokens=30)
        # The first question cuts what there is: nothing.
        peer.place_on("d0", 1, "abcd")
        peer.now_s += waited_s
        decision = peer.place("q", "abcd")
        # Of four blocks three are left to d0: the last one went.
        assert numbers(decision, "d0")["matched_share"] == share


def test_what_was_used_last_is_not_cut() -> None:
    peer = Peer(NAME, "d0 d1", tree_tokens=30)
    peer.place_on("d0", 1, "ab")
    peer.place_on("d0", 1, "xyz")
    peer.place_on("d0", 2, "ab")
    peer.now_s += 60
    assert numbers(peer.place("q", "ab"), "d0")["matched_share"] == 1
    assert costs(peer.place("r", "xyz"))["d0"] == pytest.approx(-1 / 3)


def test_a_last_user_that_is_down_counts_as_no_match() -> None:
    peer = Peer(NAME, "d0 d1 d2")
    peer.place_on("d0", 1, "abc")
    peer.place_on("d1", 1)
    peer.down("d0")
    assert peer.place("a", "abc").worker == "d2"


def test_each_pool_has_its_own_tree() -> None:
    peer = Peer(NAME, "p0 p1 d0 d1")
    first = peer.place("a", "abc")
    assert (first.prefill, first.worker) == ("p0", "d0")
    peer.first_token("a")
    # p1 has processed less, but p0 and d0 have the prefix.
    second = peer.place("b", "abc")
    assert (second.prefill, second.worker) == ("p0", "d0")


def test_power_of_two_for_decode() -> None:
    peer = Peer(NAME, "p0 d0 d1", decode_power_of_two=1)
    first, second = peer.place("a", "abc").worker, peer.place("b", "abc").worker
    assert {first, second} == {"d0", "d1"}
