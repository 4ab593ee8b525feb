"""What a test starts does not outlive a test that is killed."""

from __future__ import annotations

import subprocess
import sys
import time

import psutil

from tests.live.cluster_process import wait_until_gone

_STARTER = """
import subprocess, sys
from tests.processes import ends_with_us
server = subprocess.Popen(["sleep", "60"], preexec_fn=ends_with_us)
print(server.pid, flush=True)
sys.stdin.read()
"""


def test_a_server_ends_with_who_started_it() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", _STARTER], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as starter:
        assert starter.stdout is not None
        server = psutil.Process(int(starter.stdout.readline()))
        time.sleep(0.2)
        assert server.is_running()
        starter.kill()
    assert wait_until_gone([server], 10) == []
