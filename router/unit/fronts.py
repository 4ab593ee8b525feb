"""How a front is started: arguments and environment of `vllm-rs`.

Boundary: pure functions of the unit's settings. Who holds the sockets and the process is the
anchor's business.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any, Final

from router.settings import UnitSettings

_FOREVER_S: Final = 10 * 365 * 86_400
"""A front is started before there is an engine, and may wait for one as long as it takes."""

_KEEP_ALIVE_S: Final = 3_600
"""Only the edge connects, and it must be the one that closes: a front that closes an idle
connection just as a request arrives on it makes a 502."""


def arguments(settings: UnitSettings, http_fd: int, input_fd: int, output_fd: int) -> list[str]:
    """The command line of one front on three inherited listening sockets."""
    return [
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


def _shared_arguments(settings: UnitSettings) -> dict[str, Any]:
    """The fields of vLLM's own arguments that concern a front; max_model_len comes by READY."""
    fields: dict[str, Any] = {
        "model": settings.model,
        "model_tag": settings.model,
        "served_model_name": settings.served_model_names,
        "engine_ready_timeout_secs": _FOREVER_S,
        "http_timeout_keep_alive": _KEEP_ALIVE_S,
        "disable_log_stats": True,
    }
    if settings.tool_call_parser is not None:
        fields["enable_auto_tool_choice"] = True
        fields["tool_call_parser"] = settings.tool_call_parser
    if settings.reasoning_parser is not None:
        fields["reasoning_parser"] = settings.reasoning_parser
    return fields


def environment(settings: UnitSettings, inherited: Mapping[str, str]) -> dict[str, str]:
    """What a front sees: plain logs, and no look-ups on the network for a local model."""
    # The front formats its log with colours unless told that nobody looks.
    ours = {"NO_COLOR": "1"}
    if os.path.isdir(settings.model):
        ours["HF_HUB_OFFLINE"] = "1"
    return {**inherited, **ours, **settings.environment}
