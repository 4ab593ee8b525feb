"""Dynamo's costs, worked out by hand. Blocks have 10 tokens."""

from __future__ import annotations

import math
from typing import Any

import pytest

from router.core.events import Role
from router.core.placement import Reason
from tests.simulator.peer import Peer, costs, numbers


def test_prefill_and_live_blocks_less_what_is_cached() -> None:
    peer = Peer("dynamo_kv", "d0 d1")
    peer.cached("d0", "abc")
    decision = peer.place("a", "abcd")
    # (0 + 40) / 10 - 3 + 4 live; 40 / 10 + 4.
    assert costs(decision) == {"d0": 5, "d1": 8}
    assert decision.worker == "d0"


def test_prompts_without_a_first_token_weigh_by_what_is_not_cached() -> None:
    peer = Peer("dynamo_kv", "d0 d1")
    peer.cached("d0", "abc")
    peer.place("a", "abcd")
    decision = peer.place("b", "abcx")
    # d0: A = 40 - 30; (10 + 40) / 10 - 3, and a, b, c, d, x are live. d1: 40 / 10 + 4.
    assert costs(decision) == {"d0": 2 + 5, "d1": 8}
    assert numbers(decision, "d0") == {
        "uncached_tokens": 10, "cached_blocks": 3, "live_blocks": 5, "requests": 1,
    }  # fmt: skip
    peer.first_token("a")
    # A = 10 of b alone; a, b, c, d, x, y are live.
    assert costs(peer.place("c", "abcy")) == {"d0": 2 + 6, "d1": 8}


def test_blocks_are_live_until_their_last_request_ended() -> None:
    peer = Peer("dynamo_kv", "d0 d1")
    peer.place_on("d0", 2, "ab", 20)
    for number in range(2):
        peer.first_token(f"d0-ab-{number}")
    assert costs(peer.place("a", "xyz"))["d0"] == 3 + 2 + 3
    peer.ended("a")
    peer.ended("d0-ab-0")
    assert costs(peer.place("a", "xyz"))["d0"] == 3 + 2 + 3
    peer.ended("a")
    peer.ended("d0-ab-1")
    assert costs(peer.place("a", "xyz"))["d0"] == 3 + 3


def test_prompts_of_unknown_content_share_nothing() -> None:
    peer = Peer("dynamo_kv", "d0 d1")
    peer.place_on("d0", 2, "", 45)
    # Two prompts of 4 whole blocks and 90 tokens to compute; 2 blocks and 20 tokens of this one.
    assert costs(peer.place("a", "ab")) == {"d0": 11 + 8 + 2, "d1": 2 + 2}


@pytest.mark.parametrize(
    ("knobs", "d0", "d1"),
    [
        ({"s": 2.0}, 2 * 2 + 5, 2 * 4 + 4),
        ({"k": 0.5}, 5 - 1.5 + 5, 8),
        # f = 1 / (1 + 1 * (10 - 0) / 40) = 0.8 at d0.
        ({"d": 1.0}, 5 - 0.8 * 3 + 5, 8),
        ({"w": 1.5}, 7 + 1.5, 8),
    ],
)
def test_knobs(knobs: dict[str, Any], d0: float, d1: float) -> None:
    peer = Peer("dynamo_kv", "d0 d1", **knobs)
    peer.cached("d0", "abc")
    peer.place_on("d0", 1, "abcd", 40)
    decision = peer.place("b", "abcx")
    assert costs(decision) == pytest.approx({"d0": d0, "d1": d1})
    assert decision.worker == ("d0" if d0 < d1 else "d1")


def test_the_decay_starts_at_the_least_that_waits_anywhere() -> None:
    peer = Peer("dynamo_kv", "p0 p1 d0", d=1.0)
    peer.place_on("p0", 1, prompt_tokens=30)
    peer.place_on("p1", 1, prompt_tokens=10)
    peer.cached("p0", "ab")
    peer.cached("p1", "ab")
    # At p0 f = 1 / (1 + (30 - 10) / 40) = 2/3, at p1 1.
    expected = {"p0": 7 - 2 * 2 / 3, "p1": 5 - 2}
    assert costs(peer.place("a", "abcd"), Role.PREFILL) == pytest.approx(expected)


def test_a_prefill_worker_first_without_live_blocks() -> None:
    peer = Peer("dynamo_kv", "p0 p1 d0 d1")
    peer.cached("p1", "ab")
    decision = peer.place("a", "abcd")
    assert (decision.prefill, decision.worker) == ("p1", None)
    assert costs(decision, Role.PREFILL) == {"p0": 4, "p1": 2}
    assert costs(decision) == {}
    # 20 tokens wait at p1.
    assert costs(peer.place("b", "abcd"), Role.PREFILL) == {"p0": 4, "p1": 4}


