"""What /proc tells of processes that compute, wait, starve or are stopped."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from engine.vllm_host.threads import cpu_times_s, is_stopped
from engine.watch import BUSY_SHARE

BUSY = "while True: pass"
PARENT = f"import subprocess, sys; subprocess.run([sys.executable, '-c', '{BUSY}'])"
IDLE = "import time\nwhile True: time.sleep(0.05)"
POLLER = """
import threading
from kvstore.pollers import name_new_threads, own_threads
before = own_threads()
def poll():
    while True: pass
threading.Thread(target=poll).start()
name_new_threads(before)
"""
SPAN_S = 1.0


@contextmanager
def running(text: str, prepare: Callable[[], object] | None = None) -> Iterator[int]:
    process = subprocess.Popen(
        [sys.executable, "-c", text], preexec_fn=prepare, start_new_session=True
    )
    try:
        yield process.pid
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def busiest_share(pid: int, at_least: float = 0.0) -> float:
    """Of the busiest thread, over a second; waits until it is that busy, for up to 20 s."""
    deadline_s = time.monotonic() + 20
    while True:
        before, began_s = cpu_times_s(pid), time.monotonic()
        time.sleep(SPAN_S)
        used = (after - before.get(name, 0.0) for name, after in cpu_times_s(pid).items())
        share = max(used, default=0.0) / (time.monotonic() - began_s)
        if share >= at_least or time.monotonic() > deadline_s:
            return share


def test_who_computes_is_told_from_who_waits() -> None:
    with running(BUSY) as busy, running(IDLE) as idle:
        assert busiest_share(busy, at_least=0.2) >= 0.2
        # It starts up at first.
        deadline_s = time.monotonic() + 20
        while busiest_share(idle) >= BUSY_SHARE:
            assert time.monotonic() < deadline_s


def test_what_descendants_use_counts() -> None:
    with running(PARENT) as parent:
        assert busiest_share(parent, at_least=0.2) >= 0.2


def test_one_that_computes_but_gets_no_core_is_seen() -> None:
    core = min(os.sched_getaffinity(0))

    def last_in_line() -> None:
        os.sched_setaffinity(0, {core})
        os.nice(19)

    def first_in_line() -> None:
        os.sched_setaffinity(0, {core})

    with (
        running(BUSY, first_in_line),
        running(BUSY, first_in_line),
        running(BUSY, last_in_line) as starved,
    ):
        assert busiest_share(starved, at_least=2 * BUSY_SHARE) >= 2 * BUSY_SHARE


def test_who_polls_on_without_end_is_left_out() -> None:
    with running(POLLER) as poller:
        time.sleep(SPAN_S)
        deadline_s = time.monotonic() + 20
        while busiest_share(poller) >= BUSY_SHARE:
            assert time.monotonic() < deadline_s


def test_one_that_is_stopped_is_seen() -> None:
    with running(IDLE) as idle:
        assert not is_stopped(idle)
        os.kill(idle, signal.SIGSTOP)
        deadline_s = time.monotonic() + 20
        while not is_stopped(idle):
            assert time.monotonic() < deadline_s
        os.kill(idle, signal.SIGCONT)
        while is_stopped(idle):
            assert time.monotonic() < deadline_s
    assert not is_stopped(idle)
