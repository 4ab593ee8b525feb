"""A real router and real workers: one hangs, a link is cut, the router itself is stopped."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest

from protos import enginecore
from protos.enginecore import EngineRequest
from tests.router.cut_link import CutLink
from tests.router.running_router import Stream, Unit, expected, until

NOTICED_WITHIN_S = 10.0
CUT_S = 5.0
STOPPED_S = 12.0
"""Longer than any silence that a router waits for."""
SLOW_STEP_S = 0.02


pytestmark = pytest.mark.slow


@pytest.fixture
async def unit(tmp_path: Path) -> AsyncIterator[Unit]:
    unit = Unit(tmp_path)
    try:
        yield unit
    finally:
        unit.close()


def ask(
    unit: Unit, count: int, max_tokens: int, prompt_tokens: int = 40
) -> list[tuple[EngineRequest, Stream]]:
    requests = [unit.request(prompt_tokens, max_tokens=max_tokens) for _ in range(count)]
    return [(request, unit.anchor.ask(request)) for request in requests]


async def all_begun(asked: Sequence[tuple[EngineRequest, Stream]]) -> None:
    for _, stream in asked:
        await stream.begun(5)


async def assert_exact(asked: Sequence[tuple[EngineRequest, Stream]]) -> None:
    for request, stream in asked:
        await asyncio.wait_for(stream.done.wait(), 60)
        assert stream.finish == enginecore.FINISH_LENGTH
        assert stream.tokens == await expected(request)


async def test_a_worker_that_hangs_is_dead_to_the_router_and_fenced_when_it_wakes(
    unit: Unit,
) -> None:
    await unit.start("p0", "d0", "d1", step_s=SLOW_STEP_S)
    await unit.sees(3)
    asked = ask(unit, 6, max_tokens=700)
    await all_begun(asked)
    unit.workers["d0"].send_signal(signal.SIGSTOP)
    stopped_s = time.monotonic()
    await until(lambda: sum(s.finish is not None for _, s in asked) == 3, NOTICED_WITHIN_S)
    ended = [(r, s) for r, s in asked if s.finish is not None]
    others = [(r, s) for r, s in asked if s.finish is None]
    print(f"noticed after {time.monotonic() - stopped_s:.1f} s")
    for request, stream in ended:
        assert stream.finish == enginecore.FINISH_ERROR
        assert stream.tokens == (await expected(request))[: len(stream.tokens)]
    given = [len(stream.tokens) for _, stream in ended]
    await unit.sees(2)
    again = ask(unit, 4, max_tokens=20)
    await assert_exact(again)

    unit.workers["d0"].send_signal(signal.SIGCONT)
    await unit.sees(3)
    await assert_exact(others)
    await unit.idle()
    assert [len(stream.tokens) for _, stream in ended] == given
    await assert_exact(ask(unit, 6, max_tokens=20))
    _, state = await unit.get("/state")
    assert state["counts"]["orphans"] == 3
    assert state["under_way"] == {}


async def test_a_link_that_breaks_or_is_cut_for_5_s_loses_nothing(unit: Unit) -> None:
    links = {"p0": CutLink(), "d0": CutLink()}
    await unit.anchor.listen()
    unit.start_router()
    for name, link in links.items():
        unit.start_worker(name, step_s=SLOW_STEP_S)
        link.worker_port = unit.move_worker(name, await link.listen())
    unit.tell_members()
    await unit.healthy()
    asked = ask(unit, 4, max_tokens=600)
    await all_begun(asked)
    for link in links.values():
        link.reset()
    tokens = len(asked[0][1].tokens)
    await asked[0][1].begun(tokens + 5)
    for link in links.values():
        link.cut()
    cut_s = time.monotonic()
    asked += ask(unit, 2, max_tokens=50)
    await asyncio.sleep(CUT_S)
    for link in links.values():
        link.mend()
    tokens = len(asked[0][1].tokens)
    await asked[0][1].begun(tokens + 1)
    print(f"streams go on {time.monotonic() - cut_s - CUT_S:.2f} s after the cut's end")
    await assert_exact(asked)
    await unit.idle()
    for link in links.values():
        assert link.connections >= 4  # Each try knocks first.
        link.close()


async def test_a_router_that_was_stopped_itself_takes_nobody_for_dead(unit: Unit) -> None:
    await unit.start("p0", "d0", step_s=SLOW_STEP_S)
    asked = ask(unit, 4, max_tokens=700)
    await all_begun(asked)
    assert unit.router is not None
    unit.router.send_signal(signal.SIGSTOP)
    await asyncio.sleep(STOPPED_S)
    unit.router.send_signal(signal.SIGCONT)
    await assert_exact(asked)
    _, state = await unit.get("/state")
    assert state["counts"]["resubmissions"] == 0
    await unit.idle()
