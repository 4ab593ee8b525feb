"""Whether clients with different API keys are served from the same cached state."""

from __future__ import annotations

import random
from collections.abc import Iterator

import httpx
import pytest

from tests.live.cluster_process import BatonServe
from tests.live.conftest import MODEL

BLOCK_TOKENS = 128
PROMPT_TOKENS = 5 * BLOCK_TOKENS + 9


def cached_tokens(
    serve: BatonServe, prompt: list[int], headers: dict[str, str], **more: str
) -> int:
    """How much of the prompt engines had already, for who shows this key."""
    # Of one token, so that one worker does it all.
    body = {"model": MODEL, "prompt": prompt, "max_tokens": 1, "temperature": 0, **more}
    answer = httpx.post(f"{serve.url}/v1/completions", json=body, headers=headers, timeout=60)
    assert answer.status_code == 200, answer.text
    (request,) = serve.get(f"/cluster/requests/{answer.headers['x-request-id']}")["requests"]
    tokens: int = request["actual"]["prompt"]["cached_tokens"]
    return tokens


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def test_by_default_they_are(cluster: BatonServe) -> None:
    prompt = random.Random(51).choices(range(300, 2000), k=PROMPT_TOKENS)
    assert cached_tokens(cluster, prompt, bearer("one")) == 0
    assert cached_tokens(cluster, prompt, bearer("other")) == 5 * BLOCK_TOKENS
    # Who would not be gives a salt.
    assert cached_tokens(cluster, prompt, bearer("one"), cache_salt="secret") == 0


@pytest.fixture(params=["simulated", pytest.param("vllm", marks=pytest.mark.slow)])
def apart(request: pytest.FixtureRequest, tiny_model: object) -> Iterator[BatonServe]:
    """One decode worker alone, whose cache is where a prompt is looked for."""
    config = {
        "engine": request.param,
        "prefill": {"replicas": 0},
        "kv": {"share_prefixes": "tenant"},
    }
    if request.param == "simulated":
        config["engine_args"] = {"block_size": BLOCK_TOKENS}
    serve = BatonServe.start(config)
    try:
        serve.until_healthy()
        yield serve
    finally:
        serve.interrupt()


def test_they_are_not_where_tenants_keep_to_themselves(apart: BatonServe) -> None:
    prompt = random.Random(52).choices(range(300, 2000), k=PROMPT_TOKENS)
    whole = 5 * BLOCK_TOKENS
    assert cached_tokens(apart, prompt, bearer("one")) == 0
    assert cached_tokens(apart, prompt, bearer("other")) == 0
    assert cached_tokens(apart, prompt, {}) == 0
    for headers in (bearer("one"), bearer("other"), {}, {"X-Api-Key": "one"}):
        assert cached_tokens(apart, prompt, headers) == whole
    # The same salt of two tenants is none that they share.
    for headers in (bearer("one"), bearer("other")):
        assert cached_tokens(apart, prompt, headers, cache_salt="secret") == 0
        assert cached_tokens(apart, prompt, headers, cache_salt="secret") == whole
