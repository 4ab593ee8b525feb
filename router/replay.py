"""Replays a recording through a fresh core: are its commands those that were given live?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from router.core.events import Command, Event
from router.live_core import make_core
from router.recording import Recording


@dataclass(frozen=True, slots=True)
class Difference:
    """The first event that was answered otherwise."""

    number: int
    """Of the event, from 1."""
    after_s: float
    """From the first event."""
    event: Event
    recorded: Sequence[Command] | None
    """None: the core raised an error."""
    replayed: Sequence[Command]


@dataclass(slots=True)
class Replayed:
    """What a replay found."""

    events: int = 0
    """Answered as they were."""
    commands: int = 0
    duration_s: float = 0.0
    """From the first event to the last."""
    difference: Difference | None = None


def replay(recording: Recording) -> Replayed:
    """Up to the first difference.

    Raises BatonError for what can't be read, and what the core raised live.
    """
    core = make_core(recording.origin)
    replayed = Replayed()
    began_s: float | None = None
    for entry in recording:
        began_s = entry.now_s if began_s is None else began_s
        replayed.duration_s = entry.now_s - began_s
        commands = core.handle(entry.now_s, entry.event)
        if commands != entry.commands:
            replayed.difference = Difference(
                replayed.events + 1, replayed.duration_s, entry.event, entry.commands, commands
            )
            break
        replayed.events += 1
        replayed.commands += len(commands)
    return replayed
