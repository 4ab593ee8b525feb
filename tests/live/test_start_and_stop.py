"""`baton serve` from its first line to its last process, with simulated engines."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import select
import signal
import socket
import subprocess
import tempfile
import termios
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from tests.free_ports import free_port
from tests.live.cluster_process import (
    BATON,
    STOP_TIMEOUT_S,
    BatonServe,
    once_settled,
    wait_until_gone,
)
from tests.live.conftest import MODEL

REFUSE_WITHIN_S = 10.0
STAGES = ["Preparing the tiny model", "Starting Ray", "Starting prefill-0", "Starting decode-0"]


@dataclass
class Instance:
    """What `baton serve` puts on the machine, as far as its first line tells."""

    id: str
    directory: Path

    @classmethod
    def of(cls, serve: BatonServe) -> Instance:
        found = re.search(r"instance (\w+), logs in (\S+)", serve.log)
        assert found is not None, serve.log
        return cls(found[1], Path(found[2]))

    def processes(self) -> list[psutil.Process]:
        """All that carry its mark, or name it on their command line as its guard does."""
        return [process for process in psutil.process_iter() if self._owns(process)]

    def _owns(self, process: psutil.Process) -> bool:
        try:
            words = process.cmdline()
            marked = process.environ().get("BATON_INSTANCE") == self.id
        except psutil.Error:
            return False
        return marked or any(self.id in word for word in words)

    def leftovers(self) -> list[Path]:
        """Sockets, and the directory of its Ray."""
        temporary = Path(tempfile.gettempdir())
        return [*self.directory.rglob("*.sock"), *temporary.glob(f"baton-ray-{self.id}-*")]


def start_simulated(**config: Any) -> BatonServe:
    return BatonServe.start({"engine": "simulated", **config})


@pytest.fixture(scope="module")
def running() -> Iterator[BatonServe]:
    """One that serves while others are started beside it."""
    serve = start_simulated()
    try:
        serve.until_healthy()
        yield serve
    finally:
        serve.interrupt()


@pytest.fixture
def started() -> Iterator[Callable[..., BatonServe]]:
    """Starts one that may end in any way; nothing of it outlives the test."""
    serves = []

    def start(**config: Any) -> BatonServe:
        serves.append(start_simulated(**config))
        return serves[-1]

    yield start
    for serve in serves:
        if serve.process.poll() is None:
            serve.interrupt()


@pytest.fixture
def short_directory() -> Iterator[Path]:
    """Paths of sockets are short, and pytest's directories may be long."""
    with tempfile.TemporaryDirectory(prefix="baton-") as directory:
        yield Path(directory)


def post(serve: BatonServe, body: dict[str, Any]) -> urllib.request.Request:
    """A request for a completion."""
    headers = {"Content-Type": "application/json"}
    return urllib.request.Request(f"{serve.url}/v1/completions", json.dumps(body).encode(), headers)


