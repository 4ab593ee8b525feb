"""The Serve deployment that runs one router unit per node.

Its replica starts the anchor detached, adopts it after its own restart, starts it again when it
dies, and writes down who the workers are. It stands in no request's path: if it dies, requests go
on. Orderly deletion ends the anchor; a crash of the replica does not.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Final

import ray
from ray import serve

from engine.process_end import has_ended
from protos import membership
from protos.errors import BatonError
from router import settings
from router.settings import RouterSettings, UnitPaths, UnitSettings
from router.unit.children import start_time

logger = logging.getLogger("ray.serve")

_RETRY_S: Final = 0.5
"""Before the supervisor, which may be restarting, is asked again."""
_ANSWER_S: Final = 15.0
"""The supervisor answers within 10 s, if only to say that nothing changed."""
_END_S: Final = 5.0
"""The anchor gives its children 3 s."""
_APPEAR_S: Final = 10.0
_LOOK_S: Final = 0.02
_LONGEST_PAUSE_S: Final = 5.0
_SETTLED_S: Final = 10.0


class AnchorProcess:
    """One unit's anchor, which is nobody's child: it outlives the process that started it."""

    def __init__(self, directory: Path) -> None:
        self._paths = UnitPaths(directory)

    def running(self) -> int | None:
        """The pid of an anchor that runs, by its own note of pid and start time."""
        try:
            note = json.loads(self._paths.anchor_state.read_bytes())["anchor"]
        except (OSError, ValueError, KeyError):
            return None
        pid: int = note["pid"]
        return pid if start_time(pid) == note["start_time"] else None

    async def start(self) -> int:
        """Start it detached; returns its pid. Raises BatonError if it ends at once."""
        log = self._paths.logs / "anchor.log"
        before_bytes = log.stat().st_size if log.exists() else 0
        pid = await asyncio.to_thread(self._launch, log)
        ended = asyncio.ensure_future(has_ended(pid))
        deadline_s = time.monotonic() + _APPEAR_S
        try:
            while not ended.done() and time.monotonic() < deadline_s:
                if self.running() == pid:
                    return pid
                await asyncio.wait({ended}, timeout=_LOOK_S)
        finally:
            ended.cancel()
        said = log.read_bytes()[before_bytes:].decode(errors="replace")
        last = said.strip().splitlines()[-1:]
        raise BatonError(f"the anchor did not start: {' '.join(last) or f'see {log}'}")

    def _launch(self, log: Path) -> int:
        # The shell ends at once, so that the anchor is an orphan: Ray ends its actors' children.
        # Waited for in a thread: the event loop may never hear of its end (`process_end`).
        shell = subprocess.run(
            ["/bin/sh", "-c", '"$@" </dev/null >>"$0" 2>&1 & echo $!', str(log),
             sys.executable, "-m", "router.unit.anchor.process", str(self._paths.directory)],
            # The anchor's children, one of which faces clients, need no key to the cluster.
            env={k: v for k, v in os.environ.items() if not k.startswith("RAY_")},
            # A terminal's Ctrl-C must not reach it. No session of its own: Linux shares the cores
            # out by session (autogroup), and one that wants little was seen to wait for 8 s.
            process_group=0,
            stdout=subprocess.PIPE,
            check=False,
        )  # fmt: skip
        return int(shell.stdout)

    async def end(self) -> None:
        """Ask it to end, and what it started; kill it when it takes too long."""
        if (pid := self.running()) is None:
            return
        os.kill(pid, signal.SIGTERM)
        try:
            await asyncio.wait_for(has_ended(pid), _END_S)
        except TimeoutError:
            os.kill(pid, signal.SIGKILL)


@serve.deployment(
    num_replicas=1,
    ray_actor_options={"num_cpus": 0},
    max_ongoing_requests=1,
    # How late the end of a replica may be noticed.
    health_check_period_s=1,
    graceful_shutdown_timeout_s=_END_S + 2,
)
class RouterUnit:
    """The replica. `supervisor` is the actor's name and namespace."""

    def __init__(
        self,
        unit: UnitSettings,
        router: RouterSettings,
        directory: str,
        supervisor: tuple[str, str],
    ) -> None:
        close_internal_server(Path(directory))
        self._unit = unit
        self._paths = UnitPaths(directory)
        self._supervisor = supervisor
        self._anchor = AnchorProcess(self._paths.directory)
        self._closing = False
        self._write_settings(router)
        loop = asyncio.get_running_loop()
        self._tasks = [
            loop.create_task(self._follow_membership()),
            loop.create_task(self._keep_anchor()),
        ]

    async def check_health(self) -> None:
        """Called by Serve, which replaces the replica, not the anchor, when it raises."""
        for task in self._tasks:
            if task.done() and not self._closing:
                raise BatonError(f"a task of the router unit ended: {task!r}")

    async def __del__(self) -> None:
        await self._close()

    async def _close(self) -> None:
        self._closing = True
        await self._anchor.end()

    def _write_settings(self, router: RouterSettings) -> None:
        self._paths.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._paths.logs.mkdir(exist_ok=True)
        settings.save(self._paths.unit_settings, self._unit)
        settings.save(self._paths.router_settings, router)

    async def _keep_anchor(self) -> None:
        """Adopt the anchor or start it, and again whenever it dies."""
        pause_s, ran = 0.0, False
        while not self._closing:
            began_s = time.monotonic()
            try:
                pid = self._anchor.running() or await self._anchor.start()
                ran = True
                await self._tell_supervisor(None, ran)
                await has_ended(pid)
                logger.warning("the anchor %d has ended", pid)
            except BatonError as error:
                logger.error("%s", error)
                await self._tell_supervisor(str(error), ran)
            if time.monotonic() - began_s > _SETTLED_S:
                pause_s = 0.0
            await asyncio.sleep(pause_s)
            pause_s = min(_LONGEST_PAUSE_S, pause_s * 2 or 0.2)

    async def _follow_membership(self) -> None:
        """Ask the supervisor for ever newer memberships and write each down."""
        known = membership.load(self._paths.membership)
        while not self._closing:
            try:
                news = await asyncio.wait_for(self._ask(known.version), _ANSWER_S)
            except (ray.exceptions.RayError, ValueError, TimeoutError) as error:
                logger.info("the supervisor does not answer: %s", error)
                await asyncio.sleep(_RETRY_S)
                continue
            if news is None:
                await self._close()
            elif news.version != known.version:
                known = news
                membership.save(self._paths.membership, news)

    async def _ask(self, version: int) -> membership.Membership | None:
        actor = await self._find_supervisor()
        node = ray.get_runtime_context().get_node_id()
        answer: membership.Membership | None = await actor.membership_after.remote(
            self._unit.router_id, node, str(self._paths.directory), version
        )
        return answer

    async def _tell_supervisor(self, problem: str | None, ran: bool) -> None:
        """Once; the supervisor may be away, and the anchor goes before it. One that has just been
        restarted does not know whether an anchor `ran` before."""
        try:
            actor = await self._find_supervisor()
            await actor.unit_changed.remote(self._unit.router_id, problem, ran)
        except (ray.exceptions.RayError, ValueError) as error:
            logger.info("the supervisor does not answer: %s", error)

    async def _find_supervisor(self) -> Any:
        name, namespace = self._supervisor
        return await asyncio.to_thread(ray.get_actor, name, namespace)


def close_internal_server(directory: Path) -> None:
    """Let no stranger reach Serve's own gRPC server for calls between deployments.

    Serve opens one in each replica, on all interfaces and without asking for a token, and it
    unpickles what it is sent. Nothing here uses it, so it gets a Unix socket in a directory that
    only the user can enter. Must be called before the replica's constructor returns.
    """
    from ray.serve._private import replica

    def bind(server: Any, _address: str) -> int:
        port: int = server.add_insecure_port(f"unix:{directory}/serve.sock")
        return port

    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    # Loud if Ray moves it: the attribute must exist.
    assert callable(replica.add_port_to_grpc_server)
    replica.add_port_to_grpc_server = bind
