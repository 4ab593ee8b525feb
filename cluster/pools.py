"""Decides which workers to start: wanted against actual, one number per worker, back-off.

Pure: `handle(now_s, event) -> commands`, no I/O and no clock. A worker's death never waits: its
replacement starts at once, except after failures at start, which are repeated ever more slowly.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Final, Literal

from engine.spec import Role
from protos.ids import WorkerId

FIRST_PAUSE_S: Final = 1.0
LONGEST_PAUSE_S: Final = 30.0
SETTLED_S: Final = 10.0
"""A worker that dies earlier than this after it was ready counts as failed at start."""

WorkerState = Literal["starting", "ready", "dead"]


@dataclass(frozen=True, slots=True)
class Begun:
    """The supervisor's first event: which workers it found serving, if it was restarted."""

    found: Mapping[WorkerId, Role]


@dataclass(frozen=True, slots=True)
class BecameReady:
    worker_id: WorkerId


@dataclass(frozen=True, slots=True)
class Died:
    """Also: failed to start."""

    worker_id: WorkerId
    reason: str


@dataclass(frozen=True, slots=True)
class Tick:
    """Nothing happened; some back-off may be over."""


Event = Begun | BecameReady | Died | Tick


@dataclass(frozen=True, slots=True)
class Start:
    worker_id: WorkerId
    role: Role


@dataclass(frozen=True, slots=True)
class TickAt:
    """Send a Tick at this time."""

    at_s: float


Command = Start | TickAt


@dataclass(frozen=True, slots=True)
class Slot:
    """A worker as the operator sees it; a dead one stays until its replacement starts."""

    worker_id: WorkerId
    role: Role
    state: WorkerState
    since_s: float
    restarts: int
    """How many workers died in this place before."""
    reason: str = ""
    """Why the last one died."""


@dataclass(slots=True)
class _Pool:
    wanted: int
    next_number: int = 0
    failures: int = 0
    """Failures at start in a row."""
    blocked_until_s: float = 0.0
    slots: list[Slot] = field(default_factory=list)


class Pools:
    """Both pools."""

    def __init__(self, wanted: Mapping[Role, int]) -> None:
        self._pools = {role: _Pool(count) for role, count in wanted.items()}

    def handle(self, now_s: float, event: Event) -> list[Command]:
        """Take an event in; returns what to do. Events of unknown workers are ignored."""
        match event:
            case Begun(found):
                self._adopt(now_s, found)
            case BecameReady(worker_id):
                self._update(worker_id, now_s, "ready", None)
            case Died(worker_id, reason):
                self._bury(now_s, worker_id, reason)
            case Tick():
                pass
        return [command for role in self._pools for command in self._fill(now_s, role)]

    def slots(self) -> list[Slot]:
        """All workers, by pool and number."""
        return [slot for pool in self._pools.values() for slot in pool.slots]

    def wanted(self, role: Role) -> int:
        return self._pools[role].wanted

    def ready(self, role: Role) -> int:
        return sum(slot.state == "ready" for slot in self._pools[role].slots)

    def _adopt(self, now_s: float, found: Mapping[WorkerId, Role]) -> None:
        for worker_id in sorted(found, key=_number):
            pool = self._pools[found[worker_id]]
            pool.next_number = _number(worker_id) + 1
            pool.slots.append(Slot(worker_id, found[worker_id], "ready", now_s, restarts=0))

    def _bury(self, now_s: float, worker_id: WorkerId, reason: str) -> None:
        slot = self._update(worker_id, now_s, "dead", reason)
        if slot is None or slot.state == "dead":
            return
        pool = self._pools[slot.role]
        if slot.state == "ready" and now_s - slot.since_s >= SETTLED_S:
            pool.failures, pool.blocked_until_s = 0, 0.0
        else:
            pool.failures += 1
            pause_s = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2 ** (pool.failures - 1))
            pool.blocked_until_s = now_s + pause_s

    def _update(
        self, worker_id: WorkerId, now_s: float, state: WorkerState, reason: str | None
    ) -> Slot | None:
        """Returns the slot as it was."""
        for pool in self._pools.values():
            for place, slot in enumerate(pool.slots):
                if slot.worker_id == worker_id:
                    kept = slot.reason if reason is None else reason
                    pool.slots[place] = replace(slot, state=state, since_s=now_s, reason=kept)
                    return slot
        return None

    def _fill(self, now_s: float, role: Role) -> list[Command]:
        """Start what is missing, in the places of the dead first."""
        pool = self._pools[role]
        dead = [place for place, slot in enumerate(pool.slots) if slot.state == "dead"]
        missing = max(0, pool.wanted - len(pool.slots))
        if not dead and not missing:
            return []
        if now_s < pool.blocked_until_s:
            return [TickAt(pool.blocked_until_s)]
        commands: list[Command] = []
        for place in dead:
            gone = pool.slots[place]
            pool.slots[place] = self._new_slot(now_s, role, gone.restarts + 1, gone.reason)
            commands.append(Start(pool.slots[place].worker_id, role))
        for _ in range(missing):
            pool.slots.append(self._new_slot(now_s, role, 0, ""))
            commands.append(Start(pool.slots[-1].worker_id, role))
        return commands

    def _new_slot(self, now_s: float, role: Role, restarts: int, reason: str) -> Slot:
        pool = self._pools[role]
        worker_id = WorkerId(f"{role}-{pool.next_number}")
        pool.next_number += 1
        return Slot(worker_id, role, "starting", now_s, restarts, reason)


def role_of(name: str) -> Role | None:
    """The role in a worker's id; None if it is no worker's."""
    role, _, number = name.partition("-")
    if not number.isdigit():
        return None
    return "prefill" if role == "prefill" else "decode" if role == "decode" else None


def _number(worker_id: WorkerId) -> int:
    return int(worker_id.rpartition("-")[2])
