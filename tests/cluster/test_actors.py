"""When a worker's actor counts as hung, dead, or only out of reach."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, ActorUnavailableError

from cluster import actors
from cluster.actors import until_it_ends, until_it_hangs

PROCESS = ("node", 4711)
SILENCE_S = 0.3


class Method:
    """`actor.method.remote()`: each call makes its own answer."""

    def __init__(self, answer: Callable[[], Awaitable[Any]]) -> None:
        self._answer = answer

    def remote(self) -> Awaitable[Any]:
        return self._answer()


class Actor:
    """Answers what it is told, one after the other; then for ever the last."""

    def __init__(self, *answers: Any) -> None:
        self._answers = list(answers)
        self.asked = 0
        self.beat = self.run_until_closed = Method(self._next)

    async def _next(self) -> Any:
        self.asked += 1
        answer = self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]
        if answer is None:
            await asyncio.Event().wait()
        if isinstance(answer, Exception):
            raise answer
        return answer


def out_of_reach() -> ActorUnavailableError:
    return ActorUnavailableError("the connection broke", None)


@pytest.fixture(autouse=True)
def killed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    monkeypatch.setattr(actors, "BEAT_S", 0.01)
    monkeypatch.setattr(actors, "LOOK_S", 0.01)
    monkeypatch.setattr(actors, "SILENCE_S", SILENCE_S)
    ended: list[tuple[str, int]] = []
    monkeypatch.setattr(actors, "_kill", lambda node, pid: ended.append((node, pid)))
    return ended


async def test_one_that_falls_silent_is_ended(killed: list[tuple[str, int]]) -> None:
    actor = Actor(PROCESS, PROCESS, None)
    assert "pid 4711" in await asyncio.wait_for(until_it_hangs(actor, SILENCE_S), 10)
    assert killed == [PROCESS]
    assert actor.asked == 3


async def test_one_that_never_answers_hangs_too(killed: list[tuple[str, int]]) -> None:
    assert "did not answer" in await asyncio.wait_for(until_it_hangs(Actor(None), SILENCE_S), 10)
    assert killed == []


async def test_one_that_is_out_of_reach_for_a_moment_lives() -> None:
    actor = Actor(out_of_reach(), PROCESS, out_of_reach(), PROCESS)
    watch = asyncio.ensure_future(until_it_hangs(actor, SILENCE_S))
    await asyncio.wait({watch}, timeout=3 * SILENCE_S)
    assert not watch.done()
    watch.cancel()


async def test_one_that_dies_is_told_apart() -> None:
    with pytest.raises(ActorDiedError):
        await asyncio.wait_for(until_it_hangs(Actor(PROCESS, ActorDiedError()), SILENCE_S), 10)


async def test_a_lost_connection_is_no_death() -> None:
    actor = Actor(out_of_reach(), out_of_reach(), ActorDiedError())
    with pytest.raises(ActorDiedError):
        await asyncio.wait_for(until_it_ends(actor), 10)
    assert actor.asked == 3
