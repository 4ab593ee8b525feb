"""Policies without a model; what they share with the others: counts, samples, sent prefixes."""

from __future__ import annotations

import pytest

from engine.spec import SimulatedTiming
from protos.ids import RequestKey, WorkerId
from simulator.baselines.counting import Counts, LiveBlocks
from simulator.baselines.sampling import Sampled
from simulator.baselines.sent_prefixes import SentPrefixes
from tests.simulator.peer import Peer, addresses, numbers, setup

D0, D1, P0 = WorkerId("d0"), WorkerId("d1"), WorkerId("p0")
A, B = RequestKey("0:a"), RequestKey("0:b")


# Policies


def test_random_reaches_all() -> None:
    peer = Peer("random", "d0 d1 d2")
    assert {peer.place(str(number)).worker for number in range(40)} == {"d0", "d1", "d2"}


def test_round_robin_takes_turns() -> None:
    peer = Peer("round_robin", "d0 d1 d2")
    assert [peer.place(str(number)).worker for number in range(4)] == ["d0", "d1", "d2", "d0"]


def test_round_robin_takes_turns_in_each_pool() -> None:
    peer = Peer("round_robin", "p0 p1 d0 d1 d2")
    decisions = [peer.place(str(number)) for number in range(3)]
    assert [each.prefill for each in decisions] == ["p0", "p1", "p0"]
    assert [each.worker for each in decisions] == ["d0", "d1", "d2"]


def test_least_loaded() -> None:
    peer = Peer("least_loaded", "d0 d1 d2")
    peer.place_on("d0", 2)
    peer.place_on("d2", 1)
    assert peer.place("a").worker == "d1"
    peer.place_on("d1", 2)
    decision = peer.place("b")
    assert decision.worker == "d2"
    assert numbers(decision, "d1") == {"requests": 3}


def test_a_prompt_that_is_computed_counts_at_its_prefill_worker_no_more() -> None:
    peer = Peer("least_loaded", "p0 p1 d0")
    first, second = peer.place("a").prefill, peer.place("b").prefill
    assert {first, second} == {"p0", "p1"}
    peer.first_token("a")
    assert peer.place("c").prefill == first
    # Told again, as its second worker goes on.
    peer.first_token("a")
    assert numbers(peer.place("d"), "d0") == {"requests": 3}


def test_power_of_two_takes_the_less_loaded_of_two() -> None:
    peer = Peer("power_of_two", "d0 d1")
    peer.place_on("d0", 1)
    decision = peer.place("a")
    assert decision.worker == "d1"
    assert len(decision.candidates) == 2


def test_power_of_two_never_takes_the_most_loaded() -> None:
    peer = Peer("power_of_two", "d0 d1 d2")
    peer.place_on("d2", 100)
    chosen = {peer.place(str(number)).worker for number in range(40)}
    assert chosen == {"d0", "d1"}


# Setup


@pytest.mark.parametrize(
    ("prompt_tokens", "cached_tokens", "expected_s"),
    [
        # Steps of 100 tokens, each 10 ms and 1 ms for each token.
        (50, 0, 0.010 + 0.050),
        (100, 0, 0.010 + 0.100),
        (250, 0, 3 * 0.010 + 0.250),
        (250, 100, 2 * 0.010 + 0.150),
        # The last token is computed anyway.
        (50, 50, 0.010 + 0.001),
    ],
)
def test_predicted_prefill(prompt_tokens: int, cached_tokens: int, expected_s: float) -> None:
    assert setup().prefill_s(prompt_tokens, cached_tokens) == pytest.approx(expected_s)


def test_predicted_prefill_attends_to_what_is_cached() -> None:
    timing = SimulatedTiming(step_base_s=0.0, prefill_token_s=0.0, prefill_pair_s=1e-6)
    # 150 tokens after 100: 150 * 100 pairs, and half of 150 * 150.
    predicted_s = setup(timing=timing).prefill_s(250, 100)
    assert predicted_s == pytest.approx(1e-6 * (15_000 + 11_250))


# Counts


