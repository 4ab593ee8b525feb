"""Handed-over requests give, token for token, what one plain vLLM engine gives.

Every request of this suite is handed over (`local_prefill_max_tokens: 0`), one at a time, so that
engine and reference compute in the same shapes and any difference is the hand-off's.

What is greedy is asked of all prompts; what else can be asked, of every fifth, or with `--whole` of
all: that is 1,456 requests.
"""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from openai import OpenAI
from tokenizers import Tokenizer

from tests.live.cluster_process import BatonServe
from tests.live.conftest import MODEL
from tests.live.plain_vllm import plain_outputs

pytestmark = pytest.mark.slow

PROMPTS = 208
NOT_WHOLE_STEP = 5
"""Has no divisor in common with the cycles of lengths and of what is shared."""
LENGTHS_TOKENS = [1, 2, 127, 128, 129, 255, 256, 257, 383, 384, 385, 511, 513, 640, 900, 1024, 1500]
OUTPUT_LENGTHS_TOKENS = [2, 3, 7, 16, 33, 64, 1, 24]
SCHEMA = {
    "type": "object",
    "properties": {
        "id": {"type": "integer", "minimum": 0, "maximum": 999},
        "kind": {"enum": ["a", "bb", "ccc"]},
        "name": {"type": "string", "maxLength": 8},
        "ok": {"type": "boolean"},
    },
    "required": ["id", "kind", "name", "ok"],
    "additionalProperties": False,
}
PENALTIES = {"presence_penalty": 0.7, "frequency_penalty": 0.4, "repetition_penalty": 1.3}

# What each kind asks of the API, and of plain vLLM where it is called something else there.
KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "greedy": ({}, {}),
    "logprobs": ({"logprobs": 3}, {"logprobs": 3}),
    "penalties": (PENALTIES, PENALTIES),
    "logit_bias": ({"logit_bias": {"300": 4.0, "900": 2.5}}, {"logit_bias": {300: 4.0, 900: 2.5}}),
    "min_tokens": ({"min_tokens": 64}, {"min_tokens": 64}),
    "seed": ({"seed": 7, "temperature": 1.0}, {"seed": 7, "temperature": 1.0}),
    "json": (
        {
            "max_tokens": 120,
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "thing", "schema": SCHEMA},
            },
        },
        {"max_tokens": 120, "json_schema": json.dumps(SCHEMA)},
    ),
}


def make_prompts() -> list[list[int]]:
    """Of all lengths; every third continues the one before it, so that prefixes are shared."""
    dice = random.Random(20_26)
    prompts: list[list[int]] = []
    for index in range(PROMPTS):
        length = LENGTHS_TOKENS[index % len(LENGTHS_TOKENS)]
        shared = prompts[-1][:length] if index % 3 == 2 else []
        prompts.append(shared + dice.choices(range(300, 2000), k=length - len(shared)))
    return prompts


def output_tokens(index: int) -> int:
    return OUTPUT_LENGTHS_TOKENS[index % len(OUTPUT_LENGTHS_TOKENS)]


def api_request(client: OpenAI, prompt: list[int], sampling: dict[str, Any]) -> dict[str, Any]:
    known = {"max_tokens", "temperature", "seed", "stop", "logprobs", "logit_bias"}
    known |= {"presence_penalty", "frequency_penalty"}
    standard = {name: value for name, value in sampling.items() if name in known}
    extra = {name: value for name, value in sampling.items() if name not in known}
    completion = client.completions.create(
        model=MODEL, prompt=prompt, extra_body={"return_token_ids": True, **extra}, **standard
    )
    (choice,) = completion.choices
    return {
        "token_ids": choice.model_extra["token_ids"],
        "text": choice.text,
        "finish_reason": choice.finish_reason,
        "logprobs": choice.logprobs,
    }


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Tokenizer:
    """For outputs alone: after a prompt that ends within a character, texts begin with its end."""
    return Tokenizer.from_file(str(tiny_model / "tokenizer.json"))


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    return make_prompts()


def sampling_of(kind: str, index: int, side: int) -> dict[str, Any]:
    return {"temperature": 0.0, "max_tokens": output_tokens(index), **KINDS[kind][side]}


def asked_of(kind: str, whole: bool) -> range:
    """The prompts that it is asked of."""
    return range(0, PROMPTS, 1 if whole or kind == "greedy" else NOT_WHOLE_STEP)


