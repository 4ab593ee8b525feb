from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protos import enginecore
from protos.anchor_link import Abort, Add, Delivery, FrontGone, Snapshot, Underway
from router.unit.anchor import relay as relay_module
from router.unit.anchor.relay import Given, Relay

FRONT = 0


def add_payload(request_id: str) -> bytes:
    request = enginecore.EngineRequest(request_id, [1], None, None, None, 0.0, None, None, None)
    return enginecore.encode(request)


def delivery(
    request_id: str, first: int, tokens: list[int], *, end: bool = False, logprobs: bool = False
) -> Delivery:
    output = enginecore.EngineOutput(
        request_id, tokens, finish_reason=enginecore.FINISH_STOP if end else None
    )
    if logprobs:
        output.new_logprobs = msgspec.Raw(msgspec.msgpack.encode([1, 2, 3]))
    return Delivery(request_id, first, len(tokens), end, enginecore.encode(output))


def relay_with(*request_ids: str) -> Relay:
    relay = Relay()
    for request_id in request_ids:
        relay.add(FRONT, add_payload(request_id))
    return relay


def underway(relay: Relay) -> list[Underway]:
    return [request for part in relay.snapshot() for request in part.underway]


def test_what_fits_is_forwarded_byte_for_byte() -> None:
    relay = relay_with("a", "b")
    outputs = [delivery("a", 0, [7]), delivery("b", 0, [8, 9], end=True), delivery("a", 1, [7])]
    assert relay.deliver(FRONT, outputs) == Given([output.payload for output in outputs], [])
    assert list(relay.snapshot()) == [Snapshot([Underway(FRONT, "a", add_payload("a"), 2)])]


def test_what_was_given_is_dropped() -> None:
    relay = relay_with("a")
    relay.deliver(FRONT, [delivery("a", 0, [7, 8, 9])])
    again = [delivery("a", 0, [7]), delivery("a", 1, [8, 9]), delivery("a", 0, [7, 8])]
    assert relay.deliver(FRONT, again) == Given()


def test_an_output_given_in_part_is_cut() -> None:
    relay = relay_with("a")
    relay.deliver(FRONT, [delivery("a", 0, [7, 8])])
    given = relay.deliver(FRONT, [delivery("a", 1, [8, 9], end=True)])
    assert given == Given([delivery("a", 2, [9], end=True).payload], [])


def test_an_end_is_given_though_its_tokens_were() -> None:
    relay = relay_with("a")
    relay.deliver(FRONT, [delivery("a", 0, [7], logprobs=True)])
    given = relay.deliver(FRONT, [delivery("a", 0, [7], end=True, logprobs=True)])
    assert given == Given([delivery("a", 1, [], end=True).payload], [])
    assert list(relay.snapshot()) == [Snapshot([])]


def test_a_gap_ends_the_request_with_an_error() -> None:
    relay = relay_with("a", "b")
    given = relay.deliver(FRONT, [delivery("a", 1, [8]), delivery("b", 0, [7])])
    assert given.broken == ["a"]
    error, output = (enginecore.decode_output(payload) for payload in given.payloads)
    assert (error.request_id, error.finish_reason) == ("a", enginecore.FINISH_ERROR)
    assert output.request_id == "b"
    assert relay.deliver(FRONT, [delivery("a", 0, [7])]) == Given()


def test_a_cut_through_logprobs_ends_the_request_with_an_error() -> None:
    relay = relay_with("a")
    relay.deliver(FRONT, [delivery("a", 0, [7], logprobs=True)])
    assert relay.deliver(FRONT, [delivery("a", 0, [7, 8], logprobs=True)]).broken == ["a"]


def test_an_abort_names_only_what_has_not_ended() -> None:
    relay = relay_with("a", "b")
    relay.deliver(FRONT, [delivery("a", 0, [7], end=True)])
    assert relay.abort(FRONT, enginecore.encode(["a", "b", "c"])) == Abort(FRONT, ["b"])
    assert relay.abort(FRONT, enginecore.encode(["b"])) is None
    assert list(relay.snapshot()) == [Snapshot([])]


