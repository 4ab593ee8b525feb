"""Prompts are computed by prefill workers alone: shown by the engines' own counters."""

from __future__ import annotations

import random
from dataclasses import dataclass

from openai import OpenAI

from tests.live.cluster_process import BatonServe, once_settled
from tests.live.conftest import MODEL
from tests.live.vllm_engines import KV_BYTES_PER_TOKEN

BLOCK_TOKENS = 128
BY_SOURCE = "vllm:prompt_tokens_by_source_total"


@dataclass(frozen=True)
class Figures:
    """The engines' counters."""

    prefill_computed: float
    decode_computed: float
    fetched: float
    moved_bytes: float
    generated: float
    handoffs: float


def figures(cluster: BatonServe) -> Figures:
    """As /metrics shows them, once what workers send every second has arrived."""
    return once_settled(
        lambda: Figures(
            cluster.metric(BY_SOURCE, role="prefill", source="local_compute"),
            cluster.metric(BY_SOURCE, role="decode", source="local_compute"),
            cluster.metric(BY_SOURCE, role="decode", source="external_kv_transfer"),
            cluster.metric("vllm:nixl_bytes_transferred_sum", role="decode"),
            cluster.metric("vllm:generation_tokens_total"),
            cluster.metric("baton_handoffs_total"),
        )
    )


def test_decode_computes_no_prompt_and_moves_no_more_than_the_prompts_state(
    cluster: BatonServe, client: OpenAI
) -> None:
    dice = random.Random(31)
    lengths = [3, 100, 127, 128, 129, 256, 500, 1024, 1500, 2049]
    before = figures(cluster)
    for length in lengths:
        prompt = dice.choices(range(300, 2000), k=length)
        client.completions.create(model=MODEL, prompt=prompt, max_tokens=5, temperature=0)
    after = figures(cluster)
    assert after.handoffs - before.handoffs == len(lengths)
    assert after.prefill_computed - before.prefill_computed == sum(lengths)
    assert after.decode_computed - before.decode_computed <= len(lengths)
    assert after.fetched - before.fetched == sum(lengths)
    moved = after.moved_bytes - before.moved_bytes
    wanted = KV_BYTES_PER_TOKEN * sum(lengths)
    assert wanted <= moved < wanted + KV_BYTES_PER_TOKEN * BLOCK_TOKENS * len(lengths)


def test_what_decode_holds_already_is_not_moved_again(cluster: BatonServe, client: OpenAI) -> None:
    prompt = random.Random(32).choices(range(300, 2000), k=5 * BLOCK_TOKENS + 10)
    client.completions.create(model=MODEL, prompt=prompt, max_tokens=5, temperature=0)
    before = figures(cluster)
    longer = [*prompt, *range(300, 350)]
    client.completions.create(model=MODEL, prompt=longer, max_tokens=5, temperature=0)
    after = figures(cluster)
    shared = 5 * BLOCK_TOKENS
    assert after.prefill_computed - before.prefill_computed == len(longer) - shared
    assert after.fetched - before.fetched == len(longer) - shared
    assert after.moved_bytes - before.moved_bytes == KV_BYTES_PER_TOKEN * BLOCK_TOKENS


def test_short_prompts_stay_on_one_worker_where_configured(tiny_model: object) -> None:
    router = {"policy": "least_predicted_work", "local_prefill_max_tokens": 40}
    serve = BatonServe.start({"engine": "simulated", "router": router})
    try:
        serve.until_healthy()
        client = OpenAI(base_url=f"{serve.url}/v1", api_key="none", max_retries=0)
        for length, handoffs in ((40, 0), (41, 1)):
            client.completions.create(model=MODEL, prompt=list(range(300, 300 + length)))
            assert serve.metric("baton_handoffs_total") == handoffs
    finally:
        serve.interrupt()
