"""A child and its standbys: real processes, on a clock that the test moves."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from running_unit import eventually

from router.unit.children import Child, Command
from tests.processes import command

SLEEP = ["sleep", "61.5"]
SHELL = ["/bin/sh", "-c", f"read line && exec {' '.join(SLEEP)}"]
"""Waits until it is told to begin, then until it is killed."""
LOOK_EVERY_S = 0.2


@pytest.fixture
def child(tmp_path: Path) -> Iterator[Child]:
    command = Command(SHELL, os.environ, standbys=2, settled_s=0.2)
    child = Child("waits", tmp_path, command)
    yield child
    child.end()
    assert child.wait(5)


def processes() -> list[int]:
    """All of the child's, in the order in which they started."""
    # Others are the clusters that tests share.
    its = [p for p in psutil.Process().children() if command(p) in (SHELL, SLEEP)]
    return [p.pid for p in sorted(its, key=lambda p: (p.create_time(), p.pid))]


def until_ended(pid: int) -> None:
    """Its parent is told, but has not asked yet."""
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)


def look(child: Child, from_s: float, to_s: float) -> None:
    """As the anchor does: now and then, and when one is due."""
    now_s = from_s
    while now_s < to_s:
        child.keep_standby(now_s)
        now_s = min(now_s + LOOK_EVERY_S, child.standby_due_s or to_s)


def until_running(count: int) -> None:
    """So many; one that was told to begin may be on its way from one command to the next."""
    eventually(lambda: len(processes()) == count)


def kill(child: Child, now_s: float) -> None:
    assert child.pid is not None
    os.kill(child.pid, signal.SIGKILL)
    until_ended(child.pid)
    assert child.ended(now_s) == -signal.SIGKILL


def test_standbys_come_one_by_one_and_after_the_process_itself(child: Child) -> None:
    assert child.start(0.0)
    look(child, 0.0, 0.25)
    until_running(1)
    look(child, 0.3, 0.5)
    until_running(2)
    look(child, 0.5, 2.0)
    until_running(3)


def test_the_eldest_takes_its_place(child: Child) -> None:
    child.start(0.0)
    look(child, 0.0, 2.0)
    until_running(3)
    _, eldest, youngest = processes()
    kill(child, 2.0)
    assert child.due_s == 2.0
    child.start(2.0)
    assert child.pid == eldest
    until_running(2)
    assert processes() == [eldest, youngest]


def test_deaths_in_a_row_do_not_put_off_the_next_standby(child: Child) -> None:
    """Else those that follow would find none that is loaded."""
    child.start(0.0)
    look(child, 0.0, 2.0)
    assert child.standby_due_s is None
    for at_s in (2.0, 2.1, 2.25):
        kill(child, at_s)
        assert child.standby_due_s is None  # Nothing but the process itself is waited for.
        child.start(at_s)
        assert child.standby_due_s == 2.3
    until_running(1)
    look(child, 2.25, 2.85)
    until_running(2)
    # One takes its time to load: the next comes when that is over.
    assert child.standby_due_s == pytest.approx(2.9)
    look(child, 2.85, 2.95)
    until_running(3)


def test_a_standby_that_ends_is_replaced_after_a_pause(child: Child) -> None:
    child.start(0.0)
    look(child, 0.0, 2.0)
    until_running(3)
    _, eldest, _ = processes()
    os.kill(eldest, signal.SIGKILL)
    until_ended(eldest)
    look(child, 2.0, 3.9)
    until_running(2)
    look(child, 4.0, 4.2)
    until_running(3)
