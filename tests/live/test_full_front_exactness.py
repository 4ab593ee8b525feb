"""The exactness suite's cut through the full front, against plain vLLM's own API server.

Each body has a form that the fast front does not take. One request at a time, so that both sides
compute in the same shapes; every one of them is handed over.
"""

from __future__ import annotations

from typing import Any, Final

import httpx
import jsonschema
import pytest

from tests.live.cluster_process import BatonServe
from tests.live.conftest import MODEL
from tests.live.test_exactness import (
    KINDS,
    LENGTHS_TOKENS,
    SCHEMA,
    make_prompts,
    parsed,
    sampling_of,
)

PROMPTS: Final = 24
"""The first of the suite's: all lengths, and some that continue the one before."""
COMPLETIONS_EACH: Final = {"two completions": 2}

# As over the fast front, and what only the full one does.
FORMS: Final[dict[str, dict[str, Any]]] = {
    **{kind: api for kind, (api, _) in KINDS.items()},
    "two completions": {"n": 2, "seed": 11, "temperature": 1.0, "logprobs": 2},
    "bad words": {"bad_words": ["return", " self"]},
}


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    chosen = make_prompts()[:PROMPTS]
    assert {len(prompt) for prompt in chosen} == set(LENGTHS_TOKENS)
    return chosen


def request(kind: str, index: int, prompt: list[int]) -> dict[str, Any]:
    """A list of one prompt goes to the full front, whatever else is asked."""
    sampling = {**sampling_of("greedy", index, 0), **FORMS[kind]}
    if "min_tokens" in sampling:
        sampling["min_tokens"] = min(sampling["min_tokens"], sampling["max_tokens"])
    return {"model": MODEL, "prompt": [prompt], "return_token_ids": True, **sampling}


def choices(url: str, body: dict[str, Any], front: str | None) -> list[dict[str, Any]]:
    answer = httpx.post(f"{url}/v1/completions", json=body, timeout=120)
    assert answer.status_code == 200, answer.text
    assert answer.headers.get("x-baton-front") == front
    found: list[dict[str, Any]] = answer.json()["choices"]
    return found


@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", FORMS)
def test_outputs_over_the_full_front_equal_plain_vllms(
    kind: str, cluster: BatonServe, plain_url: str, prompts: list[list[int]]
) -> None:
    handoffs = cluster.metric("baton_handoffs_total")
    different = []
    to_hand_over = 0
    for index, prompt in enumerate(prompts):
        body = request(kind, index, prompt)
        ours, plain = choices(cluster.url, body, "full"), choices(plain_url, body, None)
        assert len(ours) == len(plain) == COMPLETIONS_EACH.get(kind, 1)
        for mine, theirs in zip(ours, plain, strict=True):
            # A request that ends with its first token has nothing to hand over.
            to_hand_over += len(theirs["token_ids"]) > 1
            for name in ("token_ids", "text", "finish_reason"):
                if mine[name] != theirs[name]:
                    different.append((index, name, mine[name], theirs[name]))
            if "logprobs" in FORMS[kind]:
                _check_logprobs(mine["logprobs"], theirs["logprobs"])
            if kind == "json":
                jsonschema.validate(parsed(mine["text"]), SCHEMA)
    assert not different, f"{len(different)} differ, e.g. {different[:3]}"
    assert cluster.metric("baton_handoffs_total") - handoffs == to_hand_over
    assert to_hand_over > PROMPTS / 2


def _check_logprobs(ours: dict[str, Any], plain: dict[str, Any]) -> None:
    assert ours["tokens"] == plain["tokens"]
    assert ours["token_logprobs"] == pytest.approx(plain["token_logprobs"], abs=1e-3)
    for mine, theirs in zip(ours["top_logprobs"], plain["top_logprobs"], strict=True):
        assert sorted(mine.values()) == pytest.approx(sorted(theirs.values()), abs=1e-3)
