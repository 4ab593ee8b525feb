"""AIBrix: prefix-cache and P/D routing, worked out by hand."""

from __future__ import annotations

import pytest

from router.core.events import Role
from tests.simulator.peer import Peer, costs, numbers

# prefix-cache


def test_the_best_match_then_the_fewest_requests() -> None:
    peer = Peer("aibrix_prefix", "d0 d1 d2")
    peer.place_on("d0", 1, "ab")
    peer.place_on("d1", 1, "ab")
    peer.place_on("d2", 1, "a")
    peer.ended("d1-ab-0")
    decision = peer.place("q", "abcd")
    # Percents first, and of what is equal the requests, as shares of one more than the most.
    assert costs(decision) == {"d0": 1 / 2 - 50, "d1": -50, "d2": 1 / 2 - 25}
    assert decision.worker == "d1"


def test_a_pod_over_a_standard_deviation_is_left_out() -> None:
    peer = Peer("aibrix_prefix", "d0 d1 d2 d3")
    peer.place_on("d0", 4, "abcd")
    peer.place_on("d1", 2, "ab")
    # 4, 2, 0, 0: mean 1.5, squares 6.25 + 0.25 + 2.25 + 2.25 = 11, over 3: deviation 1.915.
    decision = peer.place("q", "abcd")
    assert costs(decision) == {"d1": 2 / 5 - 50}
    assert numbers(decision, "d1") == {"requests": 2, "match_percent": 50}
    tolerant = Peer("aibrix_prefix", "d0 d1 d2 d3", deviations=2.0)
    tolerant.place_on("d0", 4, "abcd")
    assert tolerant.place("q", "abcd").worker == "d0"


def test_out_of_balance_only_the_least_loaded_are_matched() -> None:
    for requests, chosen in ((9, "d1"), (10, "d2")):
        peer = Peer("aibrix_prefix", "d0 d1 d2", deviations=9.0)
        peer.place_on("d0", requests)
        peer.place_on("d1", 2, "ab")
        peer.place_on("d2", 1, "a")
        assert peer.place("q", "ab").worker == chosen


def test_without_a_match_the_fewest_requests() -> None:
    peer = Peer("aibrix_prefix", "d0 d1")
    peer.place_on("d0", 2, "x")
    peer.place_on("d1", 1, "y")
    decision = peer.place("q", "ab")
    assert costs(decision) == {"d0": 2, "d1": 1}
    assert decision.worker == "d1"


def test_the_table_holds_so_many_tokens() -> None:
    peer = Peer("aibrix_prefix", "d0 d1", table_tokens=30.0)
    peer.place_on("d0", 1, "abc")
    peer.place_on("d1", 1, "xy")
    # Of a, b, c the last two made room: a prompt's end goes first.
    decision = peer.place("q", "abc")
    assert numbers(decision, "d0") == {"requests": 1, "match_percent": 33}
    assert decision.worker == "d0"


def test_the_table_forgets_after_20_minutes() -> None:
    for waited_s, candidates in ((1199.0, ["d0"]), (1200.0, ["d0", "d1"])):
        peer = Peer("aibrix_prefix", "d0 d1")
        peer.place_on("d0", 1, "abc")
        peer.place_on("d1", 1)
        peer.now_s += waited_s
        assert list(costs(peer.place("q", "abc"))) == candidates


# P/D


def test_prefill_by_match_and_requests() -> None:
    peer = Peer("aibrix_pd", "p0 p1 p2 d0")
    peer.place_on("p0", 2, "abcd")
    peer.place_on("p1", 1, "xy")
    peer.place_on("p2", 1, "zz")
    # Placed whole there; p0 alone is over the mean, 4/3, and a deviation of 0.577.
    decision = peer.place("q", "abcd")
    assert costs(decision, Role.PREFILL) == pytest.approx({"p1": 10.5, "p2": 10.5})
    peer.ended("p0-abcd-0")
    decision = peer.place("r", "abcd")
    assert decision.prefill == "p0"
    assert costs(decision, Role.PREFILL)["p0"] == pytest.approx(0.1 * 0 + 1 / 2)


def test_prefill_out_of_balance() -> None:
    for requests, candidates in (
        # The mean is 9 and the deviation 11.3.
        (17, {"p0": 0 + 17 / 17, "p1": 10 + 1 / 17}),
        (18, {"p0": 18, "p1": 1}),
    ):
        peer = Peer("aibrix_pd", "p0 p1 d0")
        peer.place_on("p0", requests, "ab")
        peer.place_on("p1", 1)
        assert costs(peer.place("q", "ab"), Role.PREFILL) == pytest.approx(candidates)


