"""vLLM's Python API server as a front: the anchor is real, the router is a fake."""

from __future__ import annotations

import json
import os
import signal
import socket
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from running_unit import MODEL_NAME, Unit, build_model, eventually

from router.settings import UnitPaths
from router.unit.fronts import launch as fronts

TICKET = "0123456789abcdef" * 2
PACE_S = 0.01
START_S = 150.0
CHAT = [{"role": "user", "content": "hello"}]


class FullFront:
    """The front of one unit over its own socket, without the edge; `held` and `failing` are told
    to the fake router."""

    def __init__(self, unit: Unit) -> None:
        self.unit = unit
        self.socket = unit.paths.front_socket(fronts.FULL, "http")
        self.http = connect(unit.paths)

    def post(self, path: str, body: Any, headers: dict[str, str] | None = None) -> httpx.Response:
        content = body if isinstance(body, bytes) else json.dumps({"model": MODEL_NAME, **body})
        return self.http.post(path, content=content, headers=headers_of(headers))

    def events(self, path: str, body: dict[str, Any]) -> Generator[str, None, None]:
        """A stream's events as they come, each with its blank line taken off."""
        content = json.dumps({"model": MODEL_NAME, "stream": True, **body})
        with self.http.stream("POST", path, content=content, headers=headers_of()) as response:
            assert response.status_code == 200, response.read()
            rest = ""
            for text in response.iter_text():
                *events, rest = (rest + text).split("\n\n")
                yield from events
            assert rest == ""

    def serves(self) -> bool:
        """Whether it has loaded; until then it says so, as long as its process runs."""
        answer = self.http.get("/health")
        assert answer.status_code == 200 or int(answer.headers["retry-after"]) >= 1
        return answer.status_code == 200

    def requests(self) -> list[Any]:
        """What came to the router, of all fronts."""
        return [json.loads(line) for line in self.unit.noted("requests")]

    def mark(self, name: str, on: bool) -> None:
        file = self.unit.paths.directory / name
        if on:
            file.touch()
        else:
            file.unlink()


def connect(paths: UnitPaths) -> httpx.Client:
    transport = httpx.HTTPTransport(uds=str(paths.front_socket(fronts.FULL, "http")))
    return httpx.Client(transport=transport, base_url="http://front", timeout=START_S)


def headers_of(more: dict[str, str] | None = None) -> dict[str, str]:
    return {"Content-Type": "application/json", "X-Request-Id": TICKET, **(more or {})}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model(tmp_path_factory.mktemp("full") / "model")


@pytest.fixture(scope="module")
def front(model: Path) -> Iterator[FullFront]:
    """Shared; every test leaves it serving."""
    unit = Unit(model.parent / "u", model, PACE_S, fronts=("fast", "full"))
    try:
        eventually(lambda: unit.paths.anchor_state.exists())
        full = FullFront(unit)
        eventually(full.serves, START_S)
        yield full
    finally:
        unit.end()


def test_a_completion(front: FullFront) -> None:
    answer = front.post("/v1/completions", {"prompt": "abc", "max_tokens": 5}).json()
    assert answer["id"] == f"cmpl-{TICKET}"
    assert answer["choices"][0]["text"] == "abcab"
    assert answer["usage"]["completion_tokens"] == 5


def test_several_prompts_and_several_completions_of_each(front: FullFront) -> None:
    body = {"prompt": ["abc", "de"], "n": 2, "max_tokens": 5, "request_id": "f" * 32}
    before = len(front.requests())
    answer = front.post("/v1/completions", body).json()
    texts = {choice["index"]: choice["text"] for choice in answer["choices"]}
    assert texts == {0: "abcab", 1: "abcab", 2: "deded", 3: "deded"}
    assert [ticket_in(request) for request in front.requests()[before:]] == [True] * 4


def test_a_stream_of_several_completions_is_whole(front: FullFront) -> None:
    body = {"prompt": "abc", "n": 2, "max_tokens": 5}
    *events, last = front.events("/v1/completions", body)
    texts = {0: "", 1: ""}
    for event in events:
        (choice,) = json.loads(event.removeprefix("data: "))["choices"]
        texts[choice["index"]] += choice["text"]
    assert (texts, last) == ({0: "abcab", 1: "abcab"}, "data: [DONE]")


