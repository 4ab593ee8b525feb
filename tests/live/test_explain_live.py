"""A small cluster that records: requests by curl, `baton explain` of them, a replay of it all."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.live.cluster_process import BATON, BatonServe
from tests.live.conftest import MODEL


@pytest.fixture(scope="module")
def recordings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("recordings")


@pytest.fixture(scope="module")
def recorded(recordings: Path) -> Iterator[BatonServe]:
    """Simulated engines: one prefill and two decode workers."""
    serve = BatonServe.start(
        {
            "engine": "simulated",
            "decode": {"replicas": 2},
            "router": {"record_events": str(recordings)},
        }
    )
    try:
        serve.until_healthy()
        yield serve
    finally:
        serve.interrupt()


def baton(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(BATON), *arguments], capture_output=True, text=True, check=False, timeout=60
    )


def curl(recorded: BatonServe, path: str, body: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """X-Request-Id and body of the answer."""
    done = subprocess.run(
        [
            "curl", "--silent", "--show-error", "--fail-with-body", "--include", "--noproxy", "*",
            f"{recorded.url}{path}", "-H", "Content-Type: application/json",
            "-d", json.dumps(body),
        ],
        capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    head, _, content = done.stdout.partition("\n\n")
    headers = dict(line.lower().split(": ", 1) for line in head.splitlines()[1:])
    return headers["x-request-id"], json.loads(content)


def until_edge_spoke(recorded: BatonServe, ticket: str) -> None:
    """Its log comes after the answer."""
    began_s = time.monotonic()
    while not recorded.get(f"/cluster/requests/{ticket}")["edge"]["status"]:
        assert time.monotonic() - began_s < 5, "the edge says nothing of it"
        time.sleep(0.02)


def test_explain_by_the_header_and_by_the_answers_id(recorded: BatonServe) -> None:
    body = {"model": MODEL, "prompt": "word " * 60, "max_tokens": 9}
    ticket, answer = curl(recorded, "/v1/completions", body)
    assert answer["usage"]["completion_tokens"] == 9
    until_edge_spoke(recorded, ticket)
    told = baton("explain", ticket, "--url", recorded.url)
    assert told.returncode == 0, told.stderr
    assert told.stdout == baton("explain", answer["id"], "--url", recorded.url).stdout
    for text in (
        f"{ticket}  POST /v1/completions",
        "answered with status 200",
        ": complete; ",
        "9 output tokens",
        "first token after ",
        "decision 1, after 0.000 s: ",
        "By what is predicted, ",
        "measured/predicted",
        "time per output token",
        "attempts, and how each came by the prompt's tokens",
    ):
        assert text in told.stdout
    story = json.loads(baton("explain", ticket, "--json", "--url", recorded.url).stdout)
    (request,) = story["requests"]
    actual = request["actual"]
    assert actual["output_tokens"] == 9
    assert 0 < actual["ttft_s"] < actual["duration_s"]
    assert actual["prompt"]["computed_tokens"] >= request["prompt_tokens"]
    (decision,) = request["decisions"]
    assert decision["predicted"]["ttft_s"] > 0
    measured = decision["measured"]
    assert measured["ttft_s"] == pytest.approx(actual["ttft_s"], abs=0.01)
    assert measured["output_tokens"] == 9


def test_explain_shows_each_engine_request_of_a_ticket(recorded: BatonServe) -> None:
    recorded.until_complete()
    body = {"model": MODEL, "prompt": ["first one", "second one"], "max_tokens": 3}
    ticket, _ = curl(recorded, "/v1/completions", body)
    told = baton("explain", ticket, "--url", recorded.url).stdout
    assert "2 engine requests" in told
    assert told.count(": complete; ") == 2


def test_explain_of_an_unknown_id_says_what_ids_look_like(recorded: BatonServe) -> None:
    result = baton("explain", "no such/id", "--url", recorded.url)
    assert result.returncode == 1
    for text in ("a request no such/id", "X-Request-Id", "cmpl-…", "the latest 10,000"):
        assert text in result.stderr


def test_what_was_recorded_replays_to_the_same_commands(
    recorded: BatonServe, recordings: Path
) -> None:
    """Streams, clients that leave, and a router that is killed; while the cluster goes on."""
    url = f"{recorded.url}/v1/completions"

    def ask(number: int) -> None:
        body = {"model": MODEL, "prompt": "word " * (5 + 9 * number), "max_tokens": 30}
        with httpx.stream("POST", url, json={**body, "stream": True}, timeout=60) as answer:
            for count, _ in enumerate(answer.iter_lines()):
                if number % 5 == 4 and count > 6:
                    return

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(ask, range(24)))
        (router,) = recorded.get("/cluster/routers")["routers"]
        asked = [pool.submit(ask, number) for number in range(8)]
        subprocess.run(["kill", "-KILL", str(router["pid"])], check=True)
        for each in asked:
            each.result()
    files = sorted(recordings.iterdir())
    assert len(files) == 2
    for path in files:
        assert path.stat().st_mode & 0o777 == 0o600
        result = baton("replay", str(path))
        print(result.stdout)
        assert result.returncode == 0, result.stdout + result.stderr
        assert "events, all commands identical" in result.stdout
