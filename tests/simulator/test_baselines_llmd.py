"""llm-d's two sets of scorers, worked out by hand."""

from __future__ import annotations

import math

import pytest

from engine.spec import SimulatedTiming
from router.core.events import Role
from router.core.placement import Reason
from tests.simulator.peer import Peer, chosen_over_seeds, costs, numbers

# Built-in


def test_queue_kv_use_and_prefix() -> None:
    peer = Peer("llmd_builtin", "d0 d1 d2")
    peer.load("d0", waiting=0, used=50)
    peer.load("d1", waiting=4, used=25)
    peer.load("d2", waiting=3, used=100)
    peer.cached("d0", "ab")
    peer.cached("d2", "abcd")
    decision = peer.place("a", "abcd")
    assert costs(decision) == pytest.approx(
        {
            "d0": -(2 * 4 / 4 + 2 * 0.5 + 3 * 0.5),
            "d1": -(2 * 0 / 4 + 2 * 0.75 + 3 * 0.0),
            "d2": -(2 * 1 / 4 + 2 * 0.0 + 3 * 1.0),
        }
    )
    assert decision.worker == "d0"


def test_equal_queues_count_in_full() -> None:
    peer = Peer("llmd_builtin", "d0 d1")
    peer.load("d0", waiting=7, used=10)
    peer.load("d1", waiting=7)
    decision = peer.place("a")
    assert costs(decision) == pytest.approx({"d0": -(2 + 1.8), "d1": -(2 + 2)})
    assert decision.worker == "d1"


def test_loads_are_scraped_every_50_ms() -> None:
    peer = Peer("llmd_builtin", "d0 d1")
    peer.load("d0", used=50)
    assert peer.place("a").worker == "d1"
    peer.load("d1", used=90)
    peer.now_s += 0.049
    assert peer.place("b").worker == "d1"
    peer.now_s += 0.002
    assert peer.place("c").worker == "d0"


def test_built_in_weights_are_knobs() -> None:
    peer = Peer("llmd_builtin", "d0", queue_weight=1.0, kv_weight=10.0, prefix_weight=100.0)
    peer.load("d0", used=20)
    peer.cached("d0", "a")
    assert costs(peer.place("a", "abcd")) == pytest.approx({"d0": -(1 + 10 * 0.8 + 100 * 0.25)})


def test_built_in_scores_both_pools() -> None:
    peer = Peer("llmd_builtin", "p0 p1 d0 d1")
    peer.load("p0", used=50)
    peer.load("d1", used=50)
    decision = peer.place("a", "ab")
    assert (decision.prefill, decision.worker) == ("p1", "d0")
    assert costs(decision, Role.PREFILL) == pytest.approx({"p0": -3, "p1": -4})


# Guide


def test_the_fewest_tokens_to_compute_without_a_prefix() -> None:
    peer = Peer("llmd_guide", "d0 d1 d2")
    peer.place_on("d0", 1, prompt_tokens=30)
    peer.place_on("d1", 1, prompt_tokens=40)
    peer.place_on("d2", 1, prompt_tokens=45)
    peer.cached("d2", "ab")
    decision = peer.place("a", "abcd")
    # (I + L - c) / 4,194,304.
    assert costs(decision) == {
        "d0": 70 / 4_194_304, "d1": 80 / 4_194_304, "d2": 65 / 4_194_304,
    }  # fmt: skip
    assert decision.worker == "d2"


def test_four_fifths_of_a_prefix_hold_a_request() -> None:
    peer = Peer("llmd_guide", "d0 d1")
    peer.cached("d0", "abcd")
    peer.place_on("d0", 1, prompt_tokens=500)
    decision = peer.place("a", "abcde")
    assert decision.worker == "d0"
    assert list(costs(decision)) == ["d0"]
    # Three quarters do not.
    assert peer.place("b", "abcx").worker == "d1"