# What a client's own id may be displaced by, and by which field.
REQUESTS: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "hello", "max_tokens": 2, "request_id": "f" * 32},
    "/v1/chat/completions": {"messages": CHAT, "max_tokens": 2, "request_id": "f" * 32},
    "/v1/messages": {"messages": CHAT, "max_tokens": 2},
    "/v1/responses": {
        "input": "hello", "max_output_tokens": 2, "request_id": "f" * 32, "session_id": "mine"
    },
}  # fmt: skip


def ticket_in(request: Any) -> bool:
    """As the router finds it: in the first of the ids."""
    return TICKET in request["ids"][0]


@pytest.mark.parametrize("path", REQUESTS)
def test_each_path_carries_the_ticket(front: FullFront, path: str) -> None:
    before = len(front.requests())
    answer = front.post(path, REQUESTS[path])
    assert answer.status_code == 200, answer.text
    assert TICKET in answer.json()["id"]
    (request,) = front.requests()[before:]
    assert ticket_in(request)
    assert "f" * 32 not in json.dumps(request)


@pytest.mark.parametrize("path", REQUESTS)
def test_a_silent_stream_is_kept_alive(front: FullFront, path: str) -> None:
    """From before its first token on; then it goes on as if nothing had been."""
    front.mark("held", True)
    try:
        events = []
        for event in front.events(path, REQUESTS[path]):
            if event == ": keep-alive" and event not in events:
                front.mark("held", False)
            events.append(event)
    finally:
        (front.unit.paths.directory / "held").unlink(missing_ok=True)
    assert ": keep-alive" in events
    spoken = [event for event in events if event != ": keep-alive"]
    assert all(event.startswith(("data: ", "event: ")) for event in spoken)
    ends = ("data: [DONE]", "event: message_stop", "event: response.completed")
    assert spoken[-1].startswith(ends)


@pytest.mark.parametrize("path", REQUESTS)
def test_a_failed_request_is_an_error(front: FullFront, path: str) -> None:
    front.mark("failing", True)
    try:
        answer = front.post(path, {**REQUESTS[path], "max_tokens": 9, "max_output_tokens": 9})
    finally:
        front.mark("failing", False)
    assert answer.status_code == 500
    assert answer.json()["error"]["message"]
    assert answer.json().get("type") == ("error" if path == "/v1/messages" else None)


@pytest.mark.parametrize("path", REQUESTS)
def test_a_failed_stream_ends_with_an_error(front: FullFront, path: str) -> None:
    front.mark("failing", True)
    try:
        body = {**REQUESTS[path], "max_tokens": 9, "max_output_tokens": 9}
        events = list(front.events(path, body))
    finally:
        front.mark("failing", False)
    if events[-1] == "data: [DONE]":
        events.pop()
    _, _, data = events[-1].rpartition("data: ")
    assert json.loads(data)["error"]["message"]
    assert "message_stop" not in "".join(events)
    assert "response.completed" not in "".join(events)
    assert all('"finish_reason":"' not in event for event in events)


def test_a_client_that_leaves_is_an_abort(front: FullFront) -> None:
    before = len(front.unit.noted("aborts"))
    events = front.events("/v1/completions", {"prompt": "abc", "n": 2, "max_tokens": 400})
    next(events)
    events.close()
    eventually(lambda: len(front.unit.noted("aborts")) == before + 2)


def test_what_a_client_may_not_set_never_comes_to_an_engine(front: FullFront) -> None:
    """What the body says is refused; what came by headers, of which the edge lets none through,
    would be taken out by the router."""
    before = len(front.requests())
    for extra in (
        {"kv_transfer_params": {"do_remote_prefill": True}},
        {"vllm_xargs": {"kv_transfer_params": "x"}},
        {"priority": 3},
    ):
        answer = front.post("/v1/completions", {"prompt": "abc", **extra})
        assert answer.status_code == 400
    assert front.requests()[before:] == []
    body = {"prompt": "abc", "max_tokens": 2}
    assert front.post("/v1/completions", body, {"X-Vllm-Priority": "3"}).status_code == 200
    (request,) = front.requests()[before:]
    assert [request[when]["priority"] for when in ("before", "after")] == [3, 0]


