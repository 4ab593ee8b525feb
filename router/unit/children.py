"""The processes that the anchor keeps running: start, end, back-off, and dying with the anchor.

A child may have standbys: processes that have loaded all they need and wait for a byte on their
standard input, so that its next start takes no time.

Boundary: what a command is and what its end means is decided elsewhere.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

_log = logging.getLogger("anchor")

_PR_SET_PDEATHSIG: Final = 1
_FIRST_PAUSE_S: Final = 0.1
_STANDBY_AFTER_S: Final = 0.3
"""The process itself goes first: streams may wait for it."""
_STANDBY_EVERY_S: Final = 0.6
"""Longer than one takes to load: two at once would take a core each from the streams."""
_SETTLED_S: Final = 2.0
_PAUSES_PER_SETTLED: Final = 4
"""The longest pause is a quarter of it: by default well under the 3 s for which the edge waits for
a ticket."""

_TICKS_PER_S: Final = os.sysconf("SC_CLK_TCK")

# Looked up before any fork: between fork and exec nothing may be loaded.
_prctl: Final = ctypes.CDLL(None, use_errno=True).prctl


class Command(NamedTuple):
    """What to run; the descriptors keep their numbers in the child."""

    arguments: Sequence[str]
    environment: Mapping[str, str]
    descriptors: Sequence[int] = ()
    standbys: int = 0
    """How many more of it wait, for a byte on their standard input, before they do anything that
    others see."""
    settled_s: float = _SETTLED_S
    """A process that lived as long as this is started again at once; longer than a failing start
    takes, else one that can't start is started again and again without a pause."""


def start_time(pid: int) -> int | None:
    """When a process started, in clock ticks since boot; None if there is none, or if it has ended
    and nobody has asked for its status: in a container that may be nobody's business.

    With the pid it names a process for good, while a pid alone may come to name another.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The second field is the name in brackets, which may hold anything; the 22nd is meant.
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] in "ZX" else int(fields[19])


def cpu_time_s(pid: int | None) -> float:
    """What it has used so far; 0 if there is no such process."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    fields = stat.rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS_PER_S


class Child:
    """One process that is started again when it ends."""

    def __init__(self, name: str, logs: Path, command: Command) -> None:
        self.name = name
        self.restarts = 0
        self._log_path = logs / f"{name}.log"
        self._command = command
        self._process: subprocess.Popen[bytes] | None = None
        self._standbys: list[subprocess.Popen[bytes]] = []
        """The oldest first."""
        self._standby_due_s: float | None = None
        self._spawned_standby_s = -_STANDBY_EVERY_S
        self._started_s = 0.0
        self._pause_s = 0.0
        self.due_s: float | None = 0.0
        """When to start it, on the monotonic clock; None while it runs."""

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    def start(self, now_s: float) -> bool:
        """Whether it runs now. A command that can't be run is tried again like one that ended."""
        self._process = self._standbys.pop(0) if self._standbys else self._spawn()
        self._started_s = now_s
        self._plan_standby(now_s)
        self.due_s = None
        if self._process is None:
            self._plan_restart(now_s)
        elif self._process.stdin is not None:
            # It may have ended meanwhile, which is noticed as for any other.
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.write(b"\n")
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()
        return self._process is not None

    @property
    def standby_due_s(self) -> float | None:
        """When to call `keep_standby` for the next one; None while none is missing."""
        return None if self._process is None else self._standby_due_s

    def keep_standby(self, now_s: float) -> None:
        """Have them wait soon after the process itself started; notice one that ended."""
        alive = [each for each in self._standbys if each.poll() is None]
        if len(alive) < len(self._standbys):
            self._standbys = alive
            self._standby_due_s = now_s + _SETTLED_S
        due_s = self.standby_due_s
        if due_s is not None and now_s >= due_s:
            if (spawned := self._spawn()) is not None:
                self._standbys.append(spawned)
            self._spawned_standby_s = now_s
            self._standby_due_s = None
            self._plan_standby(now_s)

    def _plan_standby(self, now_s: float) -> None:
        """One that is planned stays so: deaths that follow one another must not put it off."""
        if self._standby_due_s is None and len(self._standbys) < self._command.standbys:
            next_s = self._spawned_standby_s + _STANDBY_EVERY_S
            self._standby_due_s = max(next_s, now_s + _STANDBY_AFTER_S)

    def _spawn(self) -> subprocess.Popen[bytes] | None:
        """None if the command can't be run."""
        command = self._command
        anchor = os.getpid()
        try:
            with self._log_path.open("ab") as output:
                # The hook is safe: the anchor has one Python thread, and the hook only makes two
                # system calls. (The signal comes when the *thread* that forked ends.)
                return subprocess.Popen(
                    command.arguments,
                    env=dict(command.environment),
                    stdin=subprocess.PIPE if command.standbys else subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    pass_fds=command.descriptors,
                    preexec_fn=lambda: _die_with(anchor),
                )
        except OSError as error:
            _log.error("%s can't be started: %s", self.name, error)
            return None

    def ended(self, now_s: float) -> int | None:
        """The exit status if it has ended since; its next start is then planned."""
        if self._process is None or (status := self._process.poll()) is None:
            return None
        self._process = None
        self._plan_restart(now_s)
        return status

    def _plan_restart(self, now_s: float) -> None:
        """At once after a settled life, later and later after short ones."""
        settled_s = self._command.settled_s
        if now_s - self._started_s >= settled_s:
            self._pause_s = 0.0
        self.due_s = now_s + self._pause_s
        longest_s = settled_s / _PAUSES_PER_SETTLED
        self._pause_s = min(longest_s, self._pause_s * 2 or _FIRST_PAUSE_S)
        self.restarts += 1

    def send_signal(self, number: signal.Signals) -> None:
        """Does nothing when it isn't running."""
        if self._process is not None:
            self._process.send_signal(number)

    def end(self) -> None:
        """Ask it to end; nothing else takes its place."""
        self.send_signal(signal.SIGTERM)
        for standby in self._standbys:
            standby.kill()
            standby.wait()
        self._standbys = []

    def wait(self, timeout_s: float) -> bool:
        """Whether it ends within the time. For the anchor's own end; blocks."""
        if self._process is None:
            return True
        try:
            self._process.wait(max(0.0, timeout_s))
        except subprocess.TimeoutExpired:
            return False
        return True

    def state(self) -> dict[str, Any]:
        """Its entry in anchor-state.json; `pid` is null while it isn't running."""
        pid = self.pid
        started = None if pid is None else start_time(pid)
        return {"pid": pid, "start_time": started, "restarts": self.restarts}


def _die_with(anchor: int) -> None:
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != anchor:  # It died before the line above took effect.
        os._exit(1)
