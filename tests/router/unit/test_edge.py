"""What the edge passes on, to which front, with which headers, and what it refuses."""

from __future__ import annotations

import http.client
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from running_edge import CONTEXT_TOKENS, RunningEdge, read_answer
from running_unit import eventually

from router.unit.edge.configuration import ANTHROPIC_PATHS, CHOSEN_PATHS
from router.unit.fronts.requests import RESPONSES_PATH

COMPLETIONS = "/v1/completions"
MESSAGES = "/v1/messages"
WORK_PATHS = (*CHOSEN_PATHS, RESPONSES_PATH, *ANTHROPIC_PATHS)
MAX_BODY_BYTES = 1_000_000
MAX_CONNECTIONS = 20


@pytest.fixture(scope="module")
def edge(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningEdge]:
    """Shared; every test leaves it serving."""
    edge = RunningEdge(
        tmp_path_factory.mktemp("edge") / "u",
        max_body_bytes=MAX_BODY_BYTES,
        max_connections=MAX_CONNECTIONS,
    )
    yield edge
    edge.end()


def error_in(path: str, body: Any) -> str:
    """The message of an error in the form of the path's API."""
    if path.startswith(MESSAGES):
        assert set(body) == {"type", "error"}
        assert body["type"] == "error"
        assert set(body["error"]) == {"type", "message"}
    else:
        assert set(body) == {"error"}
        assert set(body["error"]) == {"message", "type", "param", "code"}
    message = body["error"]["message"]
    assert isinstance(message, str)
    return message


def chunked(edge: RunningEdge, body: dict[str, Any]) -> str | None:
    """The front that served a body sent in chunks."""
    connection = http.client.HTTPConnection("127.0.0.1", edge.port, timeout=30)
    data = json.dumps(body).encode()
    parts = iter([data[:7], data[7:]])
    headers = {"Content-Type": "application/json"}
    connection.request("POST", COMPLETIONS, parts, headers, encode_chunked=True)
    response = connection.getresponse()
    answer = json.loads(response.read())
    assert (response.status, answer["bytes"]) == (200, len(data))
    return response.headers["X-Baton-Front"]


@pytest.mark.parametrize(
    ("path", "body", "front"),
    [
        (COMPLETIONS, {"prompt": "a", "n": 1, "stream": True}, "fast"),
        (COMPLETIONS, {"prompt": list(range(4096))}, "fast"),
        (COMPLETIONS, {"prompt": "a", "n": 2}, "full"),
        (COMPLETIONS, {"prompt": ["a", "b"]}, "full"),
        (COMPLETIONS, {"prompt": "a", "suffix": "b"}, "full"),
        (COMPLETIONS, {"prompt": "a" * 70_000}, "full"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}, "fast"),
        ("/tokenize", {"prompt": "a"}, "fast"),
        ("/detokenize", {"tokens": [1]}, "fast"),
        (RESPONSES_PATH, {"input": "a"}, "full"),
        (MESSAGES, {"messages": []}, "full"),
        (f"{MESSAGES}/count_tokens", {"messages": []}, "full"),
    ],
)
def test_the_body_chooses_the_front(
    edge: RunningEdge, path: str, body: dict[str, Any], front: str
) -> None:
    status, answer, headers = edge.post(path, body)
    assert (status, answer["front"], headers["X-Baton-Front"]) == (200, front, front)
    assert answer["bytes"] == len(json.dumps(body))


def test_a_body_in_chunks_chooses_too(edge: RunningEdge) -> None:
    assert chunked(edge, {"prompt": "a"}) == "fast"
    assert chunked(edge, {"prompt": "a", "n": 2}) == "full"
    assert chunked(edge, {"prompt": "a" * 70_000}) == "full"


@pytest.mark.parametrize("path", WORK_PATHS)
def test_work_needs_a_ticket(edge: RunningEdge, path: str) -> None:
    """It is the request's id for front, client and log, whatever the client calls it."""
    own = {"X-Request-Id": "mine", "X-Session-Id": "mine", "X-Vllm-Anything": "mine"}
    status, answer, headers = edge.post(path, {"prompt": "a"}, own)
    ticket = headers["X-Request-Id"]
    assert status == 200
    assert ticket in edge.granted
    assert answer["headers"]["x-request-id"] == ticket
    assert "mine" not in answer["headers"].values()
    if path == RESPONSES_PATH:
        assert answer["headers"]["x-session-id"] == ticket
    assert edge.questions[-1] == f"v1\tPOST\t{path}\tcontent-length=15"
    line = edge.log_of(ticket)
    assert (line["status"], line["end"], line["front"]) == ("200", "--", answer["front"])
    assert int(line["total_ms"]) >= int(line["first_byte_ms"]) >= 0