def test_images_are_refused_and_not_fetched(front: FullFront) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        url = f"http://127.0.0.1:{server.getsockname()[1]}/image.png"
        content = [{"type": "image_url", "image_url": {"url": url}}]
        messages = [{"role": "user", "content": content}]
        answer = front.post("/v1/chat/completions", {"messages": messages})
        assert answer.status_code == 400
        with pytest.raises(TimeoutError):
            server.accept()


@pytest.mark.parametrize("path", REQUESTS)
@pytest.mark.parametrize("body", [b'{"model": "\xff"}', b"{", b"[1]"])
def test_nonsense_is_refused_in_the_paths_own_form(
    front: FullFront, path: str, body: bytes
) -> None:
    answer = front.post(path, body)
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"
    assert answer.json().get("type") == ("error" if path == "/v1/messages" else None)


def test_a_chunked_body_that_is_too_large(front: FullFront) -> None:
    def parts() -> Iterator[bytes]:
        for _ in range(15):
            yield b" " * 10_000

    answer = front.http.post("/v1/completions", content=parts(), headers=headers_of())
    assert answer.status_code == 413
    assert "100000 bytes" in answer.json()["error"]["message"]


def test_a_body_that_is_too_large_and_never_ends(front: FullFront) -> None:
    """Answered before its end; then the connection is closed."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(20)
        connection.connect(str(front.socket))
        head = (
            "POST /v1/completions HTTP/1.1\r\nHost: front\r\nContent-Type: application/json\r\n"
            "Transfer-Encoding: chunked\r\n\r\n"
        )
        connection.sendall(head.encode() + (b"2710\r\n" + b" " * 10_000 + b"\r\n") * 21)
        answer = b""
        while data := connection.recv(65536):
            answer += data
    assert answer.startswith(b"HTTP/1.1 413 ")


def test_a_killed_router_loses_and_doubles_nothing(front: FullFront) -> None:
    events = front.events("/v1/completions", {"prompt": "abcdef", "n": 2, "max_tokens": 100})
    texts = {0: "", 1: ""}
    for number, event in enumerate(events):
        if number == 30:
            front.unit.kill("router")
        if event not in ("data: [DONE]", ": keep-alive"):
            (choice,) = json.loads(event.removeprefix("data: "))["choices"]
            texts[choice["index"]] += choice["text"]
    assert texts == {0: ("abcdef" * 17)[:100], 1: ("abcdef" * 17)[:100]}


def test_a_killed_full_front_comes_back(front: FullFront) -> None:
    """Its streams break, its requests are over, and the fast front goes on."""
    gone = front.unit.noted("fronts-gone")
    events = front.events("/v1/completions", {"prompt": "abc", "max_tokens": 400})
    next(events)
    fast = front.unit.stream("abc", 100)
    next(fast)
    pid = front.unit.pid("full")
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(httpx.RemoteProtocolError):
        list(events)
    assert "".join(fast).endswith("[DONE]")
    eventually(lambda: front.unit.noted("fronts-gone") == [*gone, str(fronts.FULL)])
    for path in ("/v1/completions", "/v1/messages?beta=true"):
        answer = front.post(path, {"padding": "x" * 1_000_000})
        assert answer.status_code == 503
        assert int(answer.headers["retry-after"]) >= 1
        assert ("type" in answer.json()) == path.startswith("/v1/messages")
        assert "starting" in answer.json()["error"]["message"]
    eventually(front.serves, START_S)
    answer = front.post("/v1/completions", {"prompt": "abc", "max_tokens": 5})
    assert answer.json()["choices"][0]["text"] == "abcab"
    assert front.unit.pid("full") != pid


def test_without_a_fast_front_it_serves_all_paths(model: Path) -> None:
    unit = Unit(model.parent / "alone", model, PACE_S, fronts=("full",))
    try:
        eventually(lambda: unit.paths.anchor_state.exists())
        assert [front["kind"] for front in unit.state()["fronts"]] == ["full"]
        eventually(unit.serves, START_S)
        assert "".join(unit.stream("abc", 5)) == "abcab[DONE]"
    finally:
        unit.end()
