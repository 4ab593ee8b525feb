"""Real vLLM engines on the tiny model, for the suites that look at engines without a cluster."""

from __future__ import annotations

import tempfile
from pathlib import Path

from cluster.engine_defaults import cpu_arguments, cpu_environment, tiny_model_dtype
from engine.spec import WorkerSpec
from engine.vllm_host.engine import VllmEngine
from protos.ids import WorkerId

KV_CACHE_BYTES = 128 << 20
KV_BYTES_PER_TOKEN = 2 * 3 * 2 * 64 * (2 if tiny_model_dtype() == "bfloat16" else 4)
"""K and V, 3 layers, 2 KV heads of 64: engine/tiny_model.py."""


def make_vllm(
    model: Path,
    name: str,
    *,
    lease_s: float = 30.0,
    engine: type[VllmEngine] = VllmEngine,
    **engine_args: object,
) -> VllmEngine:
    """An engine with the arguments that `baton serve` gives its own, but a small KV cache."""
    return engine(
        WorkerSpec(
            worker_id=WorkerId(name),
            role="decode",
            engine="vllm",
            model=str(model),
            run_directory=tempfile.mkdtemp(prefix="baton-test-"),
            link_token="",
            kv_lease_s=lease_s,
            engine_args={
                **cpu_arguments(),
                "dtype": tiny_model_dtype(),
                "max_model_len": 8192,
                "kv_cache_memory_bytes": KV_CACHE_BYTES,
                **engine_args,
            },
            environment=cpu_environment(engines=2),
        )
    )
