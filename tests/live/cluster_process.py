"""`baton serve` as a person starts it: a process, watched from outside."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import psutil
import yaml

from tests.free_ports import free_port
from tests.processes import ends_with_us

T = TypeVar("T")

START_TIMEOUT_S = 240.0
STOP_TIMEOUT_S = 15.0
_LINES_TOLD = 60
BATON = Path(sys.executable).parent / "baton"
HANDED_OVER = {"policy": "least_predicted_work", "local_prefill_max_tokens": 0}
"""For `router`: every request is, whatever its length."""


@dataclass
class BatonServe:
    """A running `baton serve` with a configuration of its own."""

    process: subprocess.Popen[bytes]
    port: int
    grpc_port: int
    log_path: Path
    started: ClassVar[list[BatonServe]] = []
    """Those that this run of the tests has started."""

    @classmethod
    def start(cls, config: dict[str, Any], *, env: dict[str, str] | None = None) -> BatonServe:
        """Start it; `until_healthy` waits."""
        directory = Path(tempfile.mkdtemp(prefix="baton-live-"))
        port = config.setdefault("http", {}).setdefault("port", free_port())
        grpc_port = config.setdefault("grpc", {}).setdefault("port", free_port())
        config_path = directory / "baton.yaml"
        config_path.write_text(yaml.safe_dump(config))
        log_path = directory / "serve.log"
        with log_path.open("wb") as log:
            process = subprocess.Popen(
                [str(BATON), "serve", "--config", str(config_path)],
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env={**os.environ, **(env or {})},
                # Its session is the client's: each would get its share of the cores, however
                # little the client needs, and may then wait for seconds (autogroup).
                process_group=0,
                preexec_fn=ends_with_us,
            )
        cls.started.append(cls(process, port, grpc_port, log_path))
        return cls.started[-1]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def last_words(self) -> str:
        """The end of each of its logs: by these a failure can be explained later."""
        try:
            found = re.search(r"logs in (\S+)", self.log)
            logs = sorted(Path(found[1]).rglob("*.log")) if found else []
            return "\n".join(f"--- {log}\n{_tail(log)}" for log in [self.log_path, *logs])
        except OSError as error:  # An instance that ends removes them.
            return f"{error}"

    def until_healthy(self) -> float:
        """Wait for /health = 200; returns the seconds it took."""
        began_s = time.monotonic()
        while time.monotonic() - began_s < START_TIMEOUT_S:
            assert self.process.poll() is None, f"baton serve ended:\n{self.log}"
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=2) as response:
                    if response.status == 200:
                        return time.monotonic() - began_s
            except OSError:
                pass
            time.sleep(0.1)
        raise AssertionError(f"not healthy after {START_TIMEOUT_S} s:\n{self.log}")

    def until_complete(self) -> None:
        """Wait for the full front, which starts once the rest is healthy."""
        began_s = time.monotonic()
        while self._status_of_full_front() == 503:
            assert time.monotonic() - began_s < START_TIMEOUT_S, self.log
            time.sleep(0.2)

    def _status_of_full_front(self) -> int:
        request = urllib.request.Request(f"{self.url}/v1/messages/count_tokens", b"{}")
        try:
            with urllib.request.urlopen(request, timeout=10) as response:
                return int(response.status)
        except urllib.error.HTTPError as error:
            return error.code

    def get(self, path: str) -> Any:
        """The JSON that a GET answers, whatever its status."""
        try:
            with urllib.request.urlopen(f"{self.url}{path}", timeout=10) as response:
                return json.load(response)
        except urllib.error.HTTPError as error:
            return json.load(error)

    def workers(self, role: str | None = None) -> list[dict[str, Any]]:
        """What /cluster/workers tells."""
        listed: list[dict[str, Any]] = self.get("/cluster/workers")["workers"]
        return [worker for worker in listed if role in (None, worker["role"])]

    def metrics(self) -> dict[str, float]:
        """Every sample of /metrics by its name and labels, as written."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=10) as response:
            lines = response.read().decode().splitlines()
        samples = (line.rsplit(" ", 1) for line in lines if line and not line.startswith("#"))
        return {name: float(value) for name, value in samples}

    def metric(self, name: str, **labels: str) -> float:
        """The sum of all samples of that name that carry these labels."""
        total = 0.0
        for sample, value in self.metrics().items():
            found, _, rest = sample.partition("{")
            have = dict(re.findall(r'(\w+)="([^"]*)"', rest))
            if found == name and labels.items() <= have.items():
                total += value
        return total

    def processes(self) -> list[psutil.Process]:
        """All processes that carry the instance's mark, but `baton serve` itself."""
        mark = self._mark()
        return [p for p in psutil.process_iter() if p.pid != self.process.pid and mark in _env(p)]

    def _mark(self) -> str:
        # Set by `baton serve` for itself too late for /proc to show; its children have it.
        for child in psutil.Process(self.process.pid).children(recursive=True):
            for variable in _env(child):
                if variable.startswith("BATON_INSTANCE="):
                    return variable
        raise AssertionError("no process of this instance carries BATON_INSTANCE")

    def interrupt(self) -> float:
        """Ctrl-C; returns the seconds until it had ended. Kills it after twice the time allowed."""
        began_s = time.monotonic()
        self.process.send_signal(signal.SIGINT)
        try:
            self.process.wait(2 * STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        return time.monotonic() - began_s


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-_LINES_TOLD:])


def _env(process: psutil.Process) -> set[str]:
    try:
        content = Path(f"/proc/{process.pid}/environ").read_bytes()
    except OSError:
        return set()
    return set(content.decode(errors="replace").split("\0"))


def wait_until_gone(processes: list[psutil.Process], timeout_s: float) -> list[psutil.Process]:
    """Those that still run after the time; a pid that was given to another does not count."""
    _, alive = psutil.wait_procs(processes, timeout=timeout_s)
    return [p for p in alive if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


def once_settled(read: Callable[[], T], quiet_s: float = 3.0, timeout_s: float = 20.0) -> T:
    """What `read` gives once it has not changed for longer than workers' figures take to arrive."""
    value, since_s, began_s = read(), time.monotonic(), time.monotonic()
    while time.monotonic() - since_s < quiet_s:
        assert time.monotonic() - began_s < timeout_s, f"still changing: {value}"
        time.sleep(0.05)
        if (now := read()) != value:
            value, since_s = now, time.monotonic()
    return value