def test_counts_of_a_split_request() -> None:
    counts = Counts()
    counts.add(A, P0, D0, context_tokens=30, uncached_tokens=20, prefill_ns=7)
    there = counts.at(P0)
    assert (there.in_flight, there.uncached_tokens, there.prefill_ns) == (1, 20, 7)
    assert (counts.at(D0).in_flight, counts.at(D0).context_tokens) == (1, 30)
    assert counts.at(D0).uncached_tokens == 0
    counts.first_token(A)
    assert (there.in_flight, there.uncached_tokens, there.context_tokens) == (0, 0, 0)
    assert counts.at(D0).in_flight == 1
    assert not counts.idle
    assert counts.ended(A) == D0
    assert counts.idle


def test_counts_of_a_whole_request() -> None:
    counts = Counts()
    counts.add(A, D0, D0, context_tokens=30, uncached_tokens=20)
    counts.add(B, D0, D0, context_tokens=10, uncached_tokens=10)
    there = counts.at(D0)
    assert (there.in_flight, there.context_tokens, there.uncached_tokens) == (2, 40, 30)
    counts.first_token(A)
    assert (there.in_flight, there.context_tokens, there.uncached_tokens) == (2, 40, 10)
    counts.ended(B)
    counts.ended(A)
    assert counts.idle


def test_unknown_keys_are_ignored() -> None:
    counts = Counts()
    counts.first_token(A)
    assert counts.ended(A) is None
    assert counts.idle


def test_live_blocks_are_counted_once_where_they_are_shared() -> None:
    live = LiveBlocks()
    both = list(Peer("random", "d0 d1").pool)
    live.add(A, D0, addresses("abc"), 0)
    live.add(B, D0, addresses("abx"), 2)
    assert live.on_each(both) == [4 + 2, 0]
    assert live.on_each(both, own_blocks=5) == [11, 5]
    assert live.shared_with_each(both, addresses("abxyz")) == [3, 0]
    assert live.shared_with_each(both, addresses("z")) == [0, 0]
    live.ended(A)
    assert live.on_each(both) == [3 + 2, 0]
    assert live.shared_with_each(both, addresses("abc")) == [2, 0]
    assert not live.idle
    live.ended(B)
    assert live.idle


# Samples


def test_samples_are_renewed_once_per_period() -> None:
    peer = Peer("random", "d0")
    sampled = Sampled[int](0.05, lambda worker: worker.load.waiting)
    assert sampled.at(10.0, peer.pool) == {"d0": 0}
    peer.load("d0", waiting=3)
    peer.up("d1")
    peer.load("d1", waiting=4)
    # A new worker is read when it comes.
    assert sampled.at(10.04, peer.pool) == {"d0": 0, "d1": 4}
    assert sampled.at(10.05, peer.pool) == {"d0": 3, "d1": 4}


# Sent prefixes


def test_sent_prefixes() -> None:
    peer = Peer("random", "d0 d1")
    workers = list(peer.pool)
    sent = SentPrefixes()
    sent.send(D0, addresses("abc"))
    sent.send(D1, addresses("ab"))
    sent.send(D1, addresses("axy"))
    assert sent.match(addresses("abcd"), workers) == {"d0": 3, "d1": 2}
    assert sent.match(addresses("abcd"), workers[1:]) == {"d1": 2}
    assert sent.match(addresses("z"), workers) == {}
    assert sent.match([], workers) == {}
    assert (sent.blocks_of(D0), sent.blocks_of(D1), sent.blocks_of(P0)) == (3, 4, 0)
    assert sent.deepest(addresses("abcd")) == (3, "d0")
    assert sent.deepest(addresses("abz")) == (2, "d1")
    assert sent.deepest(addresses("z")) == (0, None)


def test_sent_prefixes_that_are_taken_back() -> None:
    sent = SentPrefixes()
    sent.send(D0, addresses("ab"))
    sent.send(D1, addresses("ab"))
    sent.forget(D1, b"ab")
    assert sent.deepest(addresses("ab")) == (2, "d0")
    sent.forget(D0, b"ab")
    assert sent.deepest(addresses("ab")) == (1, "d1")
    sent.drop(b"a")
    assert len(sent) == 0
    assert (sent.blocks_of(D0), sent.blocks_of(D1)) == (0, 0)