def test_a_front_that_is_gone_takes_only_its_own_requests_along() -> None:
    relay = relay_with("a")
    assert relay.add(1, add_payload("b")) == Add(1, "b", add_payload("b"))
    assert relay.front_gone(FRONT) == FrontGone(FRONT)
    assert relay.deliver(FRONT, [delivery("a", 0, [7])]) == Given()
    assert list(relay.snapshot()) == [Snapshot([Underway(1, "b", add_payload("b"), 0)])]


def test_without_a_router_everything_ends_once() -> None:
    relay = relay_with("a", "b")
    errors = [enginecore.error_output("a"), enginecore.error_output("b")]
    assert relay.end_all() == {FRONT: errors}
    assert relay.end_all() == {}


def test_only_newer_incarnations_are_admitted() -> None:
    relay = Relay()
    assert [relay.admits(number) for number in (5, 5, 9, 5, 8, 10)] == [
        True,
        True,
        True,
        False,
        False,
        True,
    ]


LENGTH_TOKENS = 12
REQUESTS = ("a", "b", "c")
sendings = st.tuples(
    st.sampled_from(REQUESTS),
    st.integers(0, 4),  # how far before what its router knows to have been sent it starts
    st.lists(st.integers(1, 3), max_size=5),  # the sizes of its outputs
)
lives = st.lists(st.lists(sendings, max_size=12), max_size=6)


def outputs_of(request_id: str, first: int, sizes: list[int]) -> list[Delivery]:
    """As an engine makes them: token p of a request is p, the end comes with the last one."""
    outputs = []
    for size in sizes:
        tokens = list(range(first, min(first + size, LENGTH_TOKENS)))
        if not tokens:
            break
        first += len(tokens)
        outputs.append(delivery(request_id, tokens[0], tokens, end=first == LENGTH_TOKENS))
    return outputs


class Front:
    def __init__(self) -> None:
        self.tokens: dict[str, list[int]] = {request_id: [] for request_id in REQUESTS}
        self.ends: list[str] = []

    def take(self, given: Given) -> None:
        assert not given.broken
        for payload in given.payloads:
            output = enginecore.decode_output(payload)
            assert output.request_id not in self.ends
            self.tokens[output.request_id] += output.new_token_ids
            if output.finish_reason is not None:
                self.ends.append(output.request_id)


@given(lives)
def test_a_front_gets_each_token_once_and_in_order(
    lives: list[list[tuple[str, int, list[int]]]],
) -> None:
    """Whatever routers send again, and wherever they die."""
    relay = relay_with(*REQUESTS)
    front = Front()
    for life in lives:
        # All that a new router knows is the snapshot.
        sent = {request.request_id: request.given_tokens for request in underway(relay)}
        for request_id, before, sizes in life:
            if request_id in sent:
                first = max(0, sent[request_id] - before)
                outputs = outputs_of(request_id, first, sizes)
                front.take(relay.deliver(FRONT, outputs))
                sent[request_id] = max([sent[request_id], *map(end_of, outputs)])
        for request_id, tokens in front.tokens.items():
            assert tokens == list(range(len(tokens))), request_id
    for request in underway(relay):
        rest = outputs_of(request.request_id, request.given_tokens, [1] * LENGTH_TOKENS)
        front.take(relay.deliver(FRONT, rest))
    assert sorted(front.ends) == list(REQUESTS)
    assert all(tokens == list(range(LENGTH_TOKENS)) for tokens in front.tokens.values())
    assert list(relay.snapshot()) == [Snapshot([])]


def end_of(output: Delivery) -> int:
    return output.first_position + output.token_count


def test_a_large_snapshot_comes_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relay_module, "SNAPSHOT_BYTES", 2 * len(add_payload("a")))
    relay = relay_with("a", "b", "c", "d", "e")
    parts = list(relay.snapshot())
    assert [[each.request_id for each in part.underway] for part in parts] == [
        ["a", "b"],
        ["c", "d"],
        ["e"],
    ]
    assert [part.more for part in parts] == [True, True, False]
