"""The edge when clients are slow or silent, fronts die, and the router is away."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from running_edge import RunningEdge, read_answer
from running_unit import eventually

from router.unit.edge import configuration as edge_module

COMPLETIONS = "/v1/completions"
MESSAGES = "/v1/messages"
BODY = {"prompt": "a"}
SILENT_CLIENT_S = 3.0
HEAD = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: a\r\n".encode()


@pytest.fixture(scope="module")
def edge(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningEdge]:
    """Shared; every test leaves it serving."""
    edge = RunningEdge(tmp_path_factory.mktemp("edge") / "u", silent_client_s=SILENT_CLIENT_S)
    yield edge
    edge.end()


def message_in(path: str, body: Any) -> str:
    """Of an error in the form of the path's API."""
    assert set(body) == ({"type", "error"} if path == MESSAGES else {"error"})
    return str(body["error"]["message"])


def start_stream(edge: RunningEdge, events: int, pause_s: float) -> http.client.HTTPResponse:
    response = edge.request("POST", COMPLETIONS, BODY, {"X-Do": f"stream {events} {pause_s}"})
    assert response.status == 200
    return response


# Clients


HALVES = [
    (b"", 408),
    (HEAD, 408),
    (HEAD + b"Content-Length: 100\r\n\r\n{", 408),
    (HEAD + b"Transfer-Encoding: chunked\r\n\r\n9\r\n{", 408),
    # Too large for the edge to wait for: a front already has the first part.
    (HEAD + b"Content-Length: 500000\r\n\r\n" + b" " * 200_000, 400),
    (HEAD + b"Transfer-Encoding: chunked\r\n\r\n80000\r\n" + b" " * 200_000, 400),
]


def test_half_a_request_and_silence(edge: RunningEdge) -> None:
    full = edge.fronts["full"]
    before = full.cancelled
    connections = [edge.connect() for _ in HALVES]
    for connection, (sent, _) in zip(connections, HALVES, strict=True):
        connection.sendall(sent)
    assert edge.post(COMPLETIONS, BODY)[0] == 200
    for connection, (_, status) in zip(connections, HALVES, strict=True):
        assert read_answer(connection)[0] == status
        assert connection.recv(1) == b""
        connection.close()
    eventually(lambda: full.cancelled == before + 2)


@pytest.mark.parametrize(
    "sent", [HEAD, HEAD + b"Content-Length: 9\r\n\r\n{", HEAD + b"Content-Length: 99999\r\n\r\n{"]
)
def test_half_a_request_and_an_end(edge: RunningEdge, sent: bytes) -> None:
    before = len(edge.questions)
    with edge.connect() as connection:
        connection.sendall(sent)
        connection.shutdown(socket.SHUT_WR)
        assert read_answer(connection)[0] in (0, 400)
    assert len(edge.questions) == before
    assert edge.post(COMPLETIONS, BODY)[0] == 200


def test_a_head_that_trickles(edge: RunningEdge) -> None:
    """Never silent, and never done: ended all the same."""
    started_s = time.monotonic()
    with edge.connect() as connection:
        connection.sendall(HEAD)
        connection.settimeout(0.5)
        while True:
            try:
                assert read_answer(connection)[0] == 408
                break
            except TimeoutError:
                connection.sendall(b"X: y\r\n")
    assert time.monotonic() - started_s < 30


def test_readers_that_stop_reading(edge: RunningEdge) -> None:
    """They are given up; until then they hold little memory, and nobody else."""
    fast, clients, events = edge.fronts["fast"], 10, 20_000
    cancelled, written, memory_bytes = fast.cancelled, fast.written, edge.memory_bytes()
    stuck = [start_stream(edge, events, 0) for _ in range(clients)]
    other = start_stream(edge, 20, 0.001)
    body = other.read()
    assert fast.cancelled == cancelled, "the other stream waited for them"
    assert body.count(b"data: ") == 20
    eventually(lambda: fast.cancelled == cancelled + clients, 30)
    for response in stuck:
        assert edge.log_of(response.headers["X-Request-Id"])["end"][0] == "c"
        response.close()
    assert (fast.written - written) / clients < 4_000_000
    assert edge.memory_bytes() - memory_bytes < 10_000_000


