"""The anchor, the edge and the front as real processes, with a router that is a fake."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from running_unit import FAKE_ROUTER, MODEL_NAME, Unit, build_model, eventually

from router.unit.anchor.exchange import ROUTER_GREETS_S
from router.unit.anchor.probe import ASK_EVERY_S, HANGS_S
from router.unit.children import start_time

PROMPT = "the quick brown fox. "
PACE_S = 0.01


def echoed(tokens: int) -> str:
    return (PROMPT * tokens)[:tokens]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model(tmp_path_factory.mktemp("unit") / "model")


@pytest.fixture(scope="module")
def unit(model: Path) -> Iterator[Unit]:
    """Shared; every test leaves it serving."""
    unit = Unit(model.parent / "u", model, PACE_S)
    try:
        unit.wait_until_serving()
        yield unit
    finally:
        unit.end()


def error_of(
    unit: Unit, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
) -> tuple[int, Any, str | None]:
    """Status, the error of the JSON body, and Retry-After."""
    response = unit.request(method, path, body, headers)
    assert response.headers["Content-Type"] == "application/json"
    error = json.loads(response.read())["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return response.status, error, response.headers["Retry-After"]


def test_a_stream_is_exact_and_comes_as_it_is_made(unit: Unit) -> None:
    started_s = time.monotonic()
    arrivals_s, texts = [], []
    for text in unit.stream(PROMPT, 50):
        arrivals_s.append(time.monotonic() - started_s)
        texts.append(text)
    assert texts.pop() == "[DONE]"
    assert "".join(texts) == echoed(50)
    assert arrivals_s[0] < 20 * PACE_S
    assert arrivals_s[-1] - arrivals_s[0] > 40 * PACE_S


def test_a_stream_that_waits_for_its_first_token_is_kept_alive(unit: Unit) -> None:
    held = unit.paths.directory / "held"
    held.touch()
    body = {"model": MODEL_NAME, "prompt": PROMPT, "max_tokens": 5, "stream": True}
    try:
        response = unit.request("POST", "/v1/completions", body)
        lines = [line for line in (response.readline() for _ in range(4)) if line.strip()]
    finally:
        held.unlink()
    assert lines
    assert all(line.startswith(b":") for line in lines), lines
    rest = response.read().decode()
    events = [json.loads(line[6:]) for line in rest.splitlines() if line.startswith("data: {")]
    assert "".join(event["choices"][0]["text"] for event in events) == echoed(5)
    assert rest.rstrip().endswith("data: [DONE]")


def test_the_ticket_is_the_request_id(unit: Unit) -> None:
    headers = {
        "X-Request-Id": "mine", "Idempotency-Key": "k\xe9y\t1", "X-Baton-Priority": "low",
        "X-Baton-Output-Tokens": "2",
    }  # fmt: skip
    body = {"model": MODEL_NAME, "prompt": PROMPT, "max_tokens": 2}
    response = unit.request("POST", "/v1/completions", body, headers)
    ticket = response.headers["X-Request-Id"]
    assert ticket.startswith("T")
    assert json.loads(response.read())["id"] == f"cmpl-{ticket}"
    question = unit.noted("questions")[-1].split("\t")
    assert question[:3] == ["v1", "POST", "/v1/completions"]
    length = len(json.dumps(body))
    assert sorted(question[3:]) == [
        f"content-length={length}",
        "idempotency-key=k\\xe9y 1",
        "x-baton-output-tokens=2",
        "x-baton-priority=low",
    ]


def test_how_a_request_ended_is_logged(unit: Unit) -> None:
    _, body = unit.complete(PROMPT, 3)
    ticket = body["id"].removeprefix("cmpl-")
    logged = eventually(
        lambda: [line for line in unit.noted("edge-log") if f"ticket={ticket}\t" in line]
    )
    version, *fields = logged[0].split("\t")
    values = dict(field.split("=") for field in fields)
    assert (version, values["status"], values["end"]) == ("v1", "200", "--")
    assert int(values["total_ms"]) >= int(values["first_byte_ms"]) >= 0


def test_a_client_that_leaves_is_an_abort(unit: Unit) -> None:
    before = len(unit.noted("aborts"))
    stream = unit.stream(PROMPT, 400)
    next(stream)
    stream.close()
    eventually(lambda: len(unit.noted("aborts")) > before)


@pytest.mark.parametrize(
    ("method", "path", "status", "part"),
    [
        ("GET", "/nowhere", 404, "/nowhere"),
        ("GET", '/%22<a>"', 404, '"'),
        ("POST", "/v1/embeddings", 404, "/v1/embeddings"),
        ("GET", "/v1/completions", 405, "POST"),
        ("POST", "/v1/models", 405, "GET"),
        ("DELETE", "/health", 405, "GET"),
    ],
)
def test_unlisted_paths_and_methods(
    unit: Unit, method: str, path: str, status: int, part: str
) -> None:
    answered, error, _ = error_of(unit, method, path)
    assert answered == status
    assert part in error["message"]


def test_a_body_that_is_too_large(unit: Unit) -> None:
    status, error, _ = error_of(unit, "POST", "/v1/completions", b" " * 100_001)
    assert status == 413
    assert "100000" in error["message"]


def test_the_fronts_own_errors_pass(unit: Unit) -> None:
    long = {"model": MODEL_NAME, "prompt": "a" * 600, "max_tokens": 1}
    status, error, _ = error_of(unit, "POST", "/v1/completions", long)
    assert status == 400
    assert "600" in error["message"]
    assert "512" in error["message"]


@pytest.mark.parametrize(
    ("answer", "status", "kind", "retry_after"),
    [
        ("429|7|slow down|abc", 429, "rate_limit_error", "7"),
        ("401|-|who are you?|-", 401, "authentication_error", None),
        ('503|2|no "worker" yet|-', 503, "server_error", "2"),
        ("nonsense", 500, "server_error", None),
    ],
)
def test_a_refused_ticket_is_the_answer(
    unit: Unit, answer: str, status: int, kind: str, retry_after: str | None
) -> None:
    headers = {"Idempotency-Key": f"answer:{answer}"}
    answered, error, after = error_of(unit, "POST", "/v1/completions", {}, headers)
    assert (answered, error["type"], after) == (status, kind, retry_after)
    assert status == 500 or error["message"] == answer.split("|")[2]


def test_paths_of_the_router_and_the_operator(unit: Unit) -> None:
    response = unit.request("GET", "/health")
    assert (response.status, response.read()) == (503, b"fine")  # As the fake router says it.
    for path in ("/metrics", "/cluster", "/cluster/workers", "/dashboard"):
        response = unit.request("GET", path)
        assert (response.status, response.read()) == (200, b"fine"), path
    response = unit.request("GET", "/v1/models")
    assert json.loads(response.read())["data"][0]["id"] == MODEL_NAME


def test_a_killed_router_loses_and_doubles_nothing(unit: Unit) -> None:
    stream = unit.stream(PROMPT, 120)
    texts = [next(stream) for _ in range(20)]
    unit.kill("router")
    texts += [next(stream) for _ in range(40)]
    unit.kill("router")
    texts += list(stream)
    assert texts.pop() == "[DONE]"
    assert "".join(texts) == echoed(120)


def test_requests_that_come_while_the_router_restarts_wait(unit: Unit) -> None:
    unit.kill("router")
    status, body = unit.complete(PROMPT, 5)
    assert (status, body["choices"][0]["text"]) == (200, echoed(5))


def test_a_router_that_hangs_is_ended_and_its_streams_go_on(unit: Unit) -> None:
    stream = unit.stream(PROMPT, 100)
    texts = [next(stream) for _ in range(5)]
    pid = unit.pid("router")
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    stopped_s = time.monotonic()
    texts += stream
    assert "".join(texts[:-1]) == echoed(100)
    assert texts[-1] == "[DONE]"
    assert unit.pid("router") not in (None, pid)
    assert 5 <= time.monotonic() - stopped_s < 10


@pytest.mark.slow
def test_a_stopped_front_is_ended(unit: Unit) -> None:
    """Also with little to take: it answers nobody."""
    stream = unit.stream(PROMPT, 400)
    next(stream)
    assert_ended_once_stopped(unit, "fast")


@pytest.mark.slow
def test_a_stopped_edge_is_ended(unit: Unit) -> None:
    assert_ended_once_stopped(unit, "edge")


def assert_ended_once_stopped(unit: Unit, name: str) -> None:
    # Nobody is judged before it was healthy once.
    time.sleep(2 * ASK_EVERY_S)
    stopped = unit.pid(name)
    assert stopped is not None
    os.kill(stopped, signal.SIGSTOP)
    eventually(lambda: unit.pid(name) not in (None, stopped), 3 * HANGS_S)
    eventually(unit.serves)


def test_a_router_that_was_stopped_while_it_stood_by_is_ended(unit: Unit) -> None:
    """It never says hello."""

    def standby() -> int | None:
        children = psutil.Process(unit.anchor.pid).children()
        routers = [p.pid for p in children if str(FAKE_ROUTER) in p.cmdline()]
        waiting = [pid for pid in routers if pid != unit.pid("router")]
        return min(waiting, default=None)  # The oldest is the next.

    stopped = eventually(standby)
    os.kill(stopped, signal.SIGSTOP)
    unit.kill("router")
    eventually(lambda: not psutil.pid_exists(stopped), 3 * ROUTER_GREETS_S)
    eventually(unit.serves)


def test_a_killed_edge_comes_back_with_its_port_kept(unit: Unit) -> None:
    unit.kill("edge")
    assert unit.complete(PROMPT, 5)[0] == 200


def test_a_killed_front_comes_back(unit: Unit) -> None:
    stream = unit.stream(PROMPT, 400)
    next(stream)
    gone = len(unit.noted("fronts-gone"))
    unit.kill("fast")
    eventually(unit.serves)
    assert len(unit.noted("fronts-gone")) > gone
    assert "".join(unit.stream(PROMPT, 9)) == echoed(9) + "[DONE]"


def test_a_router_that_stays_away(model: Path) -> None:
    unit = Unit(model.parent / "lonely", model, PACE_S)
    try:
        unit.wait_until_serving()
        stream = unit.stream(PROMPT, 400)
        next(stream)
        unit.forbid_router()
        left_s = time.monotonic()
        status, error, retry_after = error_of(unit, "POST", "/v1/completions", {})
        assert (status, error["type"], retry_after) == (503, "server_error", "1")
        assert 2.5 < time.monotonic() - left_s < 5
        with pytest.raises(KeyError, match="choices"):  # An event that tells of an error.
            list(stream)
        assert 9 < time.monotonic() - left_s < 13
    finally:
        unit.end()


def test_routers_that_die_at_once_do_not_keep_clients_waiting(model: Path) -> None:
    """A defect tied to a request under way ends each router that takes it over."""
    unit = Unit(model.parent / "doomed", model, PACE_S)
    try:
        unit.wait_until_serving()
        stream = unit.stream(PROMPT, 400)
        next(stream)
        doomed_s = time.monotonic()
        unit.doom_router()
        with pytest.raises(KeyError, match="choices"):  # An event that tells of an error.
            list(stream)
        assert 9 < time.monotonic() - doomed_s < 14
    finally:
        unit.end()


@pytest.mark.slow
def test_a_stream_outlives_routers_that_die_again_and_again(model: Path) -> None:
    """For longer than a router may stay away: each of them worked for a moment."""
    unit = Unit(model.parent / "restless", model, pace_s=0.035)
    try:
        unit.wait_until_serving()
        stream = unit.stream(PROMPT, 400)
        texts = [next(stream)]
        killer = threading.Thread(target=_kill_router_again_and_again, args=(unit, 12.0))
        killer.start()
        texts += stream
        killer.join()
        assert "".join(texts) == echoed(400) + "[DONE]"
    finally:
        unit.end()


def _kill_router_again_and_again(unit: Unit, for_s: float) -> None:
    until_s = time.monotonic() + for_s
    while time.monotonic() < until_s:
        time.sleep(0.8)
        unit.kill("router")


def test_sigterm_leaves_no_child(model: Path) -> None:
    unit = Unit(model.parent / "terminated", model, PACE_S)
    unit.wait_until_serving()
    children = unit.children()
    assert len(children) == 4
    unit.anchor.terminate()
    assert unit.anchor.wait(10) == 0
    assert [pid for pid in children if start_time(pid) is not None] == []


def test_a_killed_anchor_leaves_no_child_and_can_be_started_again(model: Path) -> None:
    unit = Unit(model.parent / "killed", model, PACE_S)
    try:
        unit.wait_until_serving()
        children = unit.children()
        assert len(children) == 4
        os.kill(unit.anchor.pid, signal.SIGKILL)
        unit.anchor.wait()
        eventually(lambda: not [pid for pid in children if start_time(pid) is not None])
        unit.anchor = unit.start_anchor()
        eventually(unit.serves)
    finally:
        unit.end()


def test_a_taken_port_is_one_sentence(unit: Unit, model: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as holder:
        other = Unit(model.parent / "taken", model, PACE_S, holder.getsockname()[1])
        assert other.anchor.wait(10) == 3
    complaint = (other.paths.directory / "anchor.log").read_text()
    assert complaint.count("\n") == 1
    assert f"port {other.port}" in complaint


def test_a_second_anchor_in_the_directory_is_refused(unit: Unit) -> None:
    second = unit.start_anchor()
    assert second.wait(10) == 4
    assert unit.complete(PROMPT, 2)[0] == 200
