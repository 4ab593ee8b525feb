"""The hand-over of a front's listener: whoever connects around it is answered by one side."""

from __future__ import annotations

import contextlib
import gc
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from router.unit.fronts.loading import Loading

CLIENTS = 4
ROUNDS = 25
REQUEST = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
SERVED = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


@pytest.fixture
def listener(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(tmp_path / "front.sock"))
        made.listen(4096)
        yield made


@pytest.fixture
def without_collection() -> Iterator[None]:
    """As in a front, which freezes what it has loaded: a lost connection is never closed."""
    gc.disable()
    yield
    gc.enable()


class Clients:
    """Ask all the time; `answers` are their status lines, "" for a connection that was cut."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._stop = threading.Event()
        self.answers: list[str] = []
        self._threads = [threading.Thread(target=self._ask) for _ in range(CLIENTS)]
        for thread in self._threads:
            thread.start()

    def wait_for(self, answers: int) -> None:
        while len(self.answers) < answers:
            time.sleep(0.002)

    def end(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _ask(self) -> None:
        while not self._stop.is_set():
            with socket.socket(socket.AF_UNIX) as client:
                client.settimeout(5)
                answer = b""
                with contextlib.suppress(ConnectionError):
                    client.connect(self._path)
                    client.sendall(REQUEST)
                    try:
                        answer = client.recv(4096)
                    except TimeoutError:
                        answer = b"nothing within 5 s"
                self.answers.append(answer.split(b"\r\n")[0].decode())


@contextlib.contextmanager
def successor(listener: socket.socket) -> Iterator[None]:
    """Takes the listener over, as vLLM's server does."""
    over = threading.Event()
    listener.settimeout(0.1)

    def serve() -> None:
        while not over.is_set():
            with contextlib.suppress(TimeoutError):
                client, _ = listener.accept()
                with client:
                    client.settimeout(5)
                    client.recv(4096)
                    client.sendall(SERVED)

    thread = threading.Thread(target=serve)
    thread.start()
    yield
    over.set()
    thread.join()


@pytest.mark.usefixtures("without_collection")
def test_each_client_of_a_hand_over_is_answered(listener: socket.socket) -> None:
    answers: list[str] = []
    for _ in range(ROUNDS):
        loading = Loading(listener)
        clients = Clients(listener.getsockname())
        clients.wait_for(200)
        loading.close()
        with successor(listener):
            clients.wait_for(len(clients.answers) + 50)
            clients.end()
        answers += clients.answers
    kinds = {line: answers.count(line) for line in answers}
    assert kinds.keys() == {"HTTP/1.1 503 Service Unavailable", "HTTP/1.1 200 OK"}, kinds
