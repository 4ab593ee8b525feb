"""Ends every process of one `baton serve`, and removes what it leaves, when that one ends.

Run as a script, without site-packages: `guard.py INSTANCE GRACE_S DIRECTORY PATH…`.
Its standard input is a pipe from `baton serve`; the pipe's end means that the parent is gone, be
it by SIGKILL. Boundary: only processes that carry the instance's id in their environment, or that
such a process has started, are touched. Standard library only.
"""

from __future__ import annotations

import fcntl
import os
import select
import shutil
import signal
import sys
import time
from pathlib import Path

VARIABLE = "BATON_INSTANCE"
_LOOK_S = 2.0
"""How often new processes are noted. Some overwrite their environment after a while (Ray's agents
set long titles), and may lose the parent by which they could be told."""
_PAUSE_S = 0.05


class Instance:
    """The processes of one instance: pid and start time, as pids alone may come again."""

    def __init__(self, instance: str) -> None:
        self._mark = f"{VARIABLE}={instance}".encode()
        self._any_mark = f"{VARIABLE}=".encode()
        self._known: set[tuple[int, int]] = set()

    def look(self) -> list[int]:
        """Note new processes; returns the pids of all that are alive."""
        parents: dict[int, int] = {}
        times: dict[int, int] = {}
        for name in os.listdir("/proc"):
            if not name.isdigit():
                continue
            try:
                stat = Path(f"/proc/{name}/stat").read_text(errors="replace")
            except OSError:
                continue
            state, parent, *rest = stat.rpartition(")")[2].split()
            if state not in "ZX":
                parents[int(name)] = int(parent)
                times[int(name)] = int(rest[17])
        members: dict[int, bool] = {os.getpid(): False}
        for pid in parents:
            self._decide(pid, parents, times, members)
        alive = [pid for pid, member in members.items() if member]
        self._known = {(pid, times[pid]) for pid in alive}
        return alive

    def _decide(
        self, pid: int, parents: dict[int, int], times: dict[int, int], members: dict[int, bool]
    ) -> bool:
        """Whether a process belongs here: by its note, its own mark, else as its parent does."""
        if pid not in members:
            members[pid] = False  # Ends the walk where parents changed meanwhile.
            if (pid, times.get(pid, -1)) in self._known:
                members[pid] = True
            elif pid in parents:
                marks = self._marks(pid)
                if marks:
                    members[pid] = self._mark in marks
                else:
                    members[pid] = self._decide(parents[pid], parents, times, members)
        return members[pid]

    def _marks(self, pid: int) -> list[bytes]:
        try:
            environment = Path(f"/proc/{pid}/environ").read_bytes()
        except OSError:
            return []
        return [entry for entry in environment.split(b"\0") if entry.startswith(self._any_mark)]


def sweep(instance: Instance, grace_s: float) -> None:
    """End all: SIGTERM, after `grace_s` SIGKILL, until none is left."""
    told: set[int] = set()
    deadline_s = time.monotonic() + grace_s
    while pids := instance.look():
        kill = time.monotonic() >= deadline_s
        for pid in pids:
            if kill or pid not in told:
                told.add(pid)
                try:
                    os.kill(pid, signal.SIGKILL if kill else signal.SIGTERM)
                except (ProcessLookupError, PermissionError):
                    continue
        time.sleep(_PAUSE_S)


def main(arguments: list[str]) -> None:
    """Wait for the parent's end, sweep, remove. A byte on the pipe asks for SIGKILL at once.

    The arguments: instance, grace in seconds, its directory, and other paths. Of the directory only
    sockets are removed: if the parent died, the logs may tell why.
    """
    instance, grace_s, directory, *paths = arguments
    # Held while this instance lives: tells its directory from one that was left behind.
    descriptor = os.open(f"{directory}/lock", os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    print("watching", flush=True)
    members = Instance(instance)
    grace = float(grace_s)
    while not select.select([0], [], [], _LOOK_S)[0]:
        members.look()
    if os.read(0, 1):
        grace = 0.0
    sweep(members, grace)
    for path in Path(directory).rglob("*.sock"):
        path.unlink(missing_ok=True)
    for other in paths:
        shutil.rmtree(other, ignore_errors=True)


if __name__ == "__main__":
    main(sys.argv[1:])
