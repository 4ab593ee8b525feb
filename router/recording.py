"""A router's events and what its core answered, in a file: `recorder` writes it, `replay` reads it.

A recording is a sequence of msgpack messages, each after its length in 4 bytes, as on the anchor's
link: first what the core was made from, then one entry for each event. Events and commands are
encoded by msgspec from their own types, under the names of their classes; change FORMAT when a
change to one of them makes old files unreadable.

It holds what clients sent and got (prompts, as tokens), so only its user may read it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple, get_args

import msgspec
from msgspec import Raw, Struct

from protos.anchor_link import LENGTH, Splitter
from protos.errors import ConfigError, ProtocolError
from router.core.events import Command, Event
from router.live_core import Origin

FORMAT: Final = 2
_TAG: Final = "baton recording"
_READ_BYTES: Final = 1024 * 1024


class RecordingError(ConfigError):
    """A file that can't be replayed: says why not."""


class Head(Struct, array_like=True, tag=_TAG):
    """The first message."""

    format: int
    router_id: str
    origin: Origin


class _Entry(Struct, array_like=True, gc=False):
    """Any further message."""

    now_s: float
    event_kind: str
    event: Raw
    commands: list[tuple[str, Raw]] | None


class Entry(NamedTuple):
    """One event and its answer."""

    now_s: float
    event: Event
    commands: list[Command] | None
    """None: the core raised an error."""


class Recording:
    """A file to be read once. Raises RecordingError, here and later, for what can't be read."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.was_cut = False
        """It ended within an entry: its router died, or still writes."""
        self._messages = self._split()
        self._head = self._read_head()

    @property
    def origin(self) -> Origin:
        """What its core was made from."""
        return self._head.origin

    @property
    def router_id(self) -> str:
        """Of the router that wrote it."""
        return self._head.router_id

    def __iter__(self) -> Iterator[Entry]:
        read = 0
        try:
            for message in self._messages:
                yield _entry_of(message)
                read += 1
        except (msgspec.DecodeError, KeyError) as error:
            raise RecordingError(
                f"event {read + 1} of {self._path} can't be read by this version of Baton: {error}."
            ) from None
        except ProtocolError:
            raise RecordingError(f"{self._path} is damaged after event {read}.") from None

    def _read_head(self) -> Head:
        strange = RecordingError(f"{self._path} is no recording of a router's events.")
        try:
            message = next(self._messages, memoryview(b""))
            tag, found = msgspec.msgpack.decode(message)[:2]
            if tag != _TAG:
                raise strange
            if found != FORMAT:
                raise RecordingError(
                    f"{self._path} has format {found}, this version of Baton reads {FORMAT}: "
                    "replay it with the version that wrote it."
                )
            return msgspec.msgpack.decode(message, type=Head)
        except (ProtocolError, msgspec.DecodeError, TypeError, ValueError):
            raise strange from None

    def _split(self) -> Iterator[memoryview]:
        splitter = Splitter()
        left_bytes = 0
        try:
            with self._path.open("rb") as file:
                while data := file.read(_READ_BYTES):
                    left_bytes += len(data)
                    for message in splitter.feed(data):
                        left_bytes -= LENGTH.size + len(message)
                        yield message
        except OSError as error:
            raise RecordingError(f"{self._path} can't be read: {error.strerror}.") from None
        self.was_cut = left_bytes > 0


def _entry_of(message: memoryview) -> Entry:
    read = _entry.decode(message)
    event = _events[read.event_kind].decode(read.event)
    if read.commands is None:
        return Entry(read.now_s, event, None)
    commands = [_commands[kind].decode(encoded) for kind, encoded in read.commands]
    return Entry(read.now_s, event, commands)


_entry = msgspec.msgpack.Decoder(_Entry)
_events: dict[str, msgspec.msgpack.Decoder[Event]] = {
    kind.__name__: msgspec.msgpack.Decoder(kind) for kind in get_args(Event)
}
_commands: dict[str, msgspec.msgpack.Decoder[Command]] = {
    kind.__name__: msgspec.msgpack.Decoder(kind) for kind in get_args(Command)
}
