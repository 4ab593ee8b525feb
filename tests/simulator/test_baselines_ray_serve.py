"""Ray Serve's prefix router, by hand-made trees."""

from __future__ import annotations

from tests.simulator.peer import Peer, costs, numbers


def test_a_match_is_followed_though_others_have_less_to_do() -> None:
    peer = Peer("ray_prefix", "d0 d1 d2")
    first = peer.place("a", "abcd").worker
    decision = peer.place("b", "abxy")
    assert decision.worker == first
    # Only those with the longest match are candidates.
    assert costs(decision) == {first: 1}
    assert numbers(decision, str(first)) == {
        "requests": 1, "matched_tokens": 20, "sent_blocks": 4,
    }  # fmt: skip


def test_only_the_longest_match_counts() -> None:
    peer = Peer("ray_prefix", "d0 d1 d2")
    peer.place_on("d0", 1, "ab")
    peer.place_on("d1", 3, "abc")
    assert costs(peer.place("q", "abcd")) == {"d1": 3}


def test_a_match_of_a_tenth_is_enough() -> None:
    peer = Peer("ray_prefix", "d0 d1")
    first = peer.place("a", "a" + "x" * 4).worker
    assert peer.place("b", "a" + "y" * 9).worker == first


def test_below_a_tenth_the_smallest_part_of_the_tree_is_taken() -> None:
    peer = Peer("ray_prefix", "d0 d1 d2")
    peer.place_on("d0", 1, "abcde")
    peer.place_on("d1", 3, "mn")
    peer.place_on("d2", 1, "stu")
    # 1 block of 11; d1 has the most requests and the least blocks: 2 of 5, 2 and 3.
    decision = peer.place("q", "a" + "y" * 10)
    assert decision.worker == "d1"
    assert costs(decision) == {"d1": 3}


def test_of_equal_matches_the_fewest_requests() -> None:
    peer = Peer("ray_prefix", "d0 d1 d2")
    peer.place_on("d0", 2, "abc")
    peer.place_on("d1", 1, "abc")
    decision = peer.place("q", "abc")
    assert costs(decision) == {"d0": 2, "d1": 1}
    assert decision.worker == "d1"


def test_by_default_load_is_never_out_of_balance() -> None:
    peer = Peer("ray_prefix", "d0 d1")
    peer.place_on("d0", 500, "abc")
    assert peer.place("q", "abc").worker == "d0"


def test_above_the_threshold_power_of_two_decides() -> None:
    peer = Peer("ray_prefix", "d0 d1", imbalanced_threshold=3)
    peer.place_on("d0", 5, "abc")
    peer.place_on("d1", 2, "x")
    # The difference is 3, which is not more than 3.
    assert peer.place("q", "abc").worker == "d0"
    decision = peer.place("r", "abc")
    assert costs(decision) == {"d0": 6, "d1": 2}
    assert decision.worker == "d1"


def test_each_pool_has_its_own_tree() -> None:
    peer = Peer("ray_prefix", "p0 p1 d0 d1")
    peer.place_on("p0", 1, "abc")
    peer.place_on("d1", 1, "abc")
    peer.ended("p0-abc-0")
    peer.ended("d1-abc-0")
    for name in "qrs":
        decision = peer.place(name, "abc")
        assert (decision.prefill, decision.worker) == ("p0", "d1")
    # Without a match the empty parts are taken.
    decision = peer.place("t", "xyz")
    assert (decision.prefill, decision.worker) == ("p1", "d0")
