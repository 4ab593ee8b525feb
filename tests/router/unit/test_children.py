"""A child and its standbys: real processes, on a clock that the test moves."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from router.unit.children import Child, Command

SLEEP = ["sleep", "61.5"]
SHELL = ["/bin/sh", "-c", f"read line && exec {' '.join(SLEEP)}"]
"""Waits until it is told to begin, then until it is killed."""
QUICK_KILLS_S = 0.4


@pytest.fixture
def child(tmp_path: Path) -> Iterator[Child]:
    command = Command(SHELL, os.environ, standbys=2, settled_s=0.2)
    child = Child("waits", tmp_path, command)
    yield child
    child.end()
    assert child.wait(5)


def processes() -> list[int]:
    """All of the child's, in the order in which they started."""
    alive = [p for p in psutil.Process().children() if p.status() != psutil.STATUS_ZOMBIE]
    # Others are the clusters that tests share.
    its = [p for p in alive if p.cmdline() in (SHELL, SLEEP)]
    return [p.pid for p in sorted(its, key=lambda p: (p.create_time(), p.pid))]


def look(child: Child, from_s: float, to_s: float) -> None:
    """As the anchor does, every 0.1 s."""
    now_s = from_s
    while now_s < to_s:
        child.keep_standby(now_s)
        now_s += 0.1


def kill(child: Child, now_s: float) -> None:
    assert child.pid is not None
    os.kill(child.pid, signal.SIGKILL)
    until_s = time.monotonic() + 5
    while child.ended(now_s) is None:
        assert time.monotonic() < until_s


def test_standbys_come_one_by_one_and_after_the_process_itself(child: Child) -> None:
    assert child.start(0.0)
    look(child, 0.0, 0.25)
    assert processes() == [child.pid]
    look(child, 0.3, 0.5)
    assert len(processes()) == 2
    look(child, 0.5, 2.0)
    assert len(processes()) == 3


def test_the_eldest_takes_its_place(child: Child) -> None:
    child.start(0.0)
    look(child, 0.0, 2.0)
    _, eldest, youngest = processes()
    kill(child, 2.0)
    assert child.due_s == 2.0
    child.start(2.0)
    assert child.pid == eldest
    assert processes() == [eldest, youngest]


def test_quick_deaths_do_not_put_off_the_next_standby(child: Child) -> None:
    """Else a second death in a row would find one that still loads, or none."""
    child.start(0.0)
    look(child, 0.0, 2.0)
    for number in range(5):
        at_s = 2.0 + number * QUICK_KILLS_S
        kill(child, at_s)
        child.start(at_s)
        look(child, at_s, at_s + QUICK_KILLS_S)
    assert len(processes()) >= 2


def test_a_standby_that_ends_is_replaced_after_a_pause(child: Child) -> None:
    child.start(0.0)
    look(child, 0.0, 2.0)
    _, eldest, _ = processes()
    os.kill(eldest, signal.SIGKILL)
    until_s = time.monotonic() + 5
    while eldest in processes():
        assert time.monotonic() < until_s
    look(child, 2.0, 3.9)
    assert len(processes()) == 2
    look(child, 4.0, 4.2)
    assert len(processes()) == 3
