"""Messages of the anchor's link, cut out of a byte stream."""

from __future__ import annotations

import collections
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protos import anchor_link
from protos.errors import ProtocolError

MESSAGES = st.lists(
    st.builds(
        anchor_link.Add,
        st.integers(0, 3),
        st.text(max_size=20),
        st.binary(max_size=200),
    ),
    max_size=8,
)


@given(MESSAGES, st.lists(st.integers(0, 2000), max_size=12))
def test_messages_survive_any_cutting_of_the_stream(
    messages: list[anchor_link.Add], cuts: list[int]
) -> None:
    stream = b"".join(anchor_link.encode(message) for message in messages)
    edges = sorted({0, *(cut % (len(stream) + 1) for cut in cuts), len(stream)})
    splitter = anchor_link.Splitter()
    room = bytearray(len(stream) + 1)
    got = []
    for begin, end in itertools.pairwise(edges):
        room[: end - begin] = stream[begin:end]
        # Read from a buffer that is used again, as the anchor does.
        for body in splitter.feed(memoryview(room)[: end - begin]):
            got.append(anchor_link.from_anchor_decoder.decode(body))
    assert got == messages


@pytest.mark.parametrize("first_bytes", [2, 6])
def test_an_impossible_length_is_an_error(first_bytes: int) -> None:
    stream = b"\xff\xff\xff\xff" + b"rest"
    splitter = anchor_link.Splitter()
    parts = [stream[:first_bytes], stream[first_bytes:]]
    with pytest.raises(ProtocolError):
        collections.deque((list(splitter.feed(part)) for part in parts), maxlen=0)
