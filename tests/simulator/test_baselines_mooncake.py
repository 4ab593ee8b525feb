"""Mooncake's Algorithm 1, worked out by hand.

Steps of at most 100 tokens take 10 ms and 1 ms for each token of a prompt, 2 ms for each request
that decodes, and 10 us for each token of its context.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from protos.ids import WorkerId
from router.core.costs import Slo
from router.core.events import PrefixFetch, Role, Shape
from simulator.cluster import Refusing
from tests.simulator.peer import TIMING, Peer, costs, numbers


def test_the_queue_and_the_prefill_are_predicted() -> None:
    peer = Peer("mooncake", "p0 p1 d0", theta=math.inf)
    peer.cached("p0", "abc")
    decision = peer.place("a", "abcd")
    assert decision.fetch is None
    assert costs(decision, Role.PREFILL) == pytest.approx({"p0": 0.020, "p1": 0.050})
    assert decision.prefill == "p0"
    # 20 ms wait at p0 now.
    decision = peer.place("b", "abcx")
    assert costs(decision, Role.PREFILL) == pytest.approx({"p0": 0.040, "p1": 0.050})
    decision = peer.place("c", "abcy")
    assert costs(decision, Role.PREFILL) == pytest.approx({"p0": 0.060, "p1": 0.050})
    assert decision.prefill == "p1"
    peer.first_token("a")
    assert numbers(peer.place("d", "abcz"), "p0", Role.PREFILL)["queue_s"] == pytest.approx(0.020)


def test_a_long_prompt_takes_several_steps() -> None:
    peer = Peer("mooncake", "d0")
    assert costs(peer.place("a", "", prompt_tokens=250)) == pytest.approx({"d0": 0.030 + 0.250})


def test_the_first_of_equals_is_taken() -> None:
    peer = Peer("mooncake", "p0 p1 d0 d1")
    decision = peer.place("a", "ab")
    assert (decision.prefill, decision.worker) == ("p0", "d0")


def test_whole_requests_are_placed_by_their_time_to_first_token() -> None:
    peer = Peer("mooncake", "d0 d1", theta=math.inf)
    peer.place_on("d0", 1, "xy", 20)
    peer.cached("d0", "abc")
    # d0: 30 ms of queue and 20 ms; d1: 50 ms. The first of equals.
    decision = peer.place("a", "abcd")
    assert costs(decision) == pytest.approx({"d0": 0.050, "d1": 0.050})
    # Now 50 and 20 ms.
    assert peer.place("b", "abcd").worker == "d1"


def test_decode_by_the_least_predicted_time_between_tokens() -> None:
    peer = Peer("mooncake", "p0 d0 d1")
    peer.place_on("d0", 1, prompt_tokens=900)
    peer.place_on("d1", 3, prompt_tokens=10)
    decision = peer.place("a", "ab")
    # 10 ms, 2 ms a request, 10 us a token of context, with this one.
    expected = {"d0": 0.010 + 0.004 + 0.00920, "d1": 0.010 + 0.008 + 0.00050}
    assert costs(decision) == pytest.approx(expected)
    assert decision.worker == "d1"


def test_what_was_generated_is_context_too() -> None:
    peer = Peer("mooncake", "p0 d0")
    decision = peer.place("a", "ab", output_tokens=80)
    assert costs(decision) == pytest.approx({"d0": 0.010 + 0.002 + 0.00100})
    assert numbers(peer.place("b", "a"), "d0")["context_tokens"] == 100


def test_what_another_has_is_fetched_where_the_queue_is_shorter() -> None:
    peer = Peer("mooncake", "p0 p1 d0", timing=replace(TIMING, transfer_block_s=0.002))
    peer.cached("p0", "abc")
    # p1 fetches 3 blocks in 6 ms, and computes the other 10 tokens as p0 would.
    decision = peer.place("a", "abcd")
    assert costs(decision, Role.PREFILL) == pytest.approx({"p0": 0.020, "p1": 0.026})
    assert (decision.prefill, decision.fetch) == ("p0", None)
    decision = peer.place("b", "abcx")
    assert costs(decision, Role.PREFILL) == pytest.approx({"p0": 0.040, "p1": 0.026})
    assert (decision.prefill, decision.fetch) == ("p1", PrefixFetch(WorkerId("p0"), 3))
    # What waits at p1 is the prefill alone, with what was fetched.
    assert numbers(peer.place("c", "abcy"), "p1", Role.PREFILL)["queue_s"] == pytest.approx(0.020)


@pytest.mark.parametrize(("theta", "fetches"), [(4.0, False), (3.9, True)])
def test_theta_says_how_much_longer_the_longest_must_be(theta: float, fetches: bool) -> None:
    peer = Peer("mooncake", "p0 p1 p2 d0", theta=theta)
    peer.cached("p0", "abcd")
    peer.cached("p1", "a")
    decision = peer.place("a", "abcd")
    transfers_s = [
        numbers(decision, worker, Role.PREFILL)["transfer_s"] for worker in ("p0", "p1", "p2")
    ]
    # 0.1 ms a block. p2 has nothing of it, which is less than any share.
    assert transfers_s == pytest.approx([0.0, 0.0003 if fetches else 0.0, 0.0004])
    # Of a prompt that is there as a whole the last token is computed.
    expected = {"p0": 0.011, "p1": 0.0113 if fetches else 0.040, "p2": 0.0114}
    assert costs(decision, Role.PREFILL) == pytest.approx(expected)


def test_only_the_prefill_pool_lends() -> None:
    peer = Peer("mooncake", "p0 p1 d0")
    peer.cached("d0", "abcd")
    decision = peer.place("a", "abcd")
    assert costs(decision, Role.PREFILL) == pytest.approx({"p0": 0.050, "p1": 0.050})
    assert decision.fetch is None


def test_whole_requests_fetch_too_but_not_those_that_go_on() -> None:
    peer = Peer("mooncake", "d0 d1")
    peer.place_on("d0", 1, "xyz")
    peer.cached("d0", "abcd")
    assert peer.place("a", "abcd").fetch == PrefixFetch(WorkerId("d0"), 4)
    assert peer.place("b", "abcd", output_tokens=3).fetch is None


@pytest.mark.parametrize(
    ("slo", "refuses"),
    [
        (Slo(0.061, 0.03), False),
        (Slo(0.059, 0.03), True),
        (Slo(0.061, 0.01), True),
    ],
)
def test_it_rejects_who_would_miss_an_slo_wherever_it_goes(slo: Slo, refuses: bool) -> None:
    """60 ms for 50 tokens: the least of both; and a step of 12 ms and more."""
    peer = Peer("mooncake_rejecting", "p0 d0")
    assert isinstance(peer.policy, Refusing)
    shape = Shape(50, None)
    assert peer.policy.refuses(peer.now_s, peer.view, shape, slo) is refuses
