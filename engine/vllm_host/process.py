"""The engine process: vLLM's EngineCore, with Baton's scheduler, worker and connector.

Run as `python -m engine.vllm_host.process LAUNCH_FILE` by `engine.py`; ends with its parent.
"""

from __future__ import annotations

import ctypes
import dataclasses
import os
import signal
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from engine.vllm_host.launch import Launch, Model, load, save_model
from engine.weights import weights_digest

if TYPE_CHECKING:
    from vllm.config import VllmConfig

_PR_SET_PDEATHSIG = 1
_THREAD_DIED_STATUS = 70


def die_with(parent_pid: int) -> None:
    """Have the kernel end this process when its parent ends, however that ends."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:
        sys.exit("the worker that started this engine is gone")


def run(launch_path: Path) -> None:
    """Build vLLM's configuration and run EngineCore until told to stop."""
    launch = load(launch_path)
    import torch
    from vllm.config import KVEventsConfig
    from vllm.engine.arg_utils import EngineArgs
    from vllm.usage.usage_lib import UsageContext
    from vllm.v1.engine.core import EngineCoreProc
    from vllm.v1.executor import Executor

    from engine.vllm_host.model_worker import ResumingWorker
    from engine.vllm_host.scheduler import BatonAsyncScheduler, BatonScheduler

    # On a CPU with AMX vLLM's attention uses it, and dies of SIGILL if nothing in this process has
    # asked the kernel for its registers. Most models' linear layers have by then; it asks anywhere.
    torch.cpu._init_amx()
    args = EngineArgs(
        **_typed(launch.engine_args),
        worker_cls=f"{ResumingWorker.__module__}.{ResumingWorker.__qualname__}",
        kv_transfer_config={
            "kv_connector": launch.connector_class,
            "kv_connector_module_path": launch.connector_module,
            # Roles are labels: every engine can produce and consume KV state.
            "kv_role": "kv_both",
            "engine_id": launch.engine_id,
            "kv_load_failure_policy": "recompute",
            "kv_connector_extra_config": {"kv_lease_duration": launch.kv_lease_s},
        },
        # Baton's scheduler takes the events itself.
        kv_events_config=KVEventsConfig(enable_kv_cache_events=True, publisher="null"),
    )
    config = args.create_engine_config(UsageContext.ENGINE_CONTEXT)
    scheduler = BatonAsyncScheduler if config.scheduler_config.async_scheduling else BatonScheduler
    config.scheduler_config.scheduler_cls = scheduler
    weights = weights_digest(Path(launch.engine_args["model"]), _loaded_as(launch, config))
    config.kv_transfer_config.kv_connector_extra_config["weights"] = weights
    save_model(
        launch_path,
        Model(vocabulary_tokens=config.model_config.get_vocab_size(), weights=weights),
    )
    EngineCoreProc.run_engine_core(
        vllm_config=config,
        local_client=True,
        handshake_address=launch.handshake_address,
        executor_class=Executor.get_class(config),
        log_stats=True,
    )


def _loaded_as(launch: Launch, config: VllmConfig) -> dict[str, object]:
    """What decides, besides the model's files, what the engine computes."""
    model = config.model_config
    return {
        "engine": "vllm",
        "dtype": str(model.dtype),
        "kv_cache_dtype": str(config.cache_config.cache_dtype),
        "quantization": model.quantization,
        "hf_overrides": launch.engine_args.get("hf_overrides"),
        "made_up_from": model.seed if config.load_config.load_format == "dummy" else None,
    }


def _typed(engine_args: dict[str, Any]) -> dict[str, Any]:
    """The arguments, with mappings turned into the configuration classes that vLLM expects.

    Raises pydantic.ValidationError, which names what is wrong.
    """
    from vllm.engine.arg_utils import EngineArgs

    kinds = {field.name: field.type for field in dataclasses.fields(EngineArgs)}
    typed = dict(engine_args)
    for name, value in engine_args.items():
        # Some arguments are mappings in vLLM, too; those stay.
        choices = [kinds.get(name), *get_args(kinds.get(name))]
        classes = [c for c in choices if isinstance(c, type) and dataclasses.is_dataclass(c)]
        if isinstance(value, dict) and classes:
            typed[name] = classes[0](**value)
    return typed


def _end_with_any_thread(arguments: threading.ExceptHookArgs) -> None:
    # Without its input or output thread EngineCore lives on, deaf or mute, and nobody notices.
    threading.__excepthook__(arguments)
    os._exit(_THREAD_DIED_STATUS)


def main() -> None:
    threading.excepthook = _end_with_any_thread
    die_with(int(sys.argv[2]))
    run(Path(sys.argv[1]))


if __name__ == "__main__":
    main()