def test_keys_are_asked_with_to_their_last_byte(edge: RunningEdge) -> None:
    """Those of one issuer may begin with the same thousands of bytes."""
    for name in ("Authorization", "X-Api-Key"):
        key = "k" * 8000 + "1"
        assert edge.post(COMPLETIONS, {"prompt": "a"}, {name: key})[0] == 200
        assert f"\t{name.lower()}={key}" in edge.questions[-1]


def test_what_makes_no_work_needs_none(edge: RunningEdge) -> None:
    before = len(edge.questions)
    own = {"X-Request-Id": "mine", "X-Vllm-Anything": "mine"}
    response = edge.request("GET", "/v1/models", headers=own)
    assert "mine" not in json.loads(response.read())["headers"].values()
    assert edge.request("GET", "/health").status == 200
    assert len(edge.questions) == before


def test_the_questions_share_connections(edge: RunningEdge) -> None:
    edge.post(COMPLETIONS, {"prompt": "a"})
    before = edge.ticket_connections
    for _ in range(50):
        assert edge.post(COMPLETIONS, {"prompt": "a"})[0] == 200
    # Each of the edge's threads keeps its own.
    assert edge.ticket_connections - before < len(os.sched_getaffinity(0))


@pytest.mark.parametrize("path", [COMPLETIONS, "/v1/chat/completions", RESPONSES_PATH, MESSAGES])
@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"kv_transfer_params": {"do_remote_decode": True}}, "kv_transfer_params"),
        ({"ec_transfer_params": {}}, "ec_transfer_params"),
        ({"kv_hints": []}, "kv_hints"),
        ({"data_parallel_rank": 0}, "data_parallel_rank"),
        ({"priority": -1}, "priority"),
        ({"vllm_xargs": {"a": 1, "kv_transfer_params": {}}}, "kv_transfer_params"),
        ({"vllm_xargs": {"baton_resume": [1]}}, "baton_resume"),
    ],
)
def test_what_only_engines_may_say(
    edge: RunningEdge, path: str, fields: dict[str, Any], named: str
) -> None:
    before = len(edge.questions)
    status, answer, _ = edge.post(path, {"prompt": "a", **fields})
    assert status == 400
    assert error_in(path, answer) == f"{named} is not the client's to set; leave it out."
    assert len(edge.questions) == before


@pytest.mark.parametrize("path", [COMPLETIONS, MESSAGES])
@pytest.mark.parametrize("name", ["X-Vllm-Priority", "X-Data-Parallel-Rank"])
def test_headers_that_only_engines_may_set(edge: RunningEdge, path: str, name: str) -> None:
    status, answer, _ = edge.post(path, {"prompt": "a"}, {name: "0"})
    assert status == 400
    assert name in error_in(path, answer)


def test_more_tokens_than_the_context_has(edge: RunningEdge) -> None:
    for tokens, expected in ((CONTEXT_TOKENS, 200), (CONTEXT_TOKENS + 1, 400), (1e300, 400)):
        status, answer, _ = edge.post(COMPLETIONS, {"prompt": "a", "max_tokens": tokens})
        assert status == expected
    assert str(CONTEXT_TOKENS) in error_in(COMPLETIONS, answer)


@pytest.mark.parametrize("path", [COMPLETIONS, MESSAGES])
def test_a_body_that_is_too_large(edge: RunningEdge, path: str) -> None:
    head = f"POST {path} HTTP/1.1\r\nHost: a\r\nContent-Length: {MAX_BODY_BYTES + 1}\r\n\r\n"
    status, answer = edge.exchange(head.encode())
    assert status == 413
    assert str(MAX_BODY_BYTES) in error_in(path, json.loads(answer.partition(b"\r\n\r\n")[2]))
    assert edge.post(path, b" " * MAX_BODY_BYTES)[1]["bytes"] == MAX_BODY_BYTES


