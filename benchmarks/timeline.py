"""Where the time of single requests goes: the client's clock beside the router's record.

Boundary: a client of one request at a time. Client and router run on one machine, so their
wall-clock times compare.
"""

from __future__ import annotations

import http.client
import json
import random
import statistics
import time
from typing import Final

from benchmarks.report import table
from benchmarks.serving import Serving
from cluster.model import TINY_NAME

STAGES: Final = (
    ("client sends to router has it (edge, front, anchor)", "sent", "arrived"),
    ("to router has the first token (prompt computed)", "arrived", "first_token"),
    ("to client has it", "first_token", "client_first"),
    ("first token to submitted to the decode worker", "first_token", "handed_off"),
    ("to router has its first output (state fetched, a step)", "handed_off", "resumed"),
    ("to client has the second token", "resumed", "client_second"),
    ("client's second token to its last", "client_second", "client_last"),
)
_VOCABULARY_FROM, _VOCABULARY_TO = 300, 2000
"""Ids of ordinary tokens of the tiny model."""


def timelines(baton: Serving, requests: int, prompt_tokens: int, output_tokens: int) -> str:
    """Median and 99th percentile of each stage, in milliseconds; Markdown."""
    times = moments(baton, requests, prompt_tokens, output_tokens)
    rows = []
    for what, begin, end in STAGES:
        spans_ms = [
            (each[end] - each[begin]) * 1e3 for each in times if begin in each and end in each
        ]
        if spans_ms:
            p99_ms = statistics.quantiles(spans_ms, n=100, method="inclusive")[-1]
            rows.append((what, f"{statistics.median(spans_ms):.2f}", f"{p99_ms:.2f}"))
    return table(("stage", "p50, ms", "p99, ms"), rows)


def moments(
    baton: Serving, requests: int, prompt_tokens: int, output_tokens: int, pause_s: float = 0.0,
    salt: str = "",
) -> list[dict[str, float]]:  # fmt: skip
    """Of requests one after the other, by the names in `STAGES`: when what was reached, in seconds.
    Each has a prompt of its own, and comes so long after the one before is over. What was asked
    with another salt has none of these prompts."""
    rng = random.Random(f"{salt} {prompt_tokens}")
    times: list[dict[str, float]] = []
    for _ in range(requests):
        prompt = rng.choices(range(_VOCABULARY_FROM, _VOCABULARY_TO), k=prompt_tokens)
        time.sleep(pause_s)
        request_id, seen = _one(baton.port, prompt, output_tokens)
        (record,) = baton.get(f"/cluster/requests/{request_id}")["requests"]
        told = {key.removesuffix("_at"): value for key, value in record.items() if "_at" in key}
        times.append({**seen, **{key: value for key, value in told.items() if value is not None}})
    return times


def _one(port: int, prompt: list[int], output_tokens: int) -> tuple[str, dict[str, float]]:
    """Its id, and when what was seen."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    body = {
        "model": TINY_NAME, "prompt": prompt, "max_tokens": output_tokens, "stream": True,
        "temperature": 0, "ignore_eos": True,
    }  # fmt: skip
    sent = time.time()
    connection.request(
        "POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"}
    )
    response = connection.getresponse()
    if response.status != 200:
        raise RuntimeError(f"status {response.status}: {response.read()!r}")
    events = [time.time() for line in response if line.startswith(b"data: {")]
    connection.close()
    request_id = response.headers["X-Request-Id"]
    seen = {"client_first": events[0], "client_second": events[1], "client_last": events[-1]}
    return request_id, {"sent": sent, **seen}
