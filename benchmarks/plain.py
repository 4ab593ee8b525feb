"""A plain vLLM API server, no part of Baton: what Baton is compared with.

With the engine arguments and environment that `baton serve` gives its workers, so that only what is
around the engine differs; or as vLLM is shipped, which on CPUs computes in a process beside the
engine's own, and both spin while they wait for each other.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import psutil

from cluster.engine_defaults import cpu_arguments, cpu_environment, tiny_model_dtype
from cluster.model import TINY_NAME
from tests.free_ports import free_port
from tests.processes import ends_with_us

START_TIMEOUT_S: Final = 240.0
_STOP_S: Final = 15.0


@dataclass(frozen=True, slots=True)
class PlainServer:
    """A running one."""

    port: int
    groups: dict[str, list[int]]
    """Process ids."""


def engine_environment(threads: int) -> dict[str, str]:
    """Of every engine that is compared, whoever starts it."""
    return {**cpu_environment(engines=1), "OMP_NUM_THREADS": str(threads)}


@contextmanager
def plain_server(
    model: Path, threads: int, log_path: Path, *, as_shipped: bool
) -> Iterator[PlainServer]:
    """Healthy at the beginning, gone at the end. Its output goes to `log_path`."""
    environment = {**os.environ, **engine_environment(threads), "HF_HUB_OFFLINE": "1"}
    if not as_shipped:
        # As `engine.vllm_host` does it: the model runs in the engine's process.
        environment["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    port = free_port()
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            _command(model, port),
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            preexec_fn=ends_with_us,
        )
    try:
        _until_healthy(process, port, log_path)
        children = [child.pid for child in psutil.Process(process.pid).children(recursive=True)]
        yield PlainServer(port, {"API server": [process.pid], "engine": children})
    finally:
        process.terminate()
        try:
            process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _command(model: Path, port: int) -> list[str]:
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--model", str(model), "--served-model-name", TINY_NAME]
    # A log line per request would only cost it time.
    command += ["--host", "127.0.0.1", "--port", str(port), "--disable-uvicorn-access-log"]
    for name, value in {**cpu_arguments(), "dtype": tiny_model_dtype()}.items():
        command.append(f"--{name.replace('_', '-')}")
        if value is not True:
            command.append(str(value))
    return command


def _until_healthy(process: subprocess.Popen[bytes], port: int, log_path: Path) -> None:
    deadline_s = time.monotonic() + START_TIMEOUT_S
    while process.poll() is None and time.monotonic() < deadline_s:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2) as response:
                if response.status == 200:
                    return
        except OSError:
            time.sleep(0.2)
    said = log_path.read_text(errors="replace")[-2000:]
    raise RuntimeError(f"plain vLLM did not start:\n{said}")
