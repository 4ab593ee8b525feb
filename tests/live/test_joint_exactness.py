"""`baton serve` as it comes, on real engines: joint placement decides, the text is plain vLLM's."""

from __future__ import annotations

import random
import subprocess
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import httpx
import pytest

from tests.live.cluster_process import BATON, BatonServe
from tests.live.conftest import MODEL

REASONS = {"whole_costs_less", "split_costs_less"}
"""Joint placement's, of requests that could be split."""
BLOCK_TOKENS = 128
PREFIX_TOKENS = 5 * BLOCK_TOKENS
GROUPS = 3
AT_ONCE = 8


class Answer(NamedTuple):
    ticket: str
    token_ids: list[int]
    text: str


@pytest.fixture(scope="module")
def joint() -> Iterator[BatonServe]:
    """One prefill and one decode worker; nothing is configured."""
    serve = BatonServe.start({})
    try:
        serve.until_healthy()
        yield serve
    finally:
        serve.interrupt()


def ask(url: str, prompt: list[int], max_tokens: int) -> Answer:
    body = {
        "model": MODEL, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0,
        "return_token_ids": True,
    }  # fmt: skip
    answer = httpx.post(f"{url}/v1/completions", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    (choice,) = answer.json()["choices"]
    return Answer(answer.headers.get("x-request-id", ""), choice["token_ids"], choice["text"])


def make_prompts(dice: random.Random, prefixes: list[list[int]]) -> list[list[int]]:
    """One of each prefix with each of some ends, and a few that share nothing."""

    def words(count: int) -> list[int]:
        return dice.choices(range(300, 2000), k=count)

    alone = [words(count) for count in (1, 20, 128, 1500)]
    return [*(prefix + words(count) for count in (3, 128, 300) for prefix in prefixes), *alone]


@pytest.mark.slow
def test_the_text_is_plain_vllms_and_the_reasons_are_joints(
    joint: BatonServe, plain_url: str
) -> None:
    dice = random.Random(77)
    prefixes = [dice.choices(range(300, 2000), k=PREFIX_TOKENS) for _ in range(GROUPS)]
    one_by_one, at_once = make_prompts(dice, prefixes), make_prompts(dice, prefixes)
    ours = [ask(joint.url, prompt, 16) for prompt in one_by_one]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        ours += pool.map(lambda prompt: ask(joint.url, prompt, 64), at_once)
    plain = [ask(plain_url, prompt, 16) for prompt in one_by_one]
    plain += [ask(plain_url, prompt, 64) for prompt in at_once]
    for mine, theirs in zip(ours, plain, strict=True):
        assert (mine.token_ids, mine.text) == (theirs.token_ids, theirs.text)

    records = [record(joint, answer.ticket) for answer in ours]
    reasons = Counter(decision["reason"] for each in records for decision in each["decisions"])
    print(f"\n{len(ours)} texts equal; {dict(reasons)}")
    assert {*reasons} <= REASONS
    assert sum(reasons.values()) == len(ours)
    for each in records:
        (decision,) = each["decisions"]
        assert decision["predicted"]["ttft_s"] > 0
        assert decision["worker"] in {each["worker"] for each in decision["candidates"]}
    # One by one, the first of each group computes the prefix, and the others find it.
    hits = 0
    for each in records[GROUPS : 3 * GROUPS]:
        (decision,) = each["decisions"]
        held = {c["worker"]: c["cached_tokens"] for c in decision["candidates"]}
        assert max(held.values()) >= PREFIX_TOKENS
        # Where steps were slow a moment ago it may go elsewhere.
        if held[decision["prefill"] or decision["worker"]] >= PREFIX_TOKENS:
            hits += 1
            assert each["actual"]["prompt"]["cached_tokens"] >= PREFIX_TOKENS
    assert hits > 0
    told = subprocess.run(
        [str(BATON), "explain", ours[0].ticket, "--url", joint.url],
        capture_output=True, text=True, check=True, timeout=60,
    ).stdout  # fmt: skip
    assert "By what is predicted, " in told


def record(joint: BatonServe, ticket: str) -> dict[str, Any]:
    (found,) = joint.get(f"/cluster/requests/{ticket}")["requests"]
    answer: dict[str, Any] = found
    return answer
