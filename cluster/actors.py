"""A worker's actor, seen through Ray: ask it, notice that it hangs, say why it died."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import time
from typing import Any, Final

import ray
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayError, RayTaskError

from engine.watch import AwakeClock

logger = logging.getLogger(__name__)

BEAT_S: Final = 1.0
"""How often an actor is asked whether it lives."""
SILENCE_S: Final = 8.0
"""One that does not answer for so long hangs: stopped, or stuck. The starts of others may hold its
event loop up for 3 s."""
STARTED_WITHIN_S: Final = 120.0
"""For Ray to start a process, and for the process to answer first, on a machine with much to do."""
LOOK_S: Final = 0.5


async def ask(reference: Any) -> Any:
    """A Ray reference as a coroutine."""
    return await reference


async def settle(reference: Any) -> None:
    """Wait for an answer or a death."""
    try:
        await reference
    except RayError as error:
        logger.info("while stopping: %s", describe(error))


async def until_it_ends(actor: Any) -> None:
    """Raises RayError when it dies, with the reason that it gave; a lost connection is no death."""
    while True:
        try:
            await ask(actor.run_until_closed.remote())
        except ActorUnavailableError:
            await asyncio.sleep(BEAT_S)


async def until_it_hangs(actor: Any, first_answer_s: float = SILENCE_S) -> str:
    """Ask it again and again; when it hangs, kill its process and tell why.

    Raises RayError when it dies. Its first answer may take `first_answer_s`.
    """
    clock = AwakeClock(time.monotonic())
    answered_s, limit_s = clock.time_s, first_answer_s
    process: tuple[str, int] | None = None
    beat: asyncio.Future[Any] = asyncio.ensure_future(ask(actor.beat.remote()))
    try:
        while clock.time_s - answered_s < limit_s:
            await asyncio.wait({beat}, timeout=LOOK_S)
            now_s = clock.look(time.monotonic())
            if beat.done():
                if (answer := _answer(beat)) is not None:
                    process, answered_s, limit_s = answer, now_s, SILENCE_S
                await asyncio.sleep(BEAT_S)
                beat = asyncio.ensure_future(ask(actor.beat.remote()))
    finally:
        beat.cancel()
    if process is None:
        return f"it hung: its actor did not answer for {limit_s:.0f} s"
    node, pid = process
    _kill(node, pid)
    return f"it hung: its actor (pid {pid}) did not answer for {SILENCE_S:.0f} s"


def _answer(beat: asyncio.Future[Any]) -> tuple[str, int] | None:
    """Node and pid; None: it may be the connection."""
    try:
        node, pid = beat.result()
    except ActorUnavailableError:
        return None
    return node, pid


def _kill(node: str, pid: int) -> None:
    """End the process at once; Ray's own kill, for other nodes, first waits 5 s for its consent."""
    if node == ray.get_runtime_context().get_node_id():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def describe(error: RayError) -> str:
    """Why a call to a worker failed, in one line."""
    if isinstance(error, RayTaskError):
        return " ".join(str(error.cause).split())
    if isinstance(error, ActorDiedError):
        text = " ".join(str(error).split())
        detail = text.partition("Worker exit detail: ")[2].partition(" Some common causes")[0]
        if "connection error code 2" in detail:
            return "its process died"
        return detail or text
    return " ".join(str(error).split())