def test_decode_by_requests_throughput_and_room() -> None:
    peer = Peer("aibrix_pd", "p0 d0 d1")
    peer.place_on("d0", 4, prompt_tokens=100)
    peer.place_on("d1", 2, prompt_tokens=100)
    peer.load("d0", running=4, used=60)
    peer.load("d1", running=2, used=20)
    # A step: 10 ms, 2 ms a request, 10 us a token of context: 22 and 16 ms.
    rates = 4 / 0.022, 2 / 0.016
    decision = peer.place("q", "ab")
    assert costs(decision) == pytest.approx(
        {"d0": (4 / 4 + 1 - 1) / (40 / 80), "d1": (2 / 4 + 1 - rates[1] / rates[0]) / (80 / 80)}
    )
    assert numbers(decision, "d0") == pytest.approx(
        {"requests": 4, "match_percent": 0, "tokens_per_s": rates[0], "free_percent": 40}
    )
    assert decision.worker == "d1"


def test_a_full_pod_is_last() -> None:
    peer = Peer("aibrix_pd", "p0 d0 d1")
    peer.place_on("d0", 1)
    peer.place_on("d1", 1)
    peer.load("d0", used=100)
    # A tenth of a percent is left to it: (1 + 1 - 0) / (0.1 / 100).
    assert costs(peer.place("q")) == pytest.approx({"d0": 2000, "d1": 2})


def test_decode_out_of_balance_by_requests() -> None:
    for requests, expected in (
        (16, {"d0": 16 / 16 + 1, "d1": 1 / 16 + 1}),
        (17, {"d0": 17, "d1": 1}),
    ):
        peer = Peer("aibrix_pd", "p0 d0 d1")
        peer.place_on("d0", requests)
        peer.place_on("d1", 1)
        assert costs(peer.place("q")) == pytest.approx(expected)


def test_decode_out_of_balance_by_throughput() -> None:
    # 181.8 and 125 tokens/s.
    rates = 4 / 0.022, 2 / 0.016
    for spread, expected in (
        (56.0, {"d0": rates[0], "d1": rates[1]}),
        (57.0, {"d0": 4 / 4 + 1 - 1, "d1": 2 / 4 + 1 - rates[1] / rates[0]}),
    ):
        peer = Peer("aibrix_pd", "p0 d0 d1", throughput_spread=spread)
        peer.place_on("d0", 4, prompt_tokens=100)
        peer.place_on("d1", 2, prompt_tokens=100)
        peer.load("d0", running=4)
        peer.load("d1", running=2)
        assert costs(peer.place("q")) == pytest.approx(expected)


def completed(d0: tuple[int, int], d1: tuple[int, int]) -> Peer:
    """So many requests left, and so many that ended, of each."""
    peer = Peer("aibrix_pd", "p0 d0 d1")
    for worker, (left, ended) in (("d0", d0), ("d1", d1)):
        peer.place_on(worker, left + ended)
        for number in range(ended):
            peer.ended(f"{worker}--{number}")
    return peer


@pytest.mark.parametrize(
    ("d0", "d1", "expected"),
    [
        # Completions per second count as a tenth at least. Not more than 1.5 times as much:
        ((3, 1), (2, 6), {"d0": 3 / 3 + 1, "d1": 2 / 3 + 1}),
        ((4, 1), (2, 6), {"d0": 4 / 0.1, "d1": 2 / 0.1}),
        ((6, 12), (2, 1), {"d0": 6 / 6 + 1, "d1": 2 / 6 + 1}),
        ((6, 9), (2, 1), {"d0": 6 / 0.15, "d1": 2 / 0.1}),
        # One that completed nothing, or has nothing to do.
        ((6, 9), (2, 0), {"d0": 6 / 6 + 1, "d1": 2 / 6 + 1}),
        ((6, 9), (0, 1), {"d0": 6 / 6 + 1, "d1": 0 / 6 + 1}),
    ],
)
def test_decode_out_of_balance_by_what_is_completed(
    d0: tuple[int, int], d1: tuple[int, int], expected: dict[str, float]
) -> None:
    assert costs(completed(d0, d1).place("q")) == pytest.approx(expected)


def test_what_is_taken_away_is_not_completed() -> None:
    peer = completed((6, 9), (3, 0))
    peer.ended("d1--0", None)
    assert costs(peer.place("q")) == pytest.approx({"d0": 6 / 6 + 1, "d1": 2 / 6 + 1})


def test_what_was_completed_over_a_minute_ago_does_not_count() -> None:
    peer = completed((6, 1), (3, 1))
    peer.now_s += 59
    assert costs(peer.place("q")) == pytest.approx({"d0": 60, "d1": 30})
    peer.ended("q", None)
    peer.now_s += 1
    assert costs(peer.place("q")) == pytest.approx({"d0": 6 / 6 + 1, "d1": 3 / 6 + 1})
