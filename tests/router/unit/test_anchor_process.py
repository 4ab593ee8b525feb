"""The anchor as the router unit starts it: detached, and told of at once when it can't start."""

from __future__ import annotations

import asyncio
import ctypes
import os
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest
import uvloop

from protos.errors import BatonError
from router import settings
from router.settings import UnitPaths, UnitSettings
from router.unit.children import start_time
from router.unit.deployment import AnchorProcess

LONG_BEFORE_ITS_LIMIT_S = 8.0


async def test_one_that_ends_at_once_is_told_at_once_with_its_reason(tmp_path: Path) -> None:
    paths = UnitPaths(tmp_path)
    paths.logs.mkdir()
    paths.unit_settings.write_text("{}")
    began_s = time.monotonic()
    with pytest.raises(BatonError, match=r"can't use .*unit\.json"):
        await AnchorProcess(tmp_path).start()
    assert time.monotonic() - began_s < LONG_BEFORE_ITS_LIMIT_S


def test_it_hears_of_the_end_without_a_signal(tmp_path: Path) -> None:
    """As in a worker of Ray, which runs libuv's loop and may take SIGCHLD from it."""
    paths = UnitPaths(tmp_path)
    paths.logs.mkdir()
    paths.unit_settings.write_text("{}")
    over = threading.Event()

    def take_the_signal() -> None:
        set_disposition = ctypes.CDLL(None).signal
        while not over.wait(0.0001):
            set_disposition(signal.SIGCHLD, 0)  # The default: nothing happens.

    async def start() -> int:
        async with asyncio.timeout(LONG_BEFORE_ITS_LIMIT_S):
            return await AnchorProcess(tmp_path).start()

    before = signal.getsignal(signal.SIGCHLD)
    thread = threading.Thread(target=take_the_signal)
    thread.start()
    try:
        with pytest.raises(BatonError, match=r"can't use .*unit\.json"):
            uvloop.run(start())
    finally:
        over.set()
        thread.join()
        signal.signal(signal.SIGCHLD, before)


async def test_it_waits_for_the_port_that_the_one_before_still_holds(tmp_path: Path) -> None:
    before = await asyncio.start_server(lambda *_: None, "127.0.0.1", 0)
    port = before.sockets[0].getsockname()[1]
    paths = UnitPaths(tmp_path)
    paths.logs.mkdir()
    unit = UnitSettings(
        router_id="u",
        listen_host="127.0.0.1",
        listen_port=port,
        model="none",
        served_model_names=["none"],
        vllm_rs="/bin/false",
        haproxy="/bin/false",
        admin_address="127.0.0.1:1",
        router_command=["/bin/false"],
        max_model_len_tokens=100,
    )
    settings.save(paths.unit_settings, unit)
    anchor = AnchorProcess(tmp_path)
    starting = asyncio.create_task(anchor.start())
    asyncio.get_running_loop().call_later(1.0, before.close)
    pid = await starting
    assert anchor.running() == pid
    await anchor.end()
    assert anchor.running() is None


def test_one_that_was_killed_does_not_run_even_if_nobody_reaps_it() -> None:
    process = subprocess.Popen(["/bin/sleep", "60"])
    assert start_time(process.pid) is not None
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert start_time(process.pid) is None
    process.wait()
