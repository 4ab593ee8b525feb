"""The one process that must not die: holds sockets, keeps processes running, relays.

    python -m router.unit.anchor UNIT_DIR

It reads UNIT_DIR/unit.json, takes the listening port, and starts the edge, the fronts and the
router process, all of which die with it. To a front it is the engine; to the router it speaks
`protos.anchor_link` on UNIT_DIR/anchor.sock. SIGTERM ends everything.

Boundary: it decides nothing. `relay` remembers, `exchange` carries, `children` run; here is what
starts them and the loop.
Exit codes: 0 after SIGTERM, 2 unusable settings, 3 the port is taken, 4 the directory is in use.
"""

from __future__ import annotations

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
from router.unit import edge, fronts
from router.unit.children import Child, Command, start_time
from router.unit.exchange import Exchange
from router.unit.reactor import Reactor

_log = logging.getLogger("anchor")

FRONTS: Final = 1
END_GRACE_S: Final = 3.0
"""Between asking a child to end and killing it."""
_TURN_S: Final = 0.5
"""The longest sleep: how late a deadline may be noticed."""
_BACKLOG: Final = 4096
_LONGEST_SOCKET_PATH_BYTES: Final = 107


class Anchor:
    """The loop, and the processes that it keeps running."""

    def __init__(self, settings: UnitSettings, paths: UnitPaths, port: socket.socket) -> None:
        self._paths = paths
        self._stopping = False
        self._reactor = Reactor()
        self._anchor_listener = _listen_unix(paths.anchor_socket)
        self._exchange = Exchange(paths, self._reactor, self._anchor_listener)
        # Held here, these outlive the processes that serve them: who connects while one restarts
        # waits instead of being refused.
        self._held = {
            front: [
                _listen_unix(paths.front_socket(front, purpose))
                for purpose in ("http", "input", "output")
            ]
            for front in range(FRONTS)
        }
        environment = {**os.environ, **settings.environment}
        self._router = Child(
            "router",
            paths.logs,
            Command([*settings.router_command, str(paths.directory)], environment),
        )
        self._fronts = [
            Child(f"front-{front}", paths.logs, _front_command(settings, listeners))
            for front, listeners in self._held.items()
        ]
        self._edge = Child(
            "edge",
            paths.logs,
            Command(edge.arguments(settings, paths), environment, [port.fileno()]),
        )
        self._wakeup = _wake_on_signals(self._stop)
        self._reactor.on_readable(self._wakeup.fileno(), self._drain_wakeup)

    def run(self) -> None:
        """Until SIGTERM or SIGINT."""
        while not self._stopping:
            now_s = time.monotonic()
            self._keep_running(now_s)
            self._exchange.end_orphans(now_s)
            for front in self._exchange.fronts_to_end(now_s):
                self._fronts[front].send_signal(signal.SIGKILL)
            if self._exchange.router_hangs(now_s):
                _log.error("the router answers nothing; it is ended")
                self._router.send_signal(signal.SIGKILL)
            self._reactor.turn(self._sleep_s(now_s))
        self._end_children()

    def _keep_running(self, now_s: float) -> None:
        """Notice which children ended, and start those that are due."""
        changed = False
        for child in self._children():
            if (status := child.ended(now_s)) is not None:
                _log.warning("%s ended with status %d", child.name, status)
                if child in self._fronts:
                    self._exchange.front_ended(self._fronts.index(child))
                changed = True
            if child.due_s is not None and child.due_s <= now_s:
                if child.start(now_s) and child in self._fronts:
                    self._exchange.front_started(self._fronts.index(child))
                changed = True
        if changed:
            self._save_state()

    def _children(self) -> list[Child]:
        """In the order of starting: who needs longest until it serves comes first."""
        return [self._router, *self._fronts, self._edge]

    def _sleep_s(self, now_s: float) -> float:
        due = [child.due_s - now_s for child in self._children() if child.due_s is not None]
        return min([_TURN_S, *due])

    def _save_state(self) -> None:
        pid = os.getpid()
        state = {
            "anchor": {"pid": pid, "start_time": start_time(pid)},
            "router": self._router.state(),
            "edge": self._edge.state(),
            "fronts": [
                {"front": front, **child.state()} for front, child in enumerate(self._fronts)
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

    def _end_children(self) -> None:
        for child in self._children():
            child.send_signal(signal.SIGTERM)
        deadline_s = time.monotonic() + END_GRACE_S
        for child in self._children():
            if not child.wait(deadline_s - time.monotonic()):
                child.send_signal(signal.SIGKILL)
        for child in self._children():
            child.wait(END_GRACE_S)


def _front_command(settings: UnitSettings, listeners: list[socket.socket]) -> Command:
    http, engine_input, engine_output = (listener.fileno() for listener in listeners)
    return Command(
        fronts.arguments(settings, http, engine_input, engine_output),
        fronts.environment(settings, os.environ),
        [http, engine_input, engine_output],
    )


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
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(_BACKLOG)
    except OSError as error:
        reason = error.strerror or error
        _exit(3, f"can't listen on {host} port {port}: {reason}; choose another listen_port")
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
    longest = os.fsencode(paths.front_socket(FRONTS - 1, "output"))
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
        _exit(2, "usage: python -m router.unit.anchor UNIT_DIR")
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