def test_a_decode_worker_once_the_first_token_is_made() -> None:
    peer = Peer("dynamo_kv", "p0 d0 d1")
    peer.cached("d0", "abcd")
    peer.place_on("d0", 1, "abcd", 40)
    peer.place("a", "abcd")
    assert numbers(peer.place("b", "abcd"), "p0", Role.PREFILL)["uncached_tokens"] == 40
    peer.first_token("a")
    peer.ended("a", None)
    decision = peer.place("a", "abcd", output_tokens=1)
    # What d0 has of the prompt counts twice: nothing is shared and nothing is credited.
    assert costs(decision) == {"d0": 4 + 4, "d1": 4}
    assert (decision.reason, decision.worker, decision.prefill) == (Reason.RESUME, "d1", None)
    peer.first_token("a")
    peer.ended("a")
    assert costs(peer.place("c", "xy", output_tokens=1)) == {"d0": 4 + 2, "d1": 2}


@pytest.mark.parametrize("name", ["dynamo_kv", "dynamo_conditional"])
def test_the_weight_of_requests_holds_for_decode_too(name: str) -> None:
    peer = Peer(name, "p0 d0 d1", w=3.0)
    peer.place_on("d0", 2, prompt_tokens=1)
    decision = peer.place("a", "ab", output_tokens=1)
    assert costs(decision) == {"d0": 2 + 3 * 2, "d1": 2}


@pytest.mark.parametrize(("name", "live"), [("dynamo_kv", 8), ("dynamo_conditional", 4)])
def test_equal_prompts_that_were_handed_over(name: str, live: int) -> None:
    """Counted twice, or once where blocks are taken to be shared."""
    peer = Peer(name, "p0 d0")
    peer.place("a", "abcd", output_tokens=1)
    peer.place("b", "abcd", output_tokens=1)
    assert numbers(peer.place("c", "xy", output_tokens=1), "d0")["live_blocks"] == live + 2


def test_an_ended_prompt_waits_no_more() -> None:
    peer = Peer("dynamo_kv", "p0 d0")
    peer.place("a", "abcd")
    peer.ended("a", None)
    assert costs(peer.place("b", "ab"), Role.PREFILL) == {"p0": 2}


# Conditional mode


def test_little_that_is_new_is_computed_on_the_decode_worker() -> None:
    peer = Peer("dynamo_conditional", "p0 d0 d1", local_tokens=30.0)
    peer.cached("d0", "ab")
    peer.place_on("d0", 1, "x", 10)
    # d0: 1 + 4 - 2; d1: 4. To d0 20 tokens are new: less than 30, and than 0.7 of 40.
    decision = peer.place("a", "abcd")
    assert costs(decision) == {"d0": 3, "d1": 4}
    assert (decision.reason, decision.worker, decision.prefill) == (
        Reason.SHORT_PROMPT, "d0", None,
    )  # fmt: skip
    assert decision.local_prefill_max_tokens == 30


@pytest.mark.parametrize(
    ("cached", "prompt", "local_tokens", "local"),
    [
        ("ab", "abcd", 20.0, False),
        ("ab", "abcd", 21.0, True),
        # 0.7 of 100 tokens.
        ("abc", "abcdefghij", 2048.0, False),
        ("abcd", "abcdefghij", 2048.0, True),
        ("", "abcd", 2048.0, False),
        ("abcd", "abcdefghij", math.inf, True),
    ],
)
def test_both_bounds_must_hold(cached: str, prompt: str, local_tokens: float, local: bool) -> None:
    peer = Peer("dynamo_conditional", "p0 d0", local_tokens=local_tokens)
    peer.cached("d0", cached)
    decision = peer.place("a", prompt)
    expected = (Reason.SHORT_PROMPT, "d0") if local else (Reason.LONG_PROMPT, None)
    assert (decision.reason, decision.worker) == expected


def test_split_in_conditional_mode_a_decode_worker_is_chosen_late_by_the_same_cost() -> None:
    peer = Peer("dynamo_conditional", "p0 d0 d1", local_tokens=0.0)
    peer.cached("d0", "ab")
    first = peer.place("a", "abcd")
    assert (first.prefill, first.worker) == ("p0", None)
    assert costs(first) == {"d0": 4 - 2, "d1": 4}
    peer.first_token("a")
    peer.ended("a", None)
    assert peer.place("a", "abcd", output_tokens=1).worker == "d0"
    peer.first_token("a")
    # Blocks a and b are live at d0 already, and credited.
    assert costs(peer.place("b", "abxy", output_tokens=1)) == {"d0": 4 + 2 - 2, "d1": 4}
