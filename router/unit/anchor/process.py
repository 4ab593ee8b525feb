"""The one process that must not die: holds sockets, keeps processes running, relays.

    python -m router.unit.anchor.process UNIT_DIR

It reads UNIT_DIR/unit.json, takes the listening port, and starts what `_commands` lists: the
router process, the fronts and the edge, all of which die with it. To a front it is the engine; to
the router it speaks `protos.anchor_link` on UNIT_DIR/anchor.sock. SIGTERM ends everything.

Boundary: it decides nothing. `relay` remembers, `exchange` carries, `children` run; here is what
starts them and the loop.
Exit codes: 0 after SIGTERM, 2 unusable settings, 3 the port is taken, 4 the directory is in use.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final, NoReturn

import msgspec

from router.settings import UnitPaths, UnitSettings, load_unit
from router.unit.anchor.exchange import Exchange
from router.unit.anchor.probe import Probe
from router.unit.anchor.reactor import Reactor
from router.unit.children import Child, Command, cpu_time_s, start_time
from router.unit.edge import configuration as edge
from router.unit.fronts import launch as fronts
from router.unit.grpc_front import launch as grpc_launch

_log = logging.getLogger("anchor")

ROUTER_STANDBYS: Final = 3
"""One for a death; the others for those that follow sooner than the next can be loaded."""
ROUTER_SETTLED_S: Final = 0.5
"""Streams stand still while there is no router; one that fails does so sooner."""
END_GRACE_S: Final = 3.0
"""Between asking a child to end and killing it."""
_LOOK_EVERY_S: Final = 0.2
"""How late a deadline may be noticed; a child's end is noticed at once."""
_BACKLOG: Final = 4096
_PORT_FREE_S: Final = 3.0
"""The edge of an anchor that was killed dies with it, and holds the port until it has."""
_PORT_AGAIN_S: Final = 0.02
_LONGEST_SOCKET_PATH_BYTES: Final = 107


class Anchor:
    """The loop, and the processes that it keeps running."""

    def __init__(self, settings: UnitSettings, paths: UnitPaths, port: socket.socket) -> None:
        self._paths = paths
        self._stopping = False
        self._look_at_s = 0.0
        self._reactor = Reactor()
        self._anchor_listener = _listen_unix(paths.anchor_socket)
        self._exchange = Exchange(paths, self._reactor, self._anchor_listener)
        self._kinds = fronts.kinds(settings)
        if fronts.FAST not in self._kinds:
            _log.warning("vllm-rs is missing: the full front serves all paths")
        # Held here, these outlive the processes that serve them: who connects while one restarts
        # waits instead of being refused.
        self._held = {
            front: [
                _listen_unix(paths.front_socket(front, purpose))
                for purpose in fronts.HELD_SOCKETS[kind]
            ]
            for front, kind in self._kinds.items()
        }
        commands = self._commands(settings, port)
        self._children = {name: Child(name, paths.logs, commands[name]) for name in commands}
        self._fronts = {_front_name(front): front for front in self._kinds}
        self._probed = {
            _front_name(front): (paths.front_socket(front, "http"), "/health", 200)
            for front in self._kinds
        }
        # The edge's own answer, whatever is behind it.
        self._probed["edge"] = (paths.edge_socket, "/", 404)
        self._probed["grpc"] = (paths.grpc_socket, "/", 200)
        self._probes: dict[str, Probe] = {}
        self._wakeup = _wake_on_signals(self._stop)
        self._reactor.on_readable(self._wakeup.fileno(), self._drain_wakeup)

    def _commands(self, settings: UnitSettings, port: socket.socket) -> dict[str, Command]:
        """What is kept running, by name, in the order of starting: who is needed first."""
        paths = self._paths
        environment = {**os.environ, **settings.environment}
        router = [*settings.router_command, str(paths.directory), "--standby"]
        commands = {
            "router": Command(
                router, environment, standbys=ROUTER_STANDBYS, settled_s=ROUTER_SETTLED_S
            )
        }
        for front, kind in self._kinds.items():
            descriptors = [listener.fileno() for listener in self._held[front]]
            commands[_front_name(front)] = fronts.COMMANDS[kind](settings, paths, descriptors)
        edge_arguments = edge.arguments(settings, paths)
        commands["edge"] = Command(edge_arguments, environment, [port.fileno()])
        if settings.grpc_port is not None:
            commands["grpc"] = grpc_launch.command(settings, paths)
        return commands

    def run(self) -> None:
        """Until SIGTERM or SIGINT."""
        while not self._stopping:
            now_s = time.monotonic()
            if now_s >= self._look_at_s:
                self._look(now_s)
            self._reactor.turn(self._look_at_s - now_s)
        self._end_children()

    def _look(self, now_s: float) -> None:
        """After the children, and after whoever should have answered: not for every message."""
        self._keep_running(now_s)
        self._exchange.end_orphans(now_s)
        for front in self._exchange.fronts_to_end(now_s):
            self._children[_front_name(front)].send_signal(signal.SIGKILL)
        for name, probe in self._probes.items():
            if probe.hangs(now_s):
                _log.error("%s answers nothing; it is ended", name)
                self._children[name].send_signal(signal.SIGKILL)
        if self._exchange.router_hangs(now_s):
            _log.error("the router answers nothing; it is ended")
            self._children["router"].send_signal(signal.SIGKILL)
        children = self._children.values()
        planned_s = [due_s for child in children for due_s in (child.due_s, child.standby_due_s)]
        self._look_at_s = min(
            [now_s + _LOOK_EVERY_S, *(due_s for due_s in planned_s if due_s is not None)]
        )

    def _keep_running(self, now_s: float) -> None:
        """Notice which children ended, and start those that are due."""
        changed = False
        for child in self._children.values():
            front = self._fronts.get(child.name)
            if (status := child.ended(now_s)) is not None:
                _log.warning("%s ended with status %d", child.name, status)
                if front is not None:
                    self._exchange.front_ended(front)
                if child.name in self._probes:
                    self._probes.pop(child.name).close()
                changed = True
            if child.due_s is not None and child.due_s <= now_s:
                if child.start(now_s):
                    self._started(child, front)
                changed = True
            child.keep_standby(now_s)
        if changed:
            self._save_state()

    def _started(self, child: Child, front: int | None) -> None:
        if front is not None:
            self._exchange.front_started(front)
        elif child.name == "router":
            self._exchange.router_started()
        if child.name in self._probed:
            where = self._probed[child.name]
            self._probes[child.name] = Probe(
                self._reactor, *where, cpu_s=lambda: cpu_time_s(child.pid)
            )

    def _save_state(self) -> None:
        pid = os.getpid()
        state = {
            "anchor": {"pid": pid, "start_time": start_time(pid)},
            "router": self._children["router"].state(),
            "edge": self._children["edge"].state(),
            "grpc": self._children["grpc"].state() if "grpc" in self._children else None,
            "fronts": [
                {"front": front, "kind": self._kinds[front], **self._children[name].state()}
                for name, front in self._fronts.items()
            ],
        }
        draft = self._paths.anchor_state.with_suffix(".draft")
        try:
            draft.write_text(json.dumps(state, indent=2) + "\n")
            draft.replace(self._paths.anchor_state)
        except OSError as error:  # A full disk must not end the streams.
            _log.error("%s can't be written: %s", self._paths.anchor_state, error)

    def _stop(self) -> None:
        self._stopping = True

    def _drain_wakeup(self) -> None:
        # Its bytes are the signals' numbers; what they mean is looked up, not read.
        self._wakeup.recv(4096)
        self._look_at_s = 0.0

    def _end_children(self) -> None:
        children = self._children.values()
        for child in children:
            child.end()
        deadline_s = time.monotonic() + END_GRACE_S
        for child in children:
            if not child.wait(deadline_s - time.monotonic()):
                child.send_signal(signal.SIGKILL)
        for child in children:
            child.wait(END_GRACE_S)


