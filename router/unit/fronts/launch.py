"""How the fronts are started: arguments and environment of `vllm-rs` and of the full front.

Boundary: pure functions of the unit's settings. Who holds the sockets and the processes is the
anchor's business.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from router.settings import UnitPaths, UnitSettings
from router.unit.children import Command

FAST: Final = 0
"""`vllm-rs`, where its binary can be had."""
FULL: Final = 1
"""vLLM's Python API server: what the fast front lacks, and all paths where that is missing."""

_READY_WITHIN_S: Final = 2_000_000
"""A front is started before there is an engine, and may wait for one as long as vLLM can: a wait
in milliseconds in 31 bits."""

KEEP_ALIVE_S: Final = 3_600
"""Only the edge connects, and it must be the one that closes: a front that closes an idle
connection just as a request arrives on it makes a 502."""

_FULL_SETTLED_S: Final = 60.0
"""Its start takes 20 s of a core."""

MOST_COMPLETIONS: Final = 1_024
"""As many engine requests one HTTP request may make: its prompts times its `n`."""


def kinds(settings: UnitSettings) -> dict[int, str]:
    """The fronts that are to run, by number."""
    if settings.vllm_rs is None:
        return {FULL: "full"}
    return {FAST: "fast", FULL: "full"}


def _fast_command(settings: UnitSettings, _: UnitPaths, descriptors: Sequence[int]) -> Command:
    """The fast front, on three inherited listening sockets."""
    assert settings.vllm_rs is not None
    http_fd, input_fd, output_fd = descriptors
    arguments = [
        settings.vllm_rs,
        "frontend",
        f"--listen-fd={http_fd}",
        f"--input-listener-fd={input_fd}",
        f"--output-listener-fd={output_fd}",
        "--engine-start-index=0",
        "--engine-count=1",
        "--data-parallel-size=1",
        f"--args-json={json.dumps(_shared_arguments(settings))}",
    ]
    # The front formats its log with colours unless told that nobody looks.
    environment = {**_environment(settings, os.environ), "NO_COLOR": "1"}
    return Command(arguments, environment, descriptors)


def _full_command(settings: UnitSettings, paths: UnitPaths, descriptors: Sequence[int]) -> Command:
    """The full front, on an inherited HTTP socket; those for its engine it makes itself."""
    (http_fd,) = descriptors
    module = "router.unit.fronts.full_front"
    arguments = [sys.executable, "-m", module, str(paths.directory), str(http_fd)]
    environment = {
        # Else it lists its routes and settings at each start.
        "VLLM_LOGGING_LEVEL": "WARNING",
        **_environment(settings, os.environ),
        # Each output in one frame, so that outputs can be taken apart and put together.
        "VLLM_MSGPACK_ZERO_COPY_THRESHOLD": "1000000000",
        "VLLM_ENGINE_READY_TIMEOUT_S": str(_READY_WITHIN_S),
        "VLLM_MAX_N_SEQUENCES": str(MOST_COMPLETIONS),
        # The engines decide how long a context may be.
        "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",
        # What would be kept in this process alone: another front, or its successor, lacks it.
        "VLLM_ENABLE_RESPONSES_API_STORE": "0",
        "VLLM_SERVER_DEV_MODE": "0",
        "VLLM_NO_USAGE_STATS": "1",
        # It computes nothing that threads would make quicker, and each thread takes memory.
        "OMP_NUM_THREADS": "1",
    }
    # Who may ask is decided at the edge, for both fronts alike.
    environment.pop("VLLM_API_KEY", None)
    return Command(arguments, environment, descriptors, settled_s=_FULL_SETTLED_S)


def _shared_arguments(settings: UnitSettings) -> dict[str, Any]:
    """The fields of vLLM's own arguments that concern a front; max_model_len comes by READY."""
    return {
        **common_arguments(settings),
        "model_tag": settings.model,
        "engine_ready_timeout_secs": _READY_WITHIN_S,
        "http_timeout_keep_alive": KEEP_ALIVE_S,
        "sse_keep_alive_interval": settings.stream_keep_alive_s,
    }


def common_arguments(settings: UnitSettings) -> dict[str, Any]:
    """vLLM's arguments that both fronts take under the same names."""
    fields: dict[str, Any] = {
        "model": settings.model,
        "served_model_name": settings.served_model_names,
        "disable_log_stats": True,
        "enable_prompt_tokens_details": True,
    }
    if settings.tool_call_parser is not None:
        fields["enable_auto_tool_choice"] = True
        fields["tool_call_parser"] = settings.tool_call_parser
    if settings.reasoning_parser is not None:
        fields["reasoning_parser"] = settings.reasoning_parser
    return fields


def _environment(settings: UnitSettings, inherited: Mapping[str, str]) -> dict[str, str]:
    """What a front sees: no look-ups on the network for a local model."""
    ours = {"HF_HUB_OFFLINE": "1"} if os.path.isdir(settings.model) else {}
    return {**inherited, **ours, **settings.environment}


HELD_SOCKETS: Final = {"fast": ("http", "input", "output"), "full": ("http",)}
"""By kind: the listening sockets that outlive a front's process, which inherits them."""

COMMANDS: Final[dict[str, Callable[[UnitSettings, UnitPaths, Sequence[int]], Command]]] = {
    "fast": _fast_command,
    "full": _full_command,
}
"""By kind: how to start it, given the descriptors of its held sockets."""
