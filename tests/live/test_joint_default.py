"""What placement does unless it is told otherwise: it splits what costs less in two, and refuses
what would be late."""

from __future__ import annotations

import random
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from openai import OpenAI, RateLimitError

from tests.live.cluster_process import BatonServe
from tests.live.conftest import MODEL

CONFIG: dict[str, Any] = {
    "engine": "simulated",
    "prefill": {"replicas": 2},
    "decode": {"replicas": 2},
    "engine_args": {"max_model_len": 16_384, "num_gpu_blocks_override": 8192},
    "simulated": {"step_base_s": 0.006, "prefill_token_s": 1e-4, "decode_context_token_s": 6e-7},
    "router": {"tpot_slo_ms": 20.0},
}
STREAMS = 24


def test_long_prompts_are_split_where_others_decode(tiny_model: object) -> None:
    serve = BatonServe.start(CONFIG)
    try:
        serve.until_healthy()
        serve.until_complete()
        client = OpenAI(base_url=f"{serve.url}/v1", api_key="none", max_retries=0, timeout=60)

        def decision(tokens: int, max_tokens: int) -> dict[str, Any]:
            prompt = random.Random(tokens).choices(range(300, 2000), k=tokens)
            answer = client.completions.with_raw_response.create(
                model=MODEL, prompt=prompt, max_tokens=max_tokens
            )
            name = answer.headers["x-request-id"]
            (request,) = serve.get(f"/cluster/requests/{name}")["requests"]
            found: dict[str, Any] = request["decisions"][0]
            return found

        short = decision(20, 32)
        with ThreadPoolExecutor(STREAMS) as pool:
            streams = [pool.submit(decision, 100, 1500) for _ in range(STREAMS)]
            began_s = time.monotonic()
            while serve.metric("vllm:num_requests_running") < STREAMS:
                assert time.monotonic() - began_s < 20, "not all of them decode"
                time.sleep(0.1)
            with pytest.raises(RateLimitError) as refused:
                client.completions.create(
                    model=MODEL, prompt="word", max_tokens=8, extra_headers={"X-Baton-ITL-Ms": "7"}
                )
            long = decision(8000, 128)
            assert all(each.result()["predicted"]["tpot_s"] > 0 for each in streams)
        # A step takes 6 ms, and a third as much again for what the streams have behind them.
        assert "0.007 s were promised; try again in" in refused.value.message
        assert int(refused.value.response.headers["retry-after"]) >= 1
        story = serve.get(f"/cluster/requests/{refused.value.response.headers['x-request-id']}")
        grounds = story["refusal"]["grounds"]
        assert grounds["tpot"]["at_most_s"] > grounds["tpot"]["promised_s"] == 0.007
        assert (short["reason"], short["prefill"]) == ("whole_costs_less", None)
        assert (long["reason"], str(long["prefill"])[:7]) == ("split_costs_less", "prefill")
        compared = {(each["worker"], each["role"]) for each in long["candidates"]}
        assert {(long["prefill"], "prefill"), (long["worker"], "decode")} <= compared
        assert long["predicted"]["ttft_s"] > 0
        keys = {"cost", "cached_tokens", "queue_s", "prefill_s", "transfer_s", "ttft_s", "tpot_s"}
        assert all(keys <= set(each) for each in long["candidates"])
    finally:
        serve.interrupt()