def _front_name(front: int) -> str:
    return f"front-{front}"


def _listen_unix(path: Path) -> socket.socket:
    """Takes the name from a previous run; that it is over, the lock says."""
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(path))
    listener.listen(_BACKLOG)
    listener.setblocking(False)
    return listener


def _take_port(settings: UnitSettings) -> socket.socket:
    """The edge's listening socket; connections wait in it while the edge restarts."""
    host, port = settings.listen_host, settings.listen_port
    deadline_s = time.monotonic() + _PORT_FREE_S
    while True:
        try:
            return _listen(host, port)
        except OSError as error:
            if error.errno == errno.EADDRINUSE and time.monotonic() < deadline_s:
                time.sleep(_PORT_AGAIN_S)
                continue
            reason = error.strerror or error
            _exit(3, f"can't listen on {host} port {port}: {reason}; choose another listen_port")


def _listen(host: str, port: int) -> socket.socket:
    family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    listener = socket.socket(family, kind)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(_BACKLOG)
    except OSError:
        listener.close()
        raise
    listener.setblocking(False)
    return listener


def _lock(paths: UnitPaths) -> None:
    """Held until the process ends."""
    descriptor = os.open(paths.anchor_lock, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        _exit(4, f"another anchor runs in {paths.directory}; end it or choose another directory")


def _load(paths: UnitPaths) -> UnitSettings:
    longest = os.fsencode(paths.front_socket(fronts.FULL, "output"))
    if len(longest) > _LONGEST_SOCKET_PATH_BYTES:
        _exit(2, f"{paths.directory} is too long a path for Unix sockets; choose a shorter one")
    try:
        return load_unit(paths.unit_settings)
    except (OSError, msgspec.DecodeError) as error:
        _exit(2, f"can't use {paths.unit_settings}: {error}")


def _wake_on_signals(stop: Callable[[], None]) -> socket.socket:
    """A socket that becomes readable on SIGCHLD, SIGTERM and SIGINT; the latter two also stop."""
    readable, written = socket.socketpair()
    readable.setblocking(False)
    written.setblocking(False)
    signal.set_wakeup_fd(written.detach(), warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop())
    return readable


def _exit(code: int, message: str) -> NoReturn:
    print(f"anchor: {message}", file=sys.stderr)
    sys.exit(code)


def main() -> None:
    """Run an anchor in the directory that the command line names."""
    if len(sys.argv) != 2:
        _exit(2, "usage: python -m router.unit.anchor.process UNIT_DIR")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    paths = UnitPaths(Path(sys.argv[1]).resolve())
    settings = _load(paths)
    os.umask(0o077)
    paths.directory.chmod(0o700)
    paths.logs.mkdir(exist_ok=True)
    # Before anything else is touched: what lies in the directory may be another anchor's.
    _lock(paths)
    port = _take_port(settings)
    paths.edge_config.write_text(edge.configuration(settings, paths, port.fileno()))
    Anchor(settings, paths, port).run()


if __name__ == "__main__":
    main()
