"""The command: quick help, exit codes, one sentence per error; and the port check."""

from __future__ import annotations

import http.server
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from cluster.ports import check_port, target, url
from cluster.serve import _is_healthy
from cluster.status import show_status
from protos.errors import ConfigError
from tests.free_ports import free_port

_ROOT = Path(__file__).parents[2]


def baton(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "cluster", *arguments],
        cwd=_ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )


class _Operator(http.server.BaseHTTPRequestHandler):
    """Answers as the operator API does."""

    answers: dict[str, Any] = {  # noqa: RUF012
        "/cluster": {
            "baton_version": "0.1.0",
            "uptime_s": 3723,
            "engine": "simulated",
            "model": {"path": "/m", "served_names": ["tiny"]},
            "pools": {
                "prefill": {"wanted": 1, "ready": 1, "last_failures": []},
                "decode": {"wanted": 2, "ready": 1, "last_failures": []},
            },
            "routers": 1,
        },
        "/cluster/workers": {
            "workers": [
                {
                    "id": "decode-2",
                    "state": "ready",
                    "since": 0,
                    "pid": 42,
                    "restarts": 1,
                    "last_failure": "its process died",
                    "load": {"running": 3, "waiting": 0, "kv_blocks_used": 7, "kv_blocks_total": 9},
                }
            ]
        },
        "/cluster/requests/a%20b%2F%3Fc": {
            "id": "a b/?c",
            "asked_at": 0.0,
            "method": "POST",
            "path": "/v1/completions",
            "edge": {"status": "401", "termination": "PR"},
            "refusal": None,
            "requests": [],
        },
    }

    def do_GET(self) -> None:
        answer = self.answers.get(self.path)
        self.send_response(200 if answer else 404)
        self.end_headers()
        error = {"error": {"message": "no router knows a request xyz"}}
        self.wfile.write(json.dumps(answer or error).encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def operator() -> Iterator[int]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Operator)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_port
    server.shutdown()
    server.server_close()


def test_help_is_quick_and_lists_the_commands() -> None:
    took_s = []
    for _ in range(2):  # The first may compile.
        began_s = time.monotonic()
        result = baton("--help")
        took_s.append(time.monotonic() - began_s)
    assert result.returncode == 0
    assert all(command in result.stdout for command in ("serve", "status", "explain", "replay"))
    assert min(took_s) < 1.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["serve", "--port", "0"], "baton serve: http.port must be greater than or equal to 1"),
        (["serve", "--engine", "vlm"], "baton serve: engine must be 'vllm' or 'simulated'"),
        (["serve", "--config", "/gone.yaml"], "/gone.yaml can't be read"),
        (["config", "--config", "/gone.yaml"], "baton config: the configuration file"),
    ],
)
def test_bad_input_is_a_sentence_and_code_2(arguments: list[str], message: str) -> None:
    result = baton(*arguments)
    assert result.returncode == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_status_where_nobody_listens() -> None:
    result = baton("status", "--url", f"http://127.0.0.1:{free_port()}")
    assert result.returncode == 1
    assert "start one with `baton serve`" in result.stderr


def test_config_prints_what_is_in_effect() -> None:
    assert "port: 8000" in baton("config").stdout


def test_a_free_port_is_fine() -> None:
    check_port("127.0.0.1", free_port())


def test_something_else_on_the_port_is_not_taken_for_health() -> None:
    """A server of HTTP/2, for one, begins with a frame."""
    with socket.create_server(("127.0.0.1", 0)) as stranger:

        def answer() -> None:
            connection, _ = stranger.accept()
            with connection:
                connection.recv(4096)
                connection.sendall(b"\0\0\x06\4\0\0\0\0\0\0\5\0\0\x40\0")

        answering = threading.Thread(target=answer)
        answering.start()
        assert not _is_healthy(f"http://127.0.0.1:{stranger.getsockname()[1]}/health")
        answering.join()


