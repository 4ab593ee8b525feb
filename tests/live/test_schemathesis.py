"""Requests made from the schema of vLLM's own server: no 5xx that plain vLLM does not also give.

Each generated body is sent as it is, and a few of its fields alone within a body that is good, for
most bodies fail by their first bad field. A request that gets a 5xx is sent to plain vLLM too.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Final

import httpx
import hypothesis
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase
from openai import OpenAI
from schemathesis import Case, GenerationMode

from tests.live.cluster_process import BatonServe
from tests.live.conftest import MODEL
from tests.live.test_api import MESSAGES, PROMPT, complete, until
from tests.live.test_grpc import nothing_runs

EXAMPLES_EACH: Final = 10
"""Of each mode: bodies that keep to the schema, and bodies that don't."""
MANY_EXAMPLES_EACH: Final = 60
FIELDS_EACH: Final = 3
LIMIT_S: Final = 60.0
TOO_LONG: Final = 599
"""For an answer that did not come in that time."""

GOOD: Final[dict[str, dict[str, Any]]] = {
    "/v1/completions": {"prompt": PROMPT},
    "/v1/chat/completions": {"messages": MESSAGES},
    "/v1/messages": {"messages": MESSAGES},
    "/v1/messages/count_tokens": {"messages": MESSAGES},
    "/v1/responses": {"input": PROMPT},
    "/tokenize": {"prompt": PROMPT},
    "/detokenize": {"tokens": [300, 400]},
}
LENGTHS: Final = {
    "/v1/completions": ("max_tokens",),
    "/v1/chat/completions": ("max_tokens", "max_completion_tokens"),
    "/v1/messages": ("max_tokens",),
    "/v1/responses": ("max_output_tokens",),
}
MOST_TOKENS: Final = 4
MOST_COMPLETIONS: Final = 3


@dataclass
class Found:
    """What the requests of one route got."""

    sent: int = 0
    ok: int = 0
    theirs_too: int = 0
    ours_alone: list[str] = field(default_factory=list)


@dataclass
class Both:
    """The cluster and plain vLLM's server, asked for the same."""

    ours: httpx.Client
    plain: httpx.Client
    path: str
    found: Found = field(default_factory=Found)

    def send(self, body: Any) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        status, text = self._ask(self.ours, content)
        self.found.sent += 1
        self.found.ok += status == 200
        if status < 500:
            return
        plains, _ = self._ask(self.plain, content)
        if plains >= 500:
            self.found.theirs_too += 1
        else:
            self.found.ours_alone.append(f"{status} not {plains}: {text[:300]} for {content!r}")

    def _ask(self, client: httpx.Client, content: bytes) -> tuple[int, str]:
        try:
            answer = client.post(
                self.path, content=content, headers={"Content-Type": "application/json"}
            )
        except httpx.TimeoutException:
            return TOO_LONG, ""
        return answer.status_code, answer.text


def bounded(path: str, body: Any) -> Any:
    """Whole, of a model that is there, and soon over."""
    if not isinstance(body, dict):
        return body
    bounds = dict.fromkeys(LENGTHS.get(path, ()), MOST_TOKENS)
    if path in ("/v1/completions", "/v1/chat/completions"):
        bounds["n"] = MOST_COMPLETIONS
    quick = {**body, "model": MODEL}
    for name, most in bounds.items():
        value = quick.get(name)
        if value is None or (isinstance(value, int | float) and value > most):
            quick[name] = most if name != "n" else 1
    if quick.get("stream"):
        quick["stream"] = False
    return quick


def send_all(both: Both, strategy: Any, examples: int) -> None:
    """The strategy's bodies, and their fields."""
    tried: Counter[str] = Counter()

    @hypothesis.settings(
        max_examples=examples,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @hypothesis.given(case=strategy)
    def run(case: Case) -> None:
        body = case.body
        both.send(bounded(both.path, body))
        if isinstance(body, dict):
            good = GOOD[both.path]
            # Those first that were sent least.
            names = sorted(body.keys() - good.keys(), key=lambda name: (tried[name], name))
            for name in names[:FIELDS_EACH]:
                tried[name] += 1
                both.send(bounded(both.path, {**good, name: body[name]}))

    run()


def explore(path: str, cluster: BatonServe, plain_url: str, examples: int) -> Found:
    schema = schemathesis.openapi.from_url(f"{plain_url}/openapi.json")
    with (
        httpx.Client(base_url=cluster.url, timeout=LIMIT_S) as ours,
        # It is asked so rarely that it closes kept connections just as they are used again.
        httpx.Client(
            base_url=plain_url, timeout=LIMIT_S, limits=httpx.Limits(max_keepalive_connections=0)
        ) as plain,
    ):
        both = Both(ours, plain, path)
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
            send_all(both, schema[path]["POST"].as_strategy(generation_mode=mode), examples)
    return both.found


def check(path: str, cluster: BatonServe, client: OpenAI, plain_url: str, examples: int) -> None:
    text = complete(client).choices[0].text
    workers = [worker["incarnation"] for worker in cluster.workers()]
    found = explore(path, cluster, plain_url, examples)
    print(
        f"\n{path}: {found.sent} requests, {found.ok} served, {found.theirs_too} fail in vLLM too"
    )
    assert not found.ours_alone, "\n".join(found.ours_alone)
    assert found.sent >= 2 * examples
    assert found.ok > 0
    until(lambda: nothing_runs(cluster), "no worker holds KV blocks or requests", 30)
    assert complete(client).choices[0].text == text
    assert [worker["incarnation"] for worker in cluster.workers()] == workers


@pytest.mark.parametrize("path", GOOD)
def test_no_request_fails_that_plain_vllm_serves_or_refuses(
    path: str, cluster: BatonServe, client: OpenAI, plain_url: str
) -> None:
    check(path, cluster, client, plain_url, EXAMPLES_EACH)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/v1/responses"])
def test_no_request_of_many_fails_that_plain_vllm_serves_or_refuses(
    path: str, cluster: BatonServe, client: OpenAI, plain_url: str
) -> None:
    check(path, cluster, client, plain_url, MANY_EXAMPLES_EACH)


def test_the_list_of_models_keeps_to_vllms_schema(cluster: BatonServe, plain_url: str) -> None:
    schema = schemathesis.openapi.from_url(f"{plain_url}/openapi.json")
    case = schema["/v1/models"]["GET"].Case()
    case.call_and_validate(base_url=cluster.url)
