"""A checkpoint is replaced in place while old workers run: nothing of the two is mixed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import httpx

from tests.live.cluster_process import BatonServe

LIMIT_S = 30.0


def until(condition: Callable[[], bool]) -> None:
    began_s = time.monotonic()
    while not condition():
        assert time.monotonic() - began_s < LIMIT_S
        time.sleep(0.1)


def test_workers_with_new_weights_wait_for_the_end_of_the_old(
    tiny_model: Path, tmp_path: Path
) -> None:
    checkpoint = shutil.copytree(tiny_model, tmp_path / "checkpoint")
    serve = BatonServe.start({"engine": "simulated", "model": {"path": str(checkpoint)}})
    try:
        serve.until_healthy()
        (old,) = {worker["weights"] for worker in serve.workers()}
        config = json.loads((checkpoint / "config.json").read_text())
        config["rms_norm_eps"] *= 10
        (checkpoint / "config.json").write_text(json.dumps(config))

        def replace(role: str) -> None:
            (worker,) = serve.workers(role)
            os.kill(worker["pid"], signal.SIGKILL)

            def replaced() -> bool:
                (now,) = serve.workers(role)
                return now["id"] != worker["id"] and now["seen_by_router"] is not None

            until(replaced)

        replace("prefill")
        (prefill,), (decode,) = serve.workers("prefill"), serve.workers("decode")
        new = prefill["weights"]
        assert new != old == decode["weights"]
        assert prefill["seen_by_router"] == f"unusable: has the weights {new}, others are served"
        assert decode["seen_by_router"] == "serving"
        assert (
            f"{prefill['id']}: other weights than those served" in serve.get("/health")["reasons"]
        )
        body = {"model": "checkpoint", "prompt": "word " * 200, "max_tokens": 3}
        answer = httpx.post(f"{serve.url}/v1/completions", json=body, timeout=30)
        (request,) = serve.get(f"/cluster/requests/{answer.headers['x-request-id']}")["requests"]
        assert {each["worker"] for each in request["attempts"]} == {decode["id"]}

        replace("decode")
        until(lambda: serve.get("/health") == {"status": "ok"})
        assert [worker["weights"] for worker in serve.workers()] == [new, new]
        assert [worker["seen_by_router"] for worker in serve.workers()] == ["serving", "serving"]
    finally:
        serve.interrupt()
