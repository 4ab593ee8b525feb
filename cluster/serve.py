"""`baton serve`: from nothing to /health = 200, and back to nothing.

The order: check everything that can be checked, start the guard, make the model and Ray ready side
by side, then the supervisor with its workers and the router unit side by side. Whatever happens at
whatever moment, the end is the same: an orderly stop within limits, then the guard's sweep.
"""

from __future__ import annotations

import asyncio
import functools
import http.client
import os
import secrets
import signal
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from cluster import engine_profile, launch, model
from cluster.config import Config, GrpcSection
from cluster.instance import Instance
from cluster.local_ray import LocalRay
from cluster.ports import accepts, check_port, target, url
from cluster.terminal import Terminal
from protos.errors import BatonError, ConfigError

_HEALTH_EVERY_S: Final = 0.2
_GRPC_WITHIN_S: Final = 20.0
"""After the rest is healthy; it takes a second."""
_SAME_SIGNAL_S: Final = 0.5
_STOP_WORKERS_S: Final = 6.0
_STOP_RAY_S: Final = 2.0
_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Each stops it, but for a hangup under `nohup`."""


def serve(config: Config) -> int:
    """Serve until Ctrl-C or SIGTERM; returns the exit code. Call it from the main thread."""
    launch.check_binaries()
    launch.check_recordings(config)
    if config.router.policy == "joint":
        engine_profile.check(config)  # What is wrong with it is said before anything starts.
    check_port(config.http.host, config.http.port)
    if config.grpc.port is not None:
        check_port(config.grpc.host, config.grpc.port, "grpc", "--grpc-port")
    # Held back until someone takes them: the guard doesn't watch over the directories yet.
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    instance = Instance(config.run_directory)
    terminal = Terminal()
    terminal.line(f"Baton, instance {instance.id}, logs in {instance.directory}")
    if launch.vllm_rs_path() is None:
        terminal.line(launch.NO_FAST_FRONT)
    instance.start_guard()
    with terminal.shown(instance.directory / "serve.log"):
        # Not asyncio.run, which would wait for threads; Ray's may still wait for what is gone.
        loop = asyncio.new_event_loop()
        code = loop.run_until_complete(_Run(config, instance, terminal).run())
    os._exit(code)


class _Run:
    """One run of `baton serve`."""

    def __init__(self, config: Config, instance: Instance, terminal: Terminal) -> None:
        self._config = config
        self._instance = instance
        self._terminal = terminal
        self._ray = LocalRay()
        self._ray_runs = False
        self._supervisor: Any = None
        self._work: asyncio.Future[None] | None = None
        self._stopping = False
        self._signalled_s = 0.0
        self._news_number = 0

    async def run(self) -> int:
        self._work = work = asyncio.ensure_future(self._serve())
        self._take_signals()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
        code = 0
        try:
            await work
        except asyncio.CancelledError:
            pass
        except BatonError as error:
            self._terminal.clear()
            self._terminal.line(f"baton serve: {error}")
            code = 2 if isinstance(error, ConfigError) else 1
            if code == 1:
                logs = self._instance.keep_logs()
                self._terminal.line(f"The logs are in {logs}.")
        self._stopping = True
        await self._stop()
        return code

    def _take_signals(self) -> None:
        loop = asyncio.get_running_loop()
        for number in _SIGNALS:
            if number is signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN:
                continue  # It was started to outlive its terminal.
            loop.add_signal_handler(number, self._on_signal)

    def _on_signal(self) -> None:
        now_s = time.monotonic()
        if self._stopping:
            # One Ctrl-C may arrive twice, from the terminal and from a parent that passes it on.
            if now_s - self._signalled_s > _SAME_SIGNAL_S:
                self._instance.end(force=True)
                os._exit(130)
            return
        self._stopping = True
        self._signalled_s = now_s
        self._terminal.clear()
        self._terminal.line("Stopping; once more to end everything at once.")
        if self._work is not None:
            self._work.cancel()

    async def _serve(self) -> None:
        config, terminal = self._config, self._terminal
        directory, _ = await _all(self._prepare_model(), self._start_ray())
        link_token = secrets.token_hex(32)
        terminal.begin(launch.ROUTER_ID, "Starting the router unit (edge, front, router)")
        self._supervisor = await asyncio.to_thread(
            launch.start_supervisor, config, self._instance, directory, link_token
        )
        follow = asyncio.ensure_future(self._follow_news())
        deploy = asyncio.ensure_future(
            asyncio.to_thread(launch.deploy_units, config, self._instance, directory, link_token)
        )
        try:
            await _first_error(follow, self._become_healthy(deploy))
            self._show_urls()
            await follow
        finally:
            follow.cancel()

    async def _prepare_model(self) -> Path:
        path = self._config.model.path
        what = "Preparing the tiny model" if path is None else f"Finding the model {path}"
        self._terminal.begin("model", what)
        report = functools.partial(self._terminal.update, "model")
        directory = await model.prepare(self._config, report)
        self._terminal.done("model")
        return directory

    async def _start_ray(self) -> None:
        address = self._config.ray.address
        self._terminal.begin("ray", "Starting Ray" if address is None else f"Joining {address}")
        start: Callable[[], None]
        if address is None:
            start = functools.partial(self._ray.start, self._instance.ray_directory)
        else:
            start = functools.partial(self._ray.connect, address)
        await asyncio.to_thread(start)
        self._ray_runs = True
        # Ray has put a handler of its own in place, which would end this process at once.
        self._take_signals()
        self._terminal.done("ray")

    async def _become_healthy(self, deploy: asyncio.Future[None]) -> None:
        await deploy
        address = f"{url(self._config.http.host, self._config.http.port)}/health"
        await asyncio.to_thread(_wait_for_health, address, lambda: self._stopping)
        await asyncio.to_thread(_wait_for_grpc, self._config.grpc, lambda: self._stopping)
        if not self._stopping:
            # It serves, whether or not the supervisor's news of it have come yet.
            self._terminal.done(launch.ROUTER_ID)

    async def _follow_news(self) -> None:
        """Show what the supervisor tells, for ever. Raises BatonError if nothing can come of it."""
        from ray.exceptions import RayError

        while True:
            try:
                news = await self._supervisor.news_after.remote(self._news_number)
            except RayError:
                # It is being restarted, and counts its news from one again.
                self._news_number = 0
                await asyncio.sleep(1)
                continue
            for item in news:
                self._news_number = item.number
                self._show(item)

    def _show(self, news: Any) -> None:
        terminal, subject = self._terminal, news.subject
        if news.kind == "starting":
            instead = f" (the one before: {news.reason})" if news.reason else ""
            terminal.begin(subject, f"Starting {subject}{instead}")
        elif news.kind == "ready":
            terminal.done(subject)
        elif news.kind == "died":
            terminal.line(f"  ! {subject} died ({news.reason}); a new one takes its place")
        else:
            terminal.failed(subject, news.reason)
            if news.fatal:
                raise BatonError(f"{subject} did not start: {news.reason}")

    def _show_urls(self) -> None:
        base = url(self._config.http.host, self._config.http.port)
        name = model.served_names(self._config)[0]
        body = f'{{"model": "{name}", "prompt": "Hello", "max_tokens": 16}}'
        grpc = self._config.grpc
        grpc_line = "" if grpc.port is None else f"  gRPC API    {target(grpc.host, grpc.port)}\n"
        self._terminal.line(
            f"\nServing {name}\n"
            f"  OpenAI API  {base}/v1\n"
            f"{grpc_line}"
            f"  health      {base}/health\n"
            f"  metrics     {base}/metrics\n"
            f"  cluster     {base}/cluster\n\n"
            f"  curl {base}/v1/completions -H 'Content-Type: application/json' -d '{body}'\n\n"
            "Ctrl-C stops it."
        )

    async def _stop(self) -> None:
        """Orderly where it is possible and quick; then the sweep."""
        if self._supervisor is not None:
            await _within(_STOP_WORKERS_S, _await(self._supervisor.stop.remote()))
            if self._config.ray.address is not None:
                await _within(_STOP_RAY_S, asyncio.to_thread(self._leave_cluster))
        if self._ray_runs:
            await _within(_STOP_RAY_S, asyncio.to_thread(self._ray.shutdown))
        await asyncio.to_thread(self._instance.end, force=False)
        self._terminal.line("Stopped.")

    def _leave_cluster(self) -> None:
        import ray

        launch.remove_units()
        ray.kill(self._supervisor)


def _wait_for_health(address: str, give_up: Callable[[], bool]) -> None:
    while not give_up() and not _is_healthy(address):
        time.sleep(_HEALTH_EVERY_S)


def _wait_for_grpc(grpc: GrpcSection, give_up: Callable[[], bool]) -> None:
    """Raises BatonError if nothing listens in time."""
    deadline_s = time.monotonic() + _GRPC_WITHIN_S
    while grpc.port is not None and not give_up() and not accepts(grpc.host, grpc.port):
        if time.monotonic() > deadline_s:
            raise BatonError(f"the gRPC front does not listen on {target(grpc.host, grpc.port)}")
        time.sleep(_HEALTH_EVERY_S)


def _is_healthy(address: str) -> bool:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(address, timeout=2) as response:
            return bool(response.status == 200)
    except (OSError, http.client.HTTPException):  # Also something else that listens there.
        return False


async def _all(first: Any, second: Any) -> tuple[Any, Any]:
    """Both results; the first error ends the wait, and is raised as it is."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = group.create_task(first), group.create_task(second)
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return tasks[0].result(), tasks[1].result()


async def _first_error(endless: asyncio.Future[None], work: Any) -> None:
    """Wait for `work`, or for an error of `endless`."""
    task = asyncio.ensure_future(work)
    done, _ = await asyncio.wait({endless, task}, return_when=asyncio.FIRST_COMPLETED)
    if endless in done:
        task.cancel()
    for ended in done:
        ended.result()


async def _await(reference: Any) -> Any:
    return await reference


async def _within(limit_s: float, work: Any) -> None:
    """Wait for it within the limit; that it fails or hangs must not stop what comes next."""
    task = asyncio.ensure_future(work)
    done, _ = await asyncio.wait({task}, timeout=limit_s)
    if not done:
        task.cancel()
    elif (error := task.exception()) is not None:
        print(f"while stopping: {error!r}")