@pytest.mark.parametrize(("what", "end"), [("silence 60", "CH"), ("stream 100000 0.01", "CD")])
def test_a_client_that_leaves(edge: RunningEdge, what: str, end: str) -> None:
    """Its front is told, before the answer began and after."""
    fast = edge.fronts["fast"]
    requests, cancelled = fast.requests, fast.cancelled
    data = json.dumps(BODY).encode()
    with edge.connect() as connection:
        connection.sendall(HEAD + f"X-Do: {what}\r\nContent-Length: {len(data)}\r\n\r\n".encode())
        connection.sendall(data)
        eventually(lambda: fast.requests == requests + 1)
        if end == "CD":
            assert connection.recv(1) == b"H"
    eventually(lambda: fast.cancelled == cancelled + 1)
    assert edge.log_of(f"T{len(edge.granted)}")["end"] == end


# Fronts


@pytest.mark.parametrize("path", [COMPLETIONS, MESSAGES])
def test_a_front_that_dies_without_an_answer(edge: RunningEdge, path: str) -> None:
    for _ in range(3):  # Also on a connection that was used before.
        assert edge.post(path, BODY)[0] == 200
        requests = sum(front.requests for front in edge.fronts.values())
        status, answer, headers = edge.post(path, BODY, {"X-Do": "die"})
        assert status == 502
        assert "ended" in message_in(path, answer)
        assert edge.log_of(headers["X-Request-Id"])["end"] == "SH"
        # Nothing that it may have begun was sent again.
        assert sum(front.requests for front in edge.fronts.values()) == requests + 1


def test_a_front_that_dies_in_an_answer(edge: RunningEdge) -> None:
    response = edge.request("POST", COMPLETIONS, BODY, {"X-Do": "break"})
    assert response.status == 200
    with pytest.raises(http.client.IncompleteRead):
        response.read()
    assert edge.log_of(response.headers["X-Request-Id"])["end"] == "SD"


@pytest.mark.parametrize(("path", "name"), [(COMPLETIONS, "fast"), (MESSAGES, "full")])
def test_a_front_that_is_away(edge: RunningEdge, path: str, name: str) -> None:
    front = edge.fronts[name]
    edge.run(front.stop())
    try:
        status, answer, headers = edge.post(path, BODY)
        assert (status, headers["Content-Type"]) == (503, "application/json")
        assert int(headers["Retry-After"]) > 0
        assert "starting" in message_in(path, answer)
    finally:
        edge.run(front.start())
    eventually(lambda: edge.post(path, BODY)[0] == 200)


@pytest.mark.parametrize("path", [COMPLETIONS, MESSAGES])
def test_why_a_front_failed(edge: RunningEdge, path: str) -> None:
    """The router knows; a front only says that something went wrong."""

    def answer(question: str) -> str:
        if question.startswith("why\t"):
            return "503\t2\tits worker died\t-"
        return edge.grant(question)

    edge.answer = answer
    try:
        status, body, headers = edge.post(path, BODY, {"X-Do": "status 500 Oops"})
    finally:
        edge.answer = edge.grant
    assert (status, headers["Retry-After"]) == (503, "2")
    assert message_in(path, body) == "its worker died"
    assert edge.questions[-1] == f"why\t{headers['X-Request-Id']}"


def test_a_fronts_own_words_where_the_router_knows_nothing(edge: RunningEdge) -> None:
    edge.answer = lambda question: "-" if question.startswith("why") else edge.grant(question)
    try:
        status, body, _ = edge.post(COMPLETIONS, BODY, {"X-Do": 'status 500 {"error":"Oops"}'})
    finally:
        edge.answer = edge.grant
    assert (status, body) == (500, {"error": "Oops"})
    assert edge.post(COMPLETIONS, BODY, {"X-Do": 'status 422 {"a":1}'})[:2] == (422, {"a": 1})


# The router


def test_a_router_that_returns_loses_nothing(edge: RunningEdge) -> None:
    edge.stop_router()
    with ThreadPoolExecutor(16) as pool:
        waiting = [pool.submit(edge.post, COMPLETIONS, BODY) for _ in range(16)]
        time.sleep(0.3)
        edge.start_tickets()
        edge.start_log()
        assert [request.result()[0] for request in waiting] == [200] * 16