def complete(serve: BatonServe) -> str:
    """The text of a short completion."""
    body = {"model": MODEL, "prompt": "Hello there, " * 30, "max_tokens": 8, "temperature": 0}
    request = urllib.request.Request(
        f"{serve.url}/v1/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=30) as response:
        text: str = json.load(response)["choices"][0]["text"]
    return text


def until(
    condition: Callable[[], bool], limit_s: float, what: str, *, every_s: float = 0.05
) -> float:
    began_s = time.monotonic()
    while not condition():
        assert time.monotonic() - began_s < limit_s, f"not within {limit_s} s: {what}"
        time.sleep(every_s)
    return time.monotonic() - began_s


# The terminal


def test_it_tells_stages_durations_and_urls(running: BatonServe) -> None:
    until(lambda: "Ctrl-C stops it" in running.log, 5, "the URLs are shown")
    for stage in [*STAGES, "Starting the router unit"]:
        assert re.search(rf"✓ {stage}.* \d+\.\d s$", running.log, re.MULTILINE), running.log
    for path in ("/v1", "/health", "/metrics", "/cluster"):
        assert f"{running.url}{path}\n" in running.log
    for path in ("/v1/models", "/health", "/metrics", "/cluster"):
        with urllib.request.urlopen(f"{running.url}{path}", timeout=10) as response:
            assert response.status == 200


def test_the_command_that_it_shows_works_as_printed(running: BatonServe) -> None:
    until(lambda: "Ctrl-C stops it" in running.log, 5, "the URLs are shown")
    (command,) = re.findall(r"^ +(curl .*)$", running.log, re.MULTILINE)
    answer = subprocess.run(
        ["bash", "-c", f"{command} --silent --noproxy '*'"],
        capture_output=True,
        check=True,
        timeout=30,
    )
    assert json.loads(answer.stdout)["usage"]["completion_tokens"] == 16


def test_its_processes_share_one_session(running: BatonServe) -> None:
    """On a busy machine one with a session of its own may wait for a core for seconds."""
    session = os.getsid(running.process.pid)
    processes = running.processes()
    assert len(processes) > 10
    assert [p for p in processes if session_of(p) not in (session, None)] == []


def session_of(process: psutil.Process) -> int | None:
    """None if it has ended."""
    try:
        return os.getsid(process.pid)
    except ProcessLookupError:
        return None


# Ports


def refused(serve: BatonServe) -> tuple[list[str], float]:
    """The lines that it ended with, and after how long."""
    began_s = time.monotonic()
    code = serve.process.wait(60)
    assert code == 2, (code, serve.log)
    assert "Traceback" not in serve.log
    return serve.log.splitlines(), time.monotonic() - began_s


def test_a_second_one_says_which_port_and_leaves_the_first_alone(running: BatonServe) -> None:
    before = once_settled(lambda: pids(running))  # Standbys and the full front come later.
    text = complete(running)
    (line,), took_s = refused(start_simulated(http={"port": running.port}))
    assert f"port {running.port}" in line
    assert "another `baton serve`" in line
    assert "stop that one, or start this one with another port (--port" in line
    assert took_s < REFUSE_WITHIN_S
    assert pids(running) == before
    assert complete(running) == text


def test_a_port_that_a_stranger_holds_is_told_with_the_stranger() -> None:
    with socket.create_server(("127.0.0.1", 0)) as stranger:
        port = stranger.getsockname()[1]
        (line,), took_s = refused(start_simulated(http={"port": port}))
    assert f"port {port}" in line
    assert f"(pid {os.getpid()})" in line
    assert "stop that process, or start this one with another port (--port" in line
    assert "another `baton serve`" not in line
    assert took_s < REFUSE_WITHIN_S


@pytest.mark.slow
def test_of_two_that_start_on_one_port_one_serves_and_the_other_says_why(
    started: Callable[..., BatonServe],
) -> None:
    port = free_port()
    both = [started(http={"port": port}) for _ in range(2)]
    until(lambda: any(s.process.poll() is not None for s in both), 90, "one gives up")
    (loser,) = [serve for serve in both if serve.process.poll() is not None]
    (winner,) = [serve for serve in both if serve is not loser]
    assert loser.process.returncode != 0
    reasons = [line for line in loser.log.splitlines() if line.startswith("baton serve: ")]
    assert any(str(port) in line for line in reasons), loser.log
    winner.until_healthy()
    assert complete(winner)
    lost = Instance.of(loser)
    assert lost.processes() == []


# The model


def test_a_model_directory_without_a_model_is_named_and_nothing_stays(tmp_path: Path) -> None:
    serve = start_simulated(model={"path": str(tmp_path)})
    lines, took_s = refused(serve)
    (line,) = [line for line in lines if line.startswith("baton serve: ")]
    assert f"model.path: {tmp_path} holds no model" in line
    assert "config.json" in line
    assert took_s < 2 * REFUSE_WITHIN_S
    instance = Instance.of(serve)
    assert instance.processes() == []
    assert instance.leftovers() == []


# The end


def press_ctrl_c(serve: BatonServe) -> None:
    """As a terminal does: to every process in the foreground."""
    os.killpg(serve.process.pid, signal.SIGINT)


def terminate(serve: BatonServe) -> None:
    serve.process.send_signal(signal.SIGTERM)


def kill(serve: BatonServe) -> None:
    serve.process.kill()


def assert_nothing_is_left(
    instance: Instance, seen: list[psutil.Process], began_s: float, how: str
) -> None:
    """All processes of the instance end within the time allowed, and so do its sockets."""
    everything = {p.pid: p for p in [*seen, *instance.processes()]}
    left_s = began_s + STOP_TIMEOUT_S - time.monotonic()
    left = wait_until_gone(list(everything.values()), max(0.0, left_s))
    assert left == [], [(p.pid, p.cmdline()) for p in left]
    print(f"{how}: {len(everything)} processes gone after {time.monotonic() - began_s:.1f} s")
    assert instance.processes() == []
    until(lambda: instance.leftovers() == [], 2, f"removed: {instance.leftovers()}")


class LongStream(threading.Thread):
    """A client in the middle of an answer."""

    def __init__(self, serve: BatonServe) -> None:
        super().__init__(daemon=True)
        self._serve = serve
        self.first_event = threading.Event()
        self.received = b""

    def run(self) -> None:
        body = {"model": MODEL, "prompt": "x " * 200, "max_tokens": 7000, "stream": True}
        try:
            with urllib.request.urlopen(post(self._serve, body), timeout=60) as response:
                for line in response:
                    self.received += line
                    if line.startswith(b"data: "):
                        self.first_event.set()
        except (OSError, ValueError):
            return  # Cut off; what came is kept.


@pytest.mark.parametrize(
    "end", [press_ctrl_c, kill, pytest.param(terminate, marks=pytest.mark.slow)]
)
def test_whatever_ends_it_ends_every_process(
    started: Callable[..., BatonServe], end: Callable[[BatonServe], None]
) -> None:
    serve = started()
    serve.until_healthy()
    instance = Instance.of(serve)
    client = LongStream(serve)
    client.start()
    assert client.first_event.wait(20)
    seen = instance.processes()
    names = " ".join(word for p in seen for word in p.cmdline())
    for part in ("gcs_server", "raylet", "Supervisor", "PrefillWorker", "DecodeWorker", "guard.py"):
        assert part in names
    for part in ("router.unit.anchor.process", "router.process", "haproxy", "vllm-rs"):
        assert part in names
    began_s = time.monotonic()
    end(serve)
    code = serve.process.wait(STOP_TIMEOUT_S)
    assert_nothing_is_left(instance, seen, began_s, end.__name__)
    client.join(5)
    assert not client.is_alive()
    assert b'"finish_reason":"' not in client.received
    if end is kill:
        assert code == -signal.SIGKILL
        # The logs stay, since they may tell why.
        assert instance.directory.is_dir()
    else:
        assert code == 0
        assert serve.log.endswith("Stopped.\n")
        assert "Traceback" not in serve.log
        assert not instance.directory.exists()
    with socket.create_server(("127.0.0.1", serve.port)):
        pass  # The port is free again.


@pytest.mark.parametrize(
    ("end", "after_s"),
    [
        (press_ctrl_c, 3.0),
        *(
            pytest.param(end, after_s, marks=pytest.mark.slow)
            for end, after_s in [
                (press_ctrl_c, 1.0),
                (press_ctrl_c, 6.0),
                (press_ctrl_c, 8.0),
                (kill, 1.5),
                (kill, 4.0),
                (kill, 7.0),
            ]
        ),
    ],
)
def test_an_end_in_the_middle_of_the_start_leaves_nothing(
    started: Callable[..., BatonServe], end: Callable[[BatonServe], None], after_s: float
) -> None:
    serve = started()
    until(lambda: "instance" in serve.log, 20, "it has said its first line")
    instance = Instance.of(serve)
    time.sleep(after_s)  # At that moment, whatever it is doing.
    seen = instance.processes()
    began_s = time.monotonic()
    end(serve)
    serve.process.wait(STOP_TIMEOUT_S)
    assert_nothing_is_left(instance, seen, began_s, f"{end.__name__} after {after_s} s")


@pytest.mark.parametrize("inherited", [signal.default_int_handler, signal.SIG_IGN])
def test_ctrl_c_before_its_first_line_leaves_nothing(
    started: Callable[..., BatonServe], inherited: Any
) -> None:
    """Also where it was started as shells start background commands, with the signal ignored."""
    ours = signal.signal(signal.SIGINT, inherited)
    try:
        serve = started()
    finally:
        signal.signal(signal.SIGINT, ours)
    until(lambda: has_begun(serve.process.pid), 20, "it has begun")
    began_s = time.monotonic()
    press_ctrl_c(serve)
    serve.process.wait(STOP_TIMEOUT_S)
    print(f"ended with {serve.process.returncode} after {time.monotonic() - began_s:.1f} s")
    until(lambda: group(serve.process.pid) == [], STOP_TIMEOUT_S, "its group is empty")
    if "instance" in serve.log:
        assert_nothing_is_left(Instance.of(serve), [], began_s, "Ctrl-C at once")


def has_begun(pid: int) -> bool:
    """It computes, and the interrupt that it may have been started without is no more ignored."""
    status = dict(
        line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines()
    )
    ignored = int(status["SigIgn"], 16) >> (signal.SIGINT - 1) & 1
    return psutil.Process(pid).cpu_times().user > 0.1 and not ignored


def test_ctrl_c_while_it_makes_its_directories_leaves_nothing(
    started: Callable[..., BatonServe], short_directory: Path
) -> None:
    base = short_directory / "run"
    serve = started(run_directory=str(base))
    until(lambda: any(base.glob("*")), 20, "its directory is there", every_s=0.001)
    (directory,) = base.iterdir()
    press_ctrl_c(serve)
    assert serve.process.wait(STOP_TIMEOUT_S) == 0, serve.log
    assert Instance(directory.name, directory).leftovers() == []
    assert not directory.exists()


def group(leader: int) -> list[int]:
    """Pids of the processes that a process started in its group."""
    members = []
    for pid in psutil.pids():
        try:
            if os.getpgid(pid) == leader:
                members.append(pid)
        except ProcessLookupError:
            continue
    return members


class Terminal:
    """A window that was opened for `baton serve` alone: its session's leader."""

    def __init__(self, config: Path, *before: str) -> None:
        self._ours, theirs = pty.openpty()
        self.process = subprocess.Popen(
            [*before, str(BATON), "serve", "--config", str(config)], cwd=config.parent,
            stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
            preexec_fn=self._is_its_own,
        )  # fmt: skip
        os.close(theirs)
        self.shown = ""

    @staticmethod
    def _is_its_own() -> None:
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        # These tests may run under nohup themselves.
        signal.signal(signal.SIGHUP, signal.SIG_DFL)

    def until_shown(self, text: str, limit_s: float) -> None:
        deadline_s = time.monotonic() + limit_s
        while text not in self.shown:
            left_s = max(0.0, deadline_s - time.monotonic())
            readable, _, _ = select.select([self._ours], [], [], left_s)
            assert readable, self.shown
            self.shown += os.read(self._ours, 65_536).decode(errors="replace")

    def close(self) -> None:
        """Which its leader is told by SIGHUP; nothing more can be shown."""
        os.close(self._ours)


def configured(directory: Path) -> tuple[Path, int]:
    """A configuration, and its HTTP port."""
    config, port = directory / "baton.yaml", free_port()
    ports = {"http": {"port": port}, "grpc": {"port": free_port()}}
    config.write_text(yaml.safe_dump({"engine": "simulated", **ports}))
    return config, port


def named_in(shown: str) -> Instance:
    """The instance that `baton serve` says it is."""
    found = re.search(r"instance (\w+), logs in (\S+)", shown)
    assert found is not None, shown
    return Instance(found[1], Path(found[2]))


def test_a_terminal_that_is_closed_leaves_nothing(short_directory: Path) -> None:
    config, _ = configured(short_directory)
    terminal = Terminal(config)
    try:
        terminal.until_shown("Ctrl-C stops it", 120)
        instance = named_in(terminal.shown)
        seen = instance.processes()
        assert len(seen) > 10
        began_s = time.monotonic()
        terminal.close()
        assert terminal.process.wait(STOP_TIMEOUT_S) == 0
        assert_nothing_is_left(instance, seen, began_s, "closed terminal")
    finally:
        terminal.process.kill()
        terminal.process.wait()


@pytest.mark.slow
def test_under_nohup_it_outlives_its_terminal(short_directory: Path) -> None:
    config, port = configured(short_directory)
    terminal = Terminal(config, "nohup")
    log = short_directory / "nohup.out"
    try:
        until(lambda: log.exists() and "Ctrl-C stops it" in log.read_text(), 120, "it serves")
        instance = named_in(log.read_text())
        # As a shell that ends tells its jobs, and the kernel the terminal's leader.
        os.killpg(terminal.process.pid, signal.SIGHUP)
        terminal.close()
        with pytest.raises(subprocess.TimeoutExpired):
            terminal.process.wait(10)
        url = f"http://127.0.0.1:{port}/cluster/workers"
        with urllib.request.urlopen(url, timeout=5) as response:
            workers = json.load(response)["workers"]
        assert [worker["restarts"] for worker in workers] == [0, 0], workers
        seen = instance.processes()
        began_s = time.monotonic()
        terminal.process.send_signal(signal.SIGTERM)
        assert terminal.process.wait(STOP_TIMEOUT_S) == 0
        assert_nothing_is_left(instance, seen, began_s, "after nohup")
    finally:
        terminal.process.kill()
        terminal.process.wait()


@pytest.mark.slow
def test_a_second_ctrl_c_ends_everything_at_once(started: Callable[..., BatonServe]) -> None:
    serve = started()
    serve.until_healthy()
    instance = Instance.of(serve)
    seen = instance.processes()
    began_s = time.monotonic()
    press_ctrl_c(serve)
    time.sleep(0.7)  # Less than half a second apart, two count as one.
    press_ctrl_c(serve)
    serve.process.wait(5)
    assert_nothing_is_left(instance, seen, began_s, "twice Ctrl-C")


# Beside each other


@pytest.mark.slow
def test_two_on_one_machine_do_not_disturb_each_other(
    running: BatonServe, started: Callable[..., BatonServe]
) -> None:
    expected = complete(running)
    before = once_settled(lambda: pids(running))  # Standbys and the full front come later.
    other = started(simulated={"step_base_s": 0.002})
    answers = 0
    while not healthy(other):
        assert complete(running) == expected
        answers += 1
        assert answers < 3000
    assert complete(other) == expected
    assert not {p.pid for p in other.processes()} & before
    other.process.send_signal(signal.SIGINT)
    while other.process.poll() is None:
        assert complete(running) == expected
        answers += 1
        assert answers < 6000
    print(f"{answers} requests were served meanwhile")
    assert complete(running) == expected
    assert pids(running) == before
    assert all(worker["restarts"] == 0 for worker in running.workers())


def pids(serve: BatonServe) -> set[int]:
    return {process.pid for process in serve.processes()}


def healthy(serve: BatonServe) -> bool:
    assert serve.process.poll() is None, serve.log
    try:
        with urllib.request.urlopen(f"{serve.url}/health", timeout=5) as response:
            return bool(response.status == 200)
    except OSError:
        return False