def test_a_port_that_a_stranger_holds_is_named_with_its_holder() -> None:
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = holder.getsockname()[1]
        with pytest.raises(ConfigError) as caught:
            check_port("127.0.0.1", port)
    message = str(caught.value)
    assert f"port {port} on 127.0.0.1 is taken by" in message
    assert "--port" in message
    assert len(message.splitlines()) == 1


def test_a_port_that_another_baton_holds_is_told_so(operator: int) -> None:
    with pytest.raises(ConfigError, match="is held by another `baton serve`"):
        check_port("127.0.0.1", operator)
    result = baton("serve", "--engine", "simulated", "--port", str(operator))
    assert result.returncode == 2


def test_an_address_of_another_machine() -> None:
    with pytest.raises(ConfigError, match="is no address of this machine"):
        check_port("192.0.2.77", 8000)


def test_a_port_is_named_by_its_own_flag() -> None:
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = holder.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"port {port} .* \(--grpc-port {port + 1000}\)"):
            check_port("127.0.0.1", port, "grpc", "--grpc-port")
    with pytest.raises(ConfigError, match=r"^grpc.host 192.0.2.77 is no address"):
        check_port("192.0.2.77", 8001, "grpc", "--grpc-port")


def test_a_grpc_port_that_is_taken_is_told_before_anything_starts() -> None:
    with socket.create_server(("127.0.0.1", 0)) as holder:
        taken = str(holder.getsockname()[1])
        result = baton(
            "serve", "--engine", "simulated", "--port", str(free_port()), "--grpc-port", taken
        )
    assert result.returncode == 2
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith(f"baton serve: port {taken} on 127.0.0.1 is taken by")
    assert "--grpc-port" in line


def test_urls() -> None:
    assert url("0.0.0.0", 80) == "http://127.0.0.1:80"
    assert url("::1", 80) == "http://[::1]:80"
    assert target("::", 80) == "127.0.0.1:80"


def test_status_shows_pools_and_workers(operator: int) -> None:
    console = Console(record=True, width=100)
    show_status(f"http://127.0.0.1:{operator}", console)
    text = console.export_text()
    assert "tiny on simulated, up 1:02:03" in text
    assert "prefill 1 of 1, decode 1 of 2" in text
    assert "7/9" in text
    assert "its process died" in text


def test_explain_asks_for_the_id_as_it_is(operator: int) -> None:
    url = f"http://127.0.0.1:{operator}"
    told = baton("explain", "a b/?c", "--url", url)
    assert told.returncode == 0, told.stderr
    assert "a b/?c  POST /v1/completions" in told.stdout
    as_json = baton("explain", "a b/?c", "--json", "--url", url)
    assert json.loads(as_json.stdout) == _Operator.answers["/cluster/requests/a%20b%2F%3Fc"]


def test_explain_of_an_unknown_id_is_a_sentence(operator: int) -> None:
    result = baton("explain", "xyz", "--url", f"http://127.0.0.1:{operator}")
    assert result.returncode == 1
    assert result.stderr == "baton explain: no router knows a request xyz\n"


def test_explain_where_nobody_listens() -> None:
    result = baton("explain", "xyz", "--url", f"http://127.0.0.1:{free_port()}")
    assert result.returncode == 1
    assert "start one with `baton serve`" in result.stderr


def test_a_directory_for_recordings_that_can_not_be() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "cluster", "serve", "--engine", "simulated"],
        env={**os.environ, "BATON_ROUTER__RECORD_EVENTS": "/dev/null/recordings"},
        cwd=_ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )
    assert result.returncode == 2
    (line,) = result.stderr.strip().splitlines()
    assert "router.record_events /dev/null/recordings: Not a directory" in line


def test_replay_of_what_is_no_recording(tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("some text")
    for path, problem in (
        (tmp_path / "none", "can't be read: No such file or directory"),
        (tmp_path, "can't be read: Is a directory"),
        (tmp_path / "notes", "is no recording of a router's events"),
    ):
        result = baton("replay", str(path))
        assert (result.returncode, result.stderr) == (2, f"baton replay: {path} {problem}.\n")
