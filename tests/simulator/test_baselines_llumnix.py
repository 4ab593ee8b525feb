"""Llumnix's freeness, worked out by hand. Workers have 100 blocks of 10 tokens."""

from __future__ import annotations

import math

import pytest

from router.core.events import Role
from tests.simulator.peer import Peer, chosen_over_seeds, costs


def test_free_blocks_for_each_request() -> None:
    peer = Peer("llumnix", "d0 d1")
    peer.load("d0", running=4, used=20)
    peer.load("d1", running=2, used=70)
    decision = peer.place("a")
    assert costs(decision) == {"d0": -80 / 4, "d1": -30 / 2}
    assert decision.worker == "d0"


def test_what_waits_wants_blocks() -> None:
    peer = Peer("llumnix", "d0 d1")
    peer.place_on("d0", 1, prompt_tokens=100)
    peer.place_on("d0", 1, prompt_tokens=300, prompt="x")
    peer.load("d0", running=1, waiting=3, used=20)
    peer.load("d1", running=4, used=70)
    peer.now_s += 1
    # Three wait, of 200 tokens on average: (100 - 20 - 3 * 20) / 4, and 30 / 4.
    decision = peer.place("a")
    assert costs(decision) == {"d0": -5.0, "d1": -7.5}
    assert decision.worker == "d1"


def test_what_waits_counts_as_demand() -> None:
    peer = Peer("llumnix", "p0 p1 d0")
    peer.place_on("p0", 1, prompt_tokens=200)
    peer.load("p0", waiting=2, used=10)
    peer.load("p1", running=1, used=40)
    peer.now_s += 1
    # 10 used and 2 * 20 wanted of 100.
    assert costs(peer.place("a"), Role.PREFILL) == {"p0": 0.5, "p1": 0.4}


def test_freeness_may_be_negative() -> None:
    peer = Peer("llumnix", "d0")
    peer.place_on("d0", 1, prompt_tokens=500)
    peer.load("d0", running=1, waiting=4, used=80)
    peer.now_s += 1
    assert costs(peer.place("a")) == {"d0": -(100 - 80 - 4 * 50) / 5}


def test_an_idle_worker_is_free_without_bound() -> None:
    peer = Peer("llumnix", "d0 d1")
    peer.load("d0", running=1, used=1)
    decision = peer.place("a")
    assert costs(decision) == {"d0": -99.0, "d1": -math.inf}
    assert decision.worker == "d1"
    assert chosen_over_seeds("llumnix", "d0 d1") == {"d0", "d1"}


def test_between_two_reports_all_go_to_the_same_worker() -> None:
    peer = Peer("llumnix", "d0 d1")
    peer.load("d0", running=4, used=20)
    peer.load("d1", running=4, used=30)
    assert {peer.place(str(number)).worker for number in range(9)} == {"d0"}
    peer.load("d0", running=13, used=50)
    peer.now_s += 0.049
    assert peer.place("a").worker == "d0"
    peer.now_s += 0.002
    assert peer.place("b").worker == "d1"


def test_prefill_by_the_demand_for_blocks_and_decode_by_freeness() -> None:
    peer = Peer("llumnix", "p0 p1 d0 d1")
    peer.load("p0", running=1, used=60)
    peer.load("p1", running=9, used=50)
    peer.load("d0", running=1, used=60)
    peer.load("d1", running=9, used=50)
    decision = peer.place("a")
    assert costs(decision, Role.PREFILL) == {"p0": 0.6, "p1": 0.5}
    assert costs(decision) == pytest.approx({"d0": -40, "d1": -50 / 9})
    assert (decision.prefill, decision.worker) == ("p1", "d0")