def test_a_router_that_dies_over_a_question(edge: RunningEdge) -> None:
    deaths = iter([None, None])
    edge.answer = lambda question: next(deaths, edge.grant(question))
    try:
        assert edge.post(COMPLETIONS, BODY)[0] == 200
    finally:
        edge.answer = edge.grant


def test_a_router_that_stays_away(edge: RunningEdge) -> None:
    edge.stop_router()
    started_s = time.monotonic()
    status, answer, headers = edge.post(COMPLETIONS, BODY)
    waited_s = time.monotonic() - started_s
    edge.start_tickets()
    edge.start_log()
    assert (status, headers["Retry-After"]) == (503, "1")
    assert "router" in message_in(COMPLETIONS, answer)
    assert 2.5 < waited_s < 10
    assert edge.post(COMPLETIONS, BODY)[0] == 200


def test_a_router_that_hangs(edge: RunningEdge) -> None:
    """Also on connections that are kept, of which there may be many."""
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: edge.post(COMPLETIONS, BODY), range(32)))
    wakes = threading.Event()
    edge.answer = lambda _: "200\tlate" if wakes.wait(60) else None
    started_s = time.monotonic()
    try:
        status, answer, _ = edge.post(COMPLETIONS, BODY)
    finally:
        wakes.set()
        edge.answer = edge.grant
    assert (status, "router" in message_in(COMPLETIONS, answer)) == (503, True)
    assert 2.5 < time.monotonic() - started_s < 10
    # Its late answer is nobody else's.
    assert edge.post(COMPLETIONS, BODY)[2]["X-Request-Id"] in edge.granted


def test_lines_go_on_after_a_routers_death(edge: RunningEdge) -> None:
    edge.stop_router()
    edge.start_tickets()
    edge.start_log()
    before = len(edge.logged)
    eventually(lambda: edge.post(COMPLETIONS, BODY)[0] == 200 and len(edge.logged) > before)


# Edges of their own


def test_lines_are_kept_until_a_router_listens(tmp_path: Path) -> None:
    edge = RunningEdge(tmp_path / "u", log=False)
    try:
        tickets = [edge.post(COMPLETIONS, BODY)[2]["X-Request-Id"] for _ in range(100)]
        edge.start_log()
        assert [edge.log_of(ticket)["status"] for ticket in tickets] == ["200"] * len(tickets)
    finally:
        edge.end()


def test_before_the_full_front_serves(tmp_path: Path) -> None:
    edge = RunningEdge(tmp_path / "u", full=False)
    try:
        # Until its first check fails, the edge takes it for there.
        eventually(lambda: edge.post(MESSAGES, {})[2]["Retry-After"] == "5")
        before = len(edge.questions)
        for path, body in ((COMPLETIONS, {"prompt": "a", "n": 2}), (MESSAGES, {})):
            status, answer, headers = edge.post(path, body)
            assert (status, headers["Retry-After"]) == (503, "5")
            assert "starting" in message_in(path, answer)
        assert len(edge.questions) == before
        assert edge.post(COMPLETIONS, BODY)[1]["front"] == "fast"
        assert edge.request("GET", "/health").status == 200
        edge.run(edge.fronts["full"].start())
        eventually(lambda: edge.post(MESSAGES, {})[0] == 200)
        assert edge.post(COMPLETIONS, {"prompt": "a", "n": 2})[1]["front"] == "full"
    finally:
        edge.end()


def test_without_a_fast_front(tmp_path: Path) -> None:
    edge = RunningEdge(tmp_path / "u", vllm_rs=None)
    try:
        for path in (COMPLETIONS, MESSAGES):
            assert edge.post(path, BODY)[1]["front"] == "full"
        edge.run(edge.fronts["full"].stop())
        eventually(lambda: edge.request("GET", "/health").status == 503)
    finally:
        edge.end()


def test_connections_to_the_router_that_were_idle_for_too_long_cost_nobody_an_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(edge_module, "TICKET_IDLE_S", 1)
    edge = RunningEdge(tmp_path / "u", log=False)
    try:
        with ThreadPoolExecutor(8) as pool:
            asked = [pool.submit(edge.post, COMPLETIONS, BODY) for _ in range(32)]
            assert {each.result()[0] for each in asked} == {200}
        assert edge.open_connections
        eventually(lambda: edge.open_connections == 0)
        for _ in range(32):
            assert edge.post(COMPLETIONS, BODY)[0] == 200
    finally:
        edge.end()