@pytest.fixture(scope="module")
def reference(
    cluster: BatonServe, tiny_model: Path, prompts: list[list[int]], whole: bool
) -> dict[tuple[str, int], dict[str, Any]]:
    """Plain vLLM's outputs by kind and prompt; made by one engine in one go."""
    wanted = [(kind, index) for kind in KINDS for index in asked_of(kind, whole)]
    requests = [
        {"prompt": prompts[index], "sampling": _reference_sampling(kind, index)}
        for kind, index in wanted
    ]
    return dict(zip(wanted, plain_outputs(tiny_model, requests), strict=True))


def _reference_sampling(kind: str, index: int) -> dict[str, Any]:
    return _bounded(sampling_of(kind, index, 1))


def _bounded(sampling: dict[str, Any]) -> dict[str, Any]:
    """`min_tokens` may not exceed `max_tokens`."""
    if "min_tokens" in sampling:
        sampling["min_tokens"] = min(sampling["min_tokens"], sampling["max_tokens"])
    return sampling


@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_equal_plain_vllms(
    kind: str,
    cluster: BatonServe,
    client: OpenAI,
    prompts: list[list[int]],
    reference: dict[tuple[str, int], dict[str, Any]],
    tokenizer: Tokenizer,
    whole: bool,
) -> None:
    handoffs = cluster.metric("baton_handoffs_total")
    different = []
    to_hand_over = 0
    for index in asked_of(kind, whole):
        plain = reference[kind, index]
        ours = api_request(client, prompts[index], _bounded(sampling_of(kind, index, 0)))
        # A request that ends with its first token has nothing to hand over.
        to_hand_over += len(plain["token_ids"]) > 1
        for name in ("token_ids", "finish_reason"):
            if ours[name] != plain[name]:
                different.append((index, name, ours[name], plain[name]))
        if kind == "logprobs":
            _check_logprobs(ours, plain)
        if kind == "json":
            _check_json(tokenizer.decode(ours["token_ids"]))
    assert not different, f"{len(different)} differ, e.g. {different[:3]}"
    assert cluster.metric("baton_handoffs_total") - handoffs == to_hand_over


def parsed(text: str) -> Any:
    """Guided output. xgrammar lets control characters into strings, under plain vLLM as well."""
    return json.loads(text, strict=False)


def _check_json(text: str) -> None:
    jsonschema.validate(parsed(text), SCHEMA)
    assert " " not in re.sub(r'"(\\.|[^"\\])*"', "", text)  # Without strings.


def _check_logprobs(ours: dict[str, Any], plain: dict[str, Any]) -> None:
    assert len(ours["logprobs"].token_logprobs) == len(plain["token_ids"])
    for value, token, entries, top in zip(
        ours["logprobs"].token_logprobs,
        plain["token_ids"],
        plain["logprobs"],
        ours["logprobs"].top_logprobs,
        strict=True,
    ):
        assert abs(value - entries[str(token)]) < 1e-3
        # Tokens with the same text share an entry; the best value of each stands on both sides.
        wanted = sorted(entries.values(), reverse=True)[: len(top)]
        for mine, theirs in zip(sorted(top.values(), reverse=True), wanted, strict=True):
            assert abs(mine - theirs) < 1e-3


def test_stop_strings_that_span_the_hand_off(
    client: OpenAI, tiny_model: Path, prompts: list[list[int]]
) -> None:
    """The first token is prefill's, the second decode's: a stop string over both."""
    chosen = [prompts[index] for index in range(2, PROMPTS, 8)]
    greedy = {"temperature": 0.0, "max_tokens": 12}
    free = plain_outputs(tiny_model, [{"prompt": p, "sampling": greedy} for p in chosen])
    stops = []
    for output in free:
        text = output["text"]
        # From within the first token's text to within the second's.
        first = len(text) // len(output["token_ids"])
        stops.append(text[first - 2 : first + 3])
    samplings = [{**greedy, "stop": [stop]} for stop in stops]
    plain = plain_outputs(
        tiny_model,
        [{"prompt": p, "sampling": s} for p, s in zip(chosen, samplings, strict=True)],
    )
    stopped = 0
    for prompt, sampling, wanted in zip(chosen, samplings, plain, strict=True):
        ours = api_request(client, prompt, sampling)
        assert (ours["text"], ours["finish_reason"]) == (wanted["text"], wanted["finish_reason"])
        stopped += wanted["finish_reason"] == "stop"
    assert stopped >= len(chosen) * 0.9


def test_prompt_logprobs_are_served_without_a_hand_off(cluster: BatonServe, client: OpenAI) -> None:
    handoffs = cluster.metric("baton_handoffs_total")
    completion = client.completions.create(
        model=MODEL, prompt=list(range(400, 600)), max_tokens=4, extra_body={"prompt_logprobs": 1}
    )
    assert completion.choices[0].model_extra
    assert cluster.metric("baton_handoffs_total") == handoffs