def test_a_client_that_sends_it_all_the_same_can_read_why(edge: RunningEdge) -> None:
    head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: a\r\nContent-Length: 50000000\r\n\r\n".encode()
    with edge.connect() as connection:
        connection.sendall(head)
        with pytest.raises(ConnectionError):
            connection.sendall(bytes(16_000_000))
        assert read_answer(connection)[0] == 413


@pytest.mark.parametrize("path", [COMPLETIONS, MESSAGES])
def test_headers_that_are_too_large(edge: RunningEdge, path: str) -> None:
    large = {"X-Large": "a" * 7_500, "X-Larger": "a" * 7_500}
    assert edge.post(path, {"prompt": "a"}, large)[0] == 200
    status, answer, _ = edge.post(path, {"prompt": "a"}, {**large, "X-Largest": "a" * 2_000})
    assert status == 431
    assert "16384" in error_in(path, answer)
    # More than the edge can hold has no end that it could see.
    head = f"POST {path} HTTP/1.1\r\nHost: a\r\nX-Large: {'a' * 100_000}\r\n\r\n".encode()
    assert edge.exchange(head)[0] == 400


@pytest.mark.parametrize(
    "data", [b"\x00\xff\x16\x03\r\n\r\n", b"GET\r\n\r\n", b"POST /v1/completions HTTP/9\r\n\r\n"]
)
def test_what_is_no_http(edge: RunningEdge, data: bytes) -> None:
    assert edge.exchange(data)[0] == 400


@pytest.mark.parametrize(
    ("method", "path", "status", "allow"),
    [
        ("GET", "/nowhere", 404, None),
        ("GET", '/%22<a>"', 404, None),
        ("POST", "/v1/embeddings", 404, None),
        ("POST", f"{COMPLETIONS}/", 404, None),
        ("POST", "//v1/completions", 404, None),
        ("GET", COMPLETIONS, 405, "POST"),
        ("PUT", RESPONSES_PATH, 405, "POST"),
        ("POST", "/v1/models", 405, "GET"),
        ("DELETE", "/health", 405, "GET"),
    ],
)
def test_what_is_not_listed(
    edge: RunningEdge, method: str, path: str, status: int, allow: str | None
) -> None:
    response = edge.request(method, path)
    assert (response.status, response.headers["Allow"]) == (status, allow)
    assert path in error_in(path, json.loads(response.read()))


def test_a_wrong_method_in_anthropics_form(edge: RunningEdge) -> None:
    response = edge.request("GET", MESSAGES)
    assert (response.status, response.headers["Allow"]) == (405, "POST")
    assert "POST" in error_in(MESSAGES, json.loads(response.read()))


@pytest.mark.parametrize("path", [COMPLETIONS, MESSAGES])
def test_too_many_connections(edge: RunningEdge, path: str) -> None:
    held = [edge.connect() for _ in range(MAX_CONNECTIONS)]
    try:
        response = eventually(
            lambda: (answer := edge.request("POST", path, {})).status == 503 and answer
        )
        assert response.headers["Retry-After"] == "1"
        assert str(MAX_CONNECTIONS) in error_in(path, json.loads(response.read()))
        # An operator can still look.
        assert edge.request("GET", "/health").status == 200
    finally:
        for connection in held:
            connection.close()
    eventually(lambda: edge.request("POST", path, {}).status == 200)


@pytest.mark.parametrize("path", [COMPLETIONS, MESSAGES])
@pytest.mark.parametrize(
    ("refusal", "status", "retry_after", "ticket"),
    [
        ('429\t7\tslow "down"\tabc', 429, "7", "abc"),
        ("401\t-\tno key\t-", 401, None, None),
        ("503\t1\tlater\t-", 503, "1", None),
        ("nonsense", 500, None, None),
    ],
)
def test_the_routers_refusals(
    edge: RunningEdge,
    path: str,
    refusal: str,
    status: int,
    retry_after: str | None,
    ticket: str | None,
) -> None:
    edge.answer = lambda _: refusal
    try:
        answered, answer, headers = edge.post(path, {"prompt": "a"})
    finally:
        edge.answer = edge.grant
    assert (answered, headers["Retry-After"]) == (status, retry_after)
    assert headers["X-Request-Id"] == ticket
    message = error_in(path, answer)
    assert message == refusal.split("\t")[2] if "\t" in refusal else "can't be read" in message


def test_the_socket_for_batons_own_is_the_users(edge: RunningEdge) -> None:
    assert Path(edge.paths.edge_socket).stat().st_mode & 0o777 == 0o600
