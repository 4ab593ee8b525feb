"""The anchor's link to a front over real sockets: a front that takes nothing is found out."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq

from router.unit.anchor import links
from router.unit.anchor.links import FrontLink

MESSAGE = bytes(64 * 1024)
MORE_THAN_BUFFERS_HOLD = 4000


class Front:
    """Its two ends; it reads outputs when it is told to."""

    def __init__(self, directory: Path) -> None:
        self._context: zmq.Context[Any] = zmq.Context()
        self.outputs = self._context.socket(zmq.PULL)
        self.outputs.setsockopt(zmq.RCVHWM, 1)
        self.outputs.bind(f"ipc://{directory / 'output'}")
        requests = self._context.socket(zmq.ROUTER)
        requests.bind(f"ipc://{directory / 'input'}")
        self.link = FrontLink(self._context, directory / "input", directory / "output")
        self._ends = (self.outputs, requests)

    def close(self) -> None:
        self.link.close()
        for end in self._ends:
            end.close(linger=0)
        self._context.term()


@pytest.fixture
def front(tmp_path: Path) -> Iterator[Front]:
    front = Front(tmp_path)
    yield front
    front.close()


def test_a_front_that_takes_nothing_is_stalled_until_it_takes_something(front: Front) -> None:
    sent = 0
    while not front.link.waiting():
        front.link.send(MESSAGE, now_s=1.0)
        sent += 1
        assert sent < MORE_THAN_BUFFERS_HOLD
    assert front.link.stalled_for_s(now_s=4.0) == 3.0
    front.link.send(MESSAGE, now_s=5.0)
    front.link.flush(now_s=5.5)
    assert front.link.stalled_for_s(now_s=6.0) == 5.0
    for _ in range(sent + 1):
        assert front.outputs.recv() == MESSAGE
        front.link.flush(now_s=7.0)
    assert not front.link.waiting()
    assert front.link.stalled_for_s(now_s=100.0) == 0.0


def test_what_a_front_may_leave_is_limited(front: Front, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(links, "_MAX_UNREAD_BYTES", 10 * len(MESSAGE))
    sent = 0
    while not front.link.left_too_much():
        front.link.send(MESSAGE, now_s=0.0)
        sent += 1
        assert sent < MORE_THAN_BUFFERS_HOLD
    assert sent > 10
