"""`baton replay FILE`: what a replay found, readable."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b
from itertools import zip_longest
from pathlib import Path
from typing import Any, Final

import msgspec
from rich.console import Console

from router.core.events import Command
from router.recording import Recording
from router.replay import Difference, replay

_SHOWN_ITEMS: Final = 8
"""Of a list: the first of them."""


def replay_file(path: Path, console: Console) -> bool:
    """Whether all commands were the same. Raises BatonError for what can't be replayed."""
    recording = Recording(path)
    replayed = replay(recording)
    difference = replayed.difference
    if difference is not None:
        _show(difference, console)
        return False
    console.print(
        f"{replayed.events:,} events, all commands identical "
        f"({replayed.commands:,}, over {replayed.duration_s:.1f} s of {recording.router_id})"
    )
    if recording.was_cut:
        console.print("The file ends within an event: its router died, or is still writing.")
    return True


def _show(difference: Difference, console: Console) -> None:
    def line(text: str) -> None:
        console.print(text, markup=False)

    line(
        f"event {difference.number}, {difference.after_s:.3f} s after the first, "
        "is answered otherwise than it was"
    )
    line(f"  event:    {_text(difference.event)}")
    recorded = difference.recorded
    if recorded is None:
        line("  recorded: the router failed")
        line(f"  replayed: {len(difference.replayed)} commands")
        return
    at, (then, now) = next(
        (at, both)
        for at, both in enumerate(zip_longest(recorded, difference.replayed), start=1)
        if both[0] != both[1]
    )
    line(f"  recorded: command {_place(at, recorded)}: {_text(then)}")
    line(f"  replayed: command {_place(at, difference.replayed)}: {_text(now)}")


def _place(at: int, commands: Sequence[Command]) -> str:
    return f"{at} of {len(commands)}"


def _text(value: Any) -> str:
    """With its payloads as digests."""
    if value is None:
        return "none"
    content = _short(msgspec.to_builtins(value, builtin_types=(bytes,)))
    return f"{type(value).__name__} {content}"


def _short(value: Any) -> Any:
    if isinstance(value, bytes):
        return f"<{len(value)} bytes, {blake2b(value, digest_size=4).hexdigest()}>"
    if isinstance(value, dict):
        return {key: _short(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        shown = [_short(each) for each in value[:_SHOWN_ITEMS]]
        return shown if len(shown) == len(value) else [*shown, f"… of {len(value)}"]
    return value
