"""The reference over HTTP: vLLM's own API server with one engine, no part of Baton."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from cluster.engine_defaults import tiny_model_dtype
from tests.free_ports import free_port
from tests.live.cluster_process import START_TIMEOUT_S, STOP_TIMEOUT_S
from tests.processes import ends_with_us

_SERVER: Final = "vllm.entrypoints.launchers.api_server.entry"
_ARGUMENTS: Final = (
    f"--dtype={tiny_model_dtype()}",
    "--enforce-eager",
    "--max-model-len=8192",
    f"--kv-cache-memory-bytes={256 << 20}",
    '--structured-outputs-config={"backend": "xgrammar", "disable_any_whitespace": true}',
    "--enable-auto-tool-choice",
    "--tool-call-parser=hermes",
    "--no-enable-log-requests",
    "--disable-uvicorn-access-log",
)
"""As `tests.live.conftest.CONFIG` makes the cluster's, the rest is vLLM's choice."""
_ENVIRONMENT: Final = {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


@contextmanager
def plain_server(model: Path, served_name: str) -> Iterator[str]:
    """Its URL, once it serves; it is ended with the context."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [
        *(sys.executable, "-m", _SERVER, f"--model={model}", f"--served-model-name={served_name}"),
        *("--host=127.0.0.1", f"--port={port}", *_ARGUMENTS),
    ]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, **_ENVIRONMENT},
            # Its engine is a child that shall go with it.
            process_group=0,
            preexec_fn=ends_with_us,
        )
        try:
            _until_serving(process, url, log.fileno())
            yield url
        finally:
            _end(process)


def _until_serving(process: subprocess.Popen[bytes], url: str, log_fd: int) -> None:
    began_s = time.monotonic()
    while time.monotonic() - began_s < START_TIMEOUT_S:
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                return
        except OSError:
            assert process.poll() is None, _text(log_fd)
            time.sleep(0.2)
    raise AssertionError(f"vLLM's server is not up after {START_TIMEOUT_S} s:\n{_text(log_fd)}")


def _text(log_fd: int) -> str:
    return os.pread(log_fd, 1 << 20, 0).decode(errors="replace")


def _end(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
