"""The anchor's questions to a front, over a real socket and on a virtual clock."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from router.unit.anchor.probe import ASK_EVERY_S, HANGS_S, MOST_SILENCES, Probe
from router.unit.anchor.reactor import Reactor

HEALTHY = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"
LOADING = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n"
LOOK_S = 0.2


class Rig:
    """A front that answers when it is told to."""

    def __init__(self, path: Path) -> None:
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.listener.bind(str(path))
        self.listener.listen(1)
        self.listener.settimeout(5)
        self.reactor = Reactor()
        self.cpu_s = 0.0
        self.computes = False
        self.probe = Probe(self.reactor, path, "/health", 200, lambda: self.cpu_s)
        self.now_s = 0.0

    def answer(self, with_bytes: bytes) -> None:
        assert not self.probe.hangs(self.now_s)
        connection, _ = self.listener.accept()
        with connection:
            assert connection.recv(4096).startswith(b"GET /health HTTP/1.1\r\n")
            connection.sendall(with_bytes)
            self.reactor.turn(5)
        self.now_s += ASK_EVERY_S

    def silent_for_s(self, limit_s: float) -> float | None:
        """Look on; after which time it was found to hang."""
        began_s = self.now_s
        while self.now_s < began_s + limit_s:
            if self.probe.hangs(self.now_s):
                return self.now_s - began_s
            self.reactor.turn(0)
            self.now_s += LOOK_S
            self.cpu_s += LOOK_S / 2 if self.computes else 0.0
        return None


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    rig = Rig(tmp_path / "http.sock")
    yield rig
    rig.probe.close()
    rig.listener.close()


def test_one_that_was_healthy_and_falls_silent_hangs(rig: Rig) -> None:
    for _ in range(3):
        rig.answer(HEALTHY)
    found_s = rig.silent_for_s(100)
    assert found_s is not None
    assert HANGS_S <= found_s < HANGS_S + 3 * LOOK_S


def test_one_that_loads_may_take_its_time(rig: Rig) -> None:
    rig.answer(LOADING)
    assert rig.silent_for_s(100) is None
    rig.listener.accept()[0].close()  # Its thread for the time being ends.
    rig.reactor.turn(5)
    rig.now_s += ASK_EVERY_S
    rig.answer(HEALTHY)
    assert rig.silent_for_s(100) is not None


def test_one_whose_backlog_is_full_hangs(rig: Rig) -> None:
    rig.answer(HEALTHY)
    crowd = [socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) for _ in range(4)]
    for client in crowd:
        client.setblocking(False)
        client.connect_ex(rig.listener.getsockname())
    assert rig.silent_for_s(100) is not None
    for client in crowd:
        client.close()


def test_one_that_computes_gets_more_time_but_not_for_ever(rig: Rig) -> None:
    rig.answer(HEALTHY)
    rig.computes = True
    found_s = rig.silent_for_s(1000)
    assert found_s is not None
    assert MOST_SILENCES * HANGS_S <= found_s < MOST_SILENCES * (HANGS_S + 3 * LOOK_S)


def test_one_that_answers_after_it_computed_begins_anew(rig: Rig) -> None:
    rig.answer(HEALTHY)
    rig.computes = True
    assert rig.silent_for_s((MOST_SILENCES - 1) * HANGS_S) is None
    connection, _ = rig.listener.accept()
    connection.close()
    rig.reactor.turn(5)
    rig.now_s += ASK_EVERY_S
    assert rig.silent_for_s((MOST_SILENCES - 1) * HANGS_S) is None


def test_one_whose_socket_is_gone_is_asked_again(rig: Rig) -> None:
    rig.answer(HEALTHY)
    Path(rig.listener.getsockname()).unlink()
    assert rig.silent_for_s(100) is not None
