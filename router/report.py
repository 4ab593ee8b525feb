"""What the process tells of itself to `http_api`: gathered from its parts, changing none."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from router.core.router import RouterCore
from router.edge_log import EdgeLog
from router.metrics import LinkBytes, Measured, exposition
from router.settings import RouterSettings
from router.worker_links import WorkerLinks


@dataclass(frozen=True, slots=True)
class Report:
    """The parts that are told from."""

    core: RouterCore
    settings: RouterSettings
    incarnation: int
    measured: Measured
    worker_values: Mapping[str, Mapping[str, float]]
    links: WorkerLinks
    edge_log: EdgeLog
    link_bytes: LinkBytes

    def exposition(self) -> bytes:
        """Prometheus text."""
        name = next(iter(self.settings.served_model_names), "")
        return exposition(
            self.core, self.measured, self.worker_values, name, self.edge_log.unread,
            self.link_bytes,
        )  # fmt: skip

    def identity(self) -> dict[str, Any]:
        """Which process this is."""
        return {
            "id": self.settings.router_id,
            "incarnation": self.incarnation,
            "pid": os.getpid(),
        }

    def addresses(self) -> dict[str, str]:
        """By worker."""
        return self.links.addresses()

    def wall_offset_s(self) -> float:
        """Wall-clock time minus the core's."""
        return time.time() - time.monotonic()