@pytest.mark.parametrize(("waiting_tokens", "chosen"), [(1820, "d0"), (1821, "d2")])
def test_saturated_it_lets_go(waiting_tokens: int, chosen: str) -> None:
    """The gap between the least loaded with and without is 18 s of 100 tokens per second."""
    peer = Peer("llmd_guide", "d0 d1 d2 d3", tokens_per_s=100.0)
    peer.cached("d0", "ab")
    peer.cached("d1", "ab")
    peer.place_on("d0", 1, prompt_tokens=waiting_tokens)
    peer.place_on("d1", 1, prompt_tokens=9000)
    peer.place_on("d2", 1, prompt_tokens=20)
    peer.place_on("d3", 1, prompt_tokens=9000)
    assert peer.place("a", "ab").worker == chosen


def test_all_that_hold_the_prefix_are_held_against_each_other() -> None:
    peer = Peer("llmd_guide", "d0 d1 d2")
    peer.cached("d0", "abcd")
    peer.cached("d1", "abcde")
    peer.place_on("d0", 1, prompt_tokens=30)
    decision = peer.place("a", "abcde")
    assert costs(decision) == {"d0": 40 / 4_194_304, "d1": 0.0}
    assert decision.worker == "d1"


def test_beyond_the_limit_all_loads_are_equal() -> None:
    peer = Peer("llmd_guide", "d0 d1")
    peer.place_on("d0", 1, prompt_tokens=5_000_000)
    peer.place_on("d1", 1, prompt_tokens=9_000_000)
    assert costs(peer.place("a")) == {"d0": 1.0, "d1": 1.0}


def test_tokens_per_second_are_those_of_a_typical_prefill() -> None:
    # 4,096 tokens are 41 steps of at most 100: 41 * 1 s and 1 ms each.
    timing = SimulatedTiming(step_base_s=1.0, prefill_token_s=0.001)
    tokens_per_s = 4096 / (41 + 4.096)
    limit_tokens = math.floor(18 * tokens_per_s)
    for waiting_tokens, chosen in ((limit_tokens, "d0"), (limit_tokens + 1, "d1")):
        peer = Peer("llmd_guide", "d0 d1", timing=timing)
        peer.cached("d0", "ab")
        peer.place_on("d0", 1, prompt_tokens=waiting_tokens)
        assert peer.place("a", "ab").worker == chosen


def test_the_guide_takes_the_fewest_requests_for_decode() -> None:
    peer = Peer("llmd_guide", "p0 p1 d0 d1 d2")
    peer.place_on("d0", 4)
    peer.place_on("d1", 1)
    peer.place_on("d2", 3)
    peer.cached("p1", "abcd")
    decision = peer.place("a", "abcde")
    # Less of (nmax - n) / nmax.
    assert costs(decision) == {"d0": 0.0, "d1": -0.75, "d2": -0.25}
    assert (decision.prefill, decision.worker) == ("p1", "d1")
    assert chosen_over_seeds("llmd_guide", "p0 d0 d1") == {"d0", "d1"}


def test_prefill_tokens_count_until_the_first_token() -> None:
    peer = Peer("llmd_guide", "p0 d0")
    peer.place("a", "abc")
    assert numbers(peer.place("b", "a"), "p0", Role.PREFILL)["uncached_tokens"] == 30
    peer.first_token("a")
    assert numbers(peer.place("c", "a"), "p0", Role.PREFILL)["uncached_tokens"] == 10


@pytest.mark.parametrize("name", ["llmd_builtin", "llmd_guide"])
@pytest.mark.parametrize(
    ("limit_tokens", "local"), [(0.0, False), (20.0, False), (21.0, True), (math.inf, True)]
)
def test_the_decider_looks_at_what_is_new_to_the_decode_worker(
    name: str, limit_tokens: float, local: bool
) -> None:
    peer = Peer(name, "p0 d0", remote_from_tokens=limit_tokens)
    peer.cached("d0", "ab")
    decision = peer.place("a", "abcd")
    assert decision.worker == "d0"
    assert decision.prefill == (None if local else "p0")
    assert decision.reason is (Reason.SHORT_PROMPT if local else Reason.LONG_PROMPT)
