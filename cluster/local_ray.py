"""A Ray cluster of our own on this machine, or a driver's connection to one that runs.

Boundary: starts and ends Ray; knows nothing of what runs on it. Never touches another cluster.
"""

from __future__ import annotations

import os
import secrets
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

NAMESPACE: Final = "baton"
_LOGICAL_CPUS: Final = 1024
"""Placement is by GPU alone: on a small machine Ray's count of CPUs would starve actors."""
_OBJECT_STORE_BYTES: Final = 100 * 1024 * 1024
"""No token and no KV block goes through it."""

_ENVIRONMENT: Final = {
    "RAY_AUTH_MODE": "token",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_SERVE_LOG_TO_STDERR": "0",
    # Workers that nobody asked for would take a second of CPU each, while engines load.
    "RAY_enable_worker_prestart": "0",
    "RAY_prestart_worker_first_driver": "0",
    # Ray makes its workers yield to everything else; here they are what the machine is for.
    "RAY_worker_niceness": "0",
    # Makes the node's address 127.0.0.1; otherwise Ray listens on all interfaces.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
}


class LocalRay:
    """The driver's side. Methods block; call them from one place."""

    def __init__(self) -> None:
        # Ray's processes die with the *thread* that started them, so it must live until the end.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="ray")

    def start(self, directory: Path) -> None:
        """Start a cluster that only holders of a new token may use. Once per process."""
        os.environ.update(_ENVIRONMENT)
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
        os.environ.pop("RAY_ADDRESS", None)
        self._thread.submit(_start, directory).result()

    def connect(self, address: str) -> None:
        """Use a running cluster; its token, if it wants one, is in the environment."""
        self._thread.submit(_connect, address).result()

    def shutdown(self) -> None:
        """Disconnect; a cluster of our own ends."""
        import ray

        self._thread.submit(ray.shutdown).result()


def _start(directory: Path) -> None:
    import ray

    ray.init(
        address="local",
        namespace=NAMESPACE,
        num_cpus=_LOGICAL_CPUS,
        object_store_memory=_OBJECT_STORE_BYTES,
        include_dashboard=False,
        log_to_driver=False,
        configure_logging=False,
        _temp_dir=str(directory),
    )


def _connect(address: str) -> None:
    import ray

    ray.init(address=address, namespace=NAMESPACE, log_to_driver=False, configure_logging=False)
