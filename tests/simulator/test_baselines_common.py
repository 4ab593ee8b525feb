"""What all peers' policies have in common."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protos.errors import ConfigError
from router.core.candidates import Candidate
from router.core.events import Role
from router.core.placement import Reason
from simulator.baselines import BASELINES
from tests.simulator.peer import (
    BLOCK_TOKENS,
    Peer,
    chosen_over_seeds,
    costs,
    setup,
)

LATE = ("dynamo_kv", "dynamo_conditional")
"""Their decode workers are chosen once the first token is made."""
every_policy = pytest.mark.parametrize("name", BASELINES)


@every_policy
def test_without_prefill_workers_all_are_placed_as_a_whole(name: str) -> None:
    decision = Peer(name, "d0 d1").place("a", "abc")
    assert (decision.reason, decision.prefill) == (Reason.NO_PREFILL_POOL, None)
    assert decision.worker in ("d0", "d1")
    assert decision.prompt_tokens == 30


@every_policy
def test_prefill_workers_that_should_be_there_are_missed(name: str) -> None:
    peer = Peer(name, "p0 d0")
    peer.down("p0")
    assert peer.place("a").reason is Reason.PREFILL_DOWN


@every_policy
def test_with_prefill_workers_all_are_split(name: str) -> None:
    decision = Peer(name, "p0 p1 d0 d1", **_never_local(name)).place("a", "abc")
    assert decision.reason is Reason.LONG_PROMPT
    assert decision.prefill in ("p0", "p1")
    assert decision.worker in ((None,) if name in LATE else ("d0", "d1"))


@every_policy
def test_without_decode_workers_a_prefill_worker_takes_it_whole(name: str) -> None:
    decision = Peer(name, "p0 p1").place("a")
    assert (decision.reason, decision.prefill) == (Reason.DECODE_DOWN, None)
    assert decision.worker in ("p0", "p1")


@every_policy
def test_what_goes_on_does_so_on_a_decode_worker(name: str) -> None:
    for workers in ("d0 d1", "p0 d0 d1"):
        decision = Peer(name, workers).place("a", "abc", output_tokens=7)
        assert (decision.reason, decision.prefill) == (Reason.RESUME, None)
        assert decision.worker in ("d0", "d1")


@every_policy
@pytest.mark.parametrize(
    ("shape", "reason"),
    [
        ({"max_tokens": 1}, Reason.ONE_TOKEN),
        ({"prompt_logprobs": True}, Reason.PROMPT_LOGPROBS),
    ],
)
def test_what_cannot_be_split_is_placed_whole(
    name: str, shape: dict[str, Any], reason: Reason
) -> None:
    decision = Peer(name, "p0 d0").place("a", **shape)
    assert (decision.reason, decision.worker, decision.prefill) == (reason, "d0", None)


@every_policy
def test_nobody_can_take_it(name: str) -> None:
    peer = Peer(name, "p0 d0")
    peer.down("p0")
    peer.down("d0")
    assert peer.ask("a") is None


@every_policy
def test_a_worker_that_is_down_is_not_chosen_though_it_has_everything(name: str) -> None:
    peer = Peer(name, "d0 d1")
    peer.cached("d0", "abc")
    peer.place_on("d0", 1, "abc", 30)
    peer.place_on("d1", 3)
    peer.down("d0")
    assert peer.place("a", "abc").worker == "d1"


@every_policy
def test_the_same_seed_chooses_the_same(name: str) -> None:
    def chosen() -> list[str | None]:
        peer = Peer(name, "d0 d1 d2 d3", seed=5)
        return [peer.place(str(number), "abc"[number % 3 :]).worker for number in range(20)]

    assert chosen() == chosen()


FIRST_OF_EQUALS = {"mooncake", "mooncake_rejecting", "round_robin", "sglang_cache_aware"}


@pytest.mark.parametrize("name", set(BASELINES) - FIRST_OF_EQUALS)
def test_equals_are_broken_by_the_seed(name: str) -> None:
    assert chosen_over_seeds(name, "d0 d1 d2") == {"d0", "d1", "d2"}


@pytest.mark.parametrize("name", ["mooncake", "round_robin", "sglang_cache_aware"])
def test_some_peers_take_the_first_of_equals(name: str) -> None:
    assert chosen_over_seeds(name, "d0 d1 d2") == {"d0"}


@every_policy
def test_an_unknown_knob_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="unknown knob nonsense"):
        BASELINES[name](setup(nonsense=1.0))


def test_the_nearest_knob_is_named() -> None:
    with pytest.raises(ConfigError, match="unknown knob tetha: did you mean theta"):
        BASELINES["mooncake"](setup(tetha=1.0))
    with pytest.raises(ConfigError, match="did you mean cache_threshold"):
        BASELINES["sglang_cache_aware"](setup(cach_threshold=1.0))


def _never_local(name: str) -> dict[str, Any]:
    return {"local_tokens": 0.0} if name == "dynamo_conditional" else {}


# Whatever happens

names = st.sampled_from("abcdef")
prompts = st.text("xy", max_size=6)
workers = st.sampled_from(["p0", "p1", "d0", "d1", "d2"])
operations = st.lists(
    st.one_of(
        st.tuples(st.just("place"), names, prompts, st.sampled_from([0, 0, 0, 1, 5])),
        st.tuples(st.just("first_token"), names),
        st.tuples(st.just("ended"), names),
        st.tuples(st.just("down"), workers),
        st.tuples(st.just("up"), workers),
        st.tuples(st.just("load"), workers, st.integers(0, 9), st.integers(0, 9)),
        st.tuples(st.just("cached"), workers, prompts),
        st.tuples(st.just("wait"), st.sampled_from([0.01, 0.1, 61.0, 1300.0])),
    ),
    max_size=40,
)


class Anything:
    """Does what it is told to, and looks at every decision."""

    def __init__(self, name: str, layout: str) -> None:
        self.peer = Peer(name, layout)
        self.late = name in LATE
        self.layout = layout.split()

    def do(self, what: str, *given: Any) -> None:
        peer = self.peer
        if what == "place":
            self.place(*given)
        elif what == "wait":
            peer.now_s += given[0]
        elif what in ("first_token", "ended"):
            getattr(peer, what)(given[0])
        elif given[0] in self.layout:
            worker, *rest = given
            if what == "load":
                peer.load(worker, rest[0], rest[1], used=10 * rest[0])
            else:
                getattr(peer, what)(*given)

    def place(self, name: str, prompt: str, output_tokens: int) -> None:
        peer = self.peer
        tokens = BLOCK_TOKENS * len(prompt) + 3
        decision = peer.ask(name, prompt, prompt_tokens=tokens, output_tokens=output_tokens)
        prefill = [each.id for each in peer.pool.usable(Role.PREFILL)]
        decode = [each.id for each in peer.pool.usable(Role.DECODE)]
        if decision is None:
            assert not prefill
            assert not decode
            return
        if decision.prefill is not None:
            assert decision.prefill in prefill
            assert not output_tokens
        if decision.worker is not None:
            assert decision.worker in (decode or prefill)
        else:
            assert self.late
            assert decision.prefill is not None
        for chosen in (decision.prefill, decision.worker):
            assert chosen is None or any(each.worker == chosen for each in decision.candidates)
        assert decision.as_json()["reason"] == decision.reason


@every_policy
@pytest.mark.parametrize("layout", ["d0 d1 d2", "p0 p1 d0 d1 d2"])
@given(told=operations)
def test_all_that_is_counted_goes_when_all_have_ended(
    name: str, layout: str, told: list[tuple[Any, ...]]
) -> None:
    anything = Anything(name, layout)
    for operation in told:
        anything.do(*operation)
    for request in "abcdef":
        anything.peer.ended(request)
    policy = anything.peer.policy
    assert policy.counts.idle
    if live := getattr(policy, "live", None):
        assert live.idle


def test_candidates_tell_the_least_cost_of_the_one_chosen() -> None:
    """For those that have a cost to tell."""
    for name in set(BASELINES) - {"random", "round_robin"}:
        peer = Peer(name, "d0 d1 d2")
        peer.place_on("d1", 2)
        decision = peer.place("a", "abc")
        best = min(decision.candidates, key=lambda each: each.cost)
        assert isinstance(best, Candidate)
        assert costs(decision)[str(decision.worker)] == best.cost
