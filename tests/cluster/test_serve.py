"""`baton serve` with simulated engines: Ray closed to strangers, replacement, adoption, the end.

One run for all of it, in order; what a request goes through is the live suite's.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.free_ports import free_port
from tests.processes import ends_with_us

_ROOT = Path(__file__).parents[2]
_STRANGER = """
import sys, ray
ray.init(address=sys.argv[1], log_to_driver=False)
print("let in", ray.nodes())
"""


class Serving:
    """A running `baton serve`."""

    def __init__(self, directory: Path, port: int) -> None:
        self.port = port
        self.output = directory / "output"
        with self.output.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "cluster", "serve", "--engine", "simulated",
                 "--port", str(port)],
                cwd=_ROOT,
                stdout=output,
                stderr=output,
                env={
                    **os.environ,
                    "BATON_RUN_DIRECTORY": str(directory),
                    "BATON_GRPC__PORT": "null",
                },
                preexec_fn=ends_with_us,
            )  # fmt: skip

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=5) as response:
            return json.loads(response.read())

    def workers(self) -> list[dict[str, Any]]:
        workers: list[dict[str, Any]] = self.get("/cluster/workers")["workers"]
        return workers

    def ready(self, *names: str) -> bool:
        """Whether exactly these workers serve."""
        try:
            return {w["id"] for w in self.workers() if w["state"] == "ready"} == set(names)
        except (OSError, ValueError):
            assert self.process.poll() is None, self.output.read_text()
            return False

    def anchor(self) -> int | None:
        try:
            pid: int | None = self.get("/cluster/routers")["routers"][0]["anchor"]
        except (OSError, ValueError, IndexError):  # Also while it is not announced yet.
            return None
        return pid

    def instance(self) -> str:
        return self.output.read_text().partition("instance ")[2][:8]

    def processes(self) -> list[psutil.Process]:
        """All of the instance, by mark or by descent."""
        mark = self.instance()
        found = set()
        for process in psutil.process_iter():
            try:
                if process.environ().get("BATON_INSTANCE") == mark:
                    found.update([process, *process.children(recursive=True)])
            except psutil.Error:
                continue
        return sorted(found, key=lambda process: process.pid)

    def pid_of(self, title: str) -> int:
        for process in self.processes():
            if process.cmdline()[0].startswith(title):
                return int(process.pid)
        raise AssertionError(f"no process {title}")


def until(condition: Callable[[], bool], limit_s: float) -> None:
    deadline_s = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline_s, "took too long"
        time.sleep(0.1)


@pytest.fixture
def serving() -> Iterator[Serving]:
    # Paths of sockets are short, and pytest's directories may be long.
    directory = Path(tempfile.mkdtemp(prefix="baton-"))
    running = Serving(directory, free_port())
    yield running
    if running.process.poll() is None:
        running.process.send_signal(signal.SIGTERM)
        running.process.wait(20)
    shutil.rmtree(directory, ignore_errors=True)


def test_a_life(serving: Serving) -> None:
    until(lambda: serving.ready("prefill-0", "decode-0"), 60)
    until(lambda: serving.anchor() is not None, 20)  # The unit answers before it is announced.
    (router,) = serving.get("/cluster/routers")["routers"]
    assert router["id"] == "router-0"
    assert psutil.Process(router["anchor"]).is_running()
    assert serving.get("/cluster")["pools"]["decode"] == {
        "wanted": 1,
        "ready": 1,
        "last_failures": [],
    }
    nothing_beyond_loopback(serving)
    no_stranger_gets_in(serving)
    a_second_one_is_told_why(serving)

    os.kill(serving.workers()[1]["pid"], signal.SIGKILL)
    until(lambda: serving.ready("prefill-0", "decode-1"), 20)
    assert serving.workers()[1]["last_failure"] == "its process died"

    kept = {w["id"]: w["pid"] for w in serving.workers()}
    os.kill(serving.pid_of("ray::Supervisor"), signal.SIGKILL)
    time.sleep(0.2)
    until(lambda: serving.ready("prefill-0", "decode-1"), 20)
    assert {w["id"]: w["pid"] for w in serving.workers()} == kept

    os.kill(router["anchor"], signal.SIGKILL)
    until(lambda: serving.anchor() not in (None, router["anchor"]), 20)

    everything = serving.processes()
    assert len(everything) > 8
    serving.process.kill()
    serving.process.wait()
    psutil.wait_procs(everything, timeout=15)
    left = [process for process in everything if process.is_running()]
    assert [p for p in left if p.status() != psutil.STATUS_ZOMBIE] == []


def nothing_beyond_loopback(serving: Serving) -> None:
    for process in serving.processes():
        for connection in process.net_connections("inet"):
            if connection.status == psutil.CONN_LISTEN:
                address = connection.laddr.ip.removeprefix("::ffff:")
                assert address in ("127.0.0.1", "::1"), (process.cmdline(), connection)


def no_stranger_gets_in(serving: Serving) -> None:
    command = next(
        p.cmdline() for p in serving.processes() if "gcs_server" in " ".join(p.cmdline()[:1])
    )
    ports = [
        connection.laddr.port
        for process in serving.processes()
        if process.cmdline() == command
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    ]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    # Without it a driver asks at the host's address, where nothing listens.
    environment["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    stranger = subprocess.run(
        [sys.executable, "-c", _STRANGER, f"127.0.0.1:{ports[0]}"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert stranger.returncode != 0
    assert "let in" not in stranger.stdout
    assert "token" in stranger.stderr.lower()


def a_second_one_is_told_why(serving: Serving) -> None:
    second = subprocess.run(
        [sys.executable, "-m", "cluster", "serve", "--engine", "simulated",
         "--port", str(serving.port)],
        cwd=_ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )  # fmt: skip
    assert second.returncode == 2
    assert f"port {serving.port} on 127.0.0.1 is held by another `baton serve`" in second.stderr


def test_ctrl_c_while_starting(serving: Serving) -> None:
    until(lambda: "Starting Ray" in serving.output.read_text(), 20)
    time.sleep(1.5)
    everything = serving.processes()
    began_s = time.monotonic()
    serving.process.send_signal(signal.SIGINT)
    assert serving.process.wait(15) == 0
    assert time.monotonic() - began_s < 15
    assert serving.processes() == []
    assert not [p for p in everything if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
    assert "Stopped." in serving.output.read_text()
