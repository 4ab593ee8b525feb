"""Prompts are computed by prefill workers alone: shown by the engines' own counters."""

from __future__ import annotations

import random
import time

from openai import OpenAI

from tests.live.cluster_process import BatonServe
from tests.live.conftest import MODEL

KV_BYTES_PER_TOKEN = 2 * 3 * 2 * 64 * 2
"""K and V, 3 layers, 2 KV heads of 64, bfloat16: engine/tiny_model.py."""
BLOCK_TOKENS = 128
BY_SOURCE = "vllm:prompt_tokens_by_source_total"


class Figures:
    """The engines' counters, as /metrics shows them a moment later."""

    def __init__(self, cluster: BatonServe) -> None:
        self._cluster = cluster
        self.computed = {
            role: cluster.metric(BY_SOURCE, role=role, source="local_compute")
            for role in ("prefill", "decode")
        }
        self.fetched = cluster.metric(BY_SOURCE, role="decode", source="external_kv_transfer")
        self.moved_bytes = cluster.metric("vllm:nixl_bytes_transferred_sum", role="decode")
        self.generated = cluster.metric("vllm:generation_tokens_total")
        self.handoffs = cluster.metric("baton_handoffs_total")

    def once_generated(self, tokens: float) -> Figures:
        """New figures that hold all of the tokens generated since these."""
        deadline_s = time.monotonic() + 10
        while time.monotonic() < deadline_s:
            now = Figures(self._cluster)
            if now.generated - self.generated >= tokens:
                return now
            time.sleep(0.1)
        raise AssertionError("the workers' counters did not arrive within 10 s")


def test_decode_computes_no_prompt_and_moves_no_more_than_the_prompts_state(
    cluster: BatonServe, client: OpenAI
) -> None:
    dice = random.Random(31)
    lengths = [3, 100, 127, 128, 129, 256, 500, 1024, 1500, 2049]
    before = Figures(cluster)
    for length in lengths:
        prompt = dice.choices(range(300, 2000), k=length)
        client.completions.create(model=MODEL, prompt=prompt, max_tokens=5, temperature=0)
    after = before.once_generated(5 * len(lengths))
    assert after.handoffs - before.handoffs == len(lengths)
    assert after.computed["prefill"] - before.computed["prefill"] == sum(lengths)
    assert after.computed["decode"] - before.computed["decode"] <= len(lengths)
    assert after.fetched - before.fetched == sum(lengths)
    moved = after.moved_bytes - before.moved_bytes
    wanted = KV_BYTES_PER_TOKEN * sum(lengths)
    assert wanted <= moved < wanted + KV_BYTES_PER_TOKEN * BLOCK_TOKENS * len(lengths)


def test_what_decode_holds_already_is_not_moved_again(cluster: BatonServe, client: OpenAI) -> None:
    prompt = random.Random(32).choices(range(300, 2000), k=5 * BLOCK_TOKENS + 10)
    start = Figures(cluster)
    client.completions.create(model=MODEL, prompt=prompt, max_tokens=5, temperature=0)
    before = start.once_generated(5)
    longer = [*prompt, *range(300, 350)]
    client.completions.create(model=MODEL, prompt=longer, max_tokens=5, temperature=0)
    after = before.once_generated(5)
    shared = 5 * BLOCK_TOKENS
    assert after.computed["prefill"] - before.computed["prefill"] == len(longer) - shared
    assert after.fetched - before.fetched == len(longer) - shared
    assert after.moved_bytes - before.moved_bytes == KV_BYTES_PER_TOKEN * BLOCK_TOKENS


def test_short_prompts_stay_on_one_worker_where_configured(tiny_model: object) -> None:
    serve = BatonServe.start({"engine": "simulated", "router": {"local_prefill_max_tokens": 40}})
    try:
        serve.until_healthy()
        client = OpenAI(base_url=f"{serve.url}/v1", api_key="none", max_retries=0)
        for length, handoffs in ((40, 0), (41, 1)):
            client.completions.create(model=MODEL, prompt=list(range(300, 300 + length)))
            assert serve.metric("baton_handoffs_total") == handoffs
    finally:
        serve.interrupt()
