"""What the supervisor knows of the cluster: it alone changes it, the operator API reads it."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cluster.config import Config
from cluster.pools import Pools
from engine.spec import WorkerAddress
from protos.ids import WorkerId
from protos.membership import Gone, Member, Membership

_GONE_TOLD: Final = 100
"""Enough for all workers of a node that was lost."""


@dataclass(frozen=True, slots=True)
class SupervisorSettings:
    """What the supervisor is started with, also after a restart."""

    config: Config
    model: str
    """Directory of the model, by now on this machine."""
    served_names: list[str]
    link_token: str
    run_directory: str
    admin_socket: str


@dataclass(slots=True)
class Unit:
    """A router unit that asked for the membership."""

    router_id: str
    node: str
    directory: Path
    seen_s: float


class ClusterState:
    """The pools' slots, who of them serves where, and the router units."""

    def __init__(self, settings: SupervisorSettings) -> None:
        config = settings.config
        self.settings = settings
        self.started_s = time.time()
        self.pools = Pools({"prefill": config.prefill.replicas, "decode": config.decode.replicas})
        self.units: dict[str, Unit] = {}
        # Versions only grow, also over restarts of the supervisor.
        self.version = time.time_ns() // 1_000_000
        self._addresses: dict[WorkerId, WorkerAddress] = {}
        self._gone: deque[Gone] = deque(maxlen=_GONE_TOLD)

    def address(self, worker_id: WorkerId) -> WorkerAddress | None:
        """Where it serves, if it does."""
        return self._addresses.get(worker_id)

    def admit(self, address: WorkerAddress) -> None:
        """It is a member from now on."""
        self._addresses[address.worker_id] = address
        self.version += 1

    def expel(self, worker_id: WorkerId, why: str) -> None:
        """It is no member any more, if it was one."""
        if (address := self._addresses.pop(worker_id, None)) is not None:
            self._gone.append(Gone(worker_id, address.incarnation, why))
            self.version += 1

    def membership(self) -> Membership:
        """Who can serve now, and why others do not any more."""
        members = [
            Member(a.worker_id, a.incarnation, a.role, a.address, a.node, a.pid, a.weights)
            for a in self._addresses.values()
        ]
        return Membership(self.version, members, [*self._gone])
