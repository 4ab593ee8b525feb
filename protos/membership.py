"""Who the workers are: the file that tells a router, replaced as a whole when it changes.

A file, because a router that starts must know its workers while every other process may be down.
"""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
from msgspec import Struct


class Member(Struct, frozen=True):
    """One worker to attach to."""

    worker_id: str
    incarnation: int
    role: str
    address: str
    node: str
    pid: int
    weights: str
    """Digest of what it computes with: those who differ share no request and no KV state."""
    draining: bool = False


class Gone(Struct, frozen=True):
    """One that was a worker, and the reason for its end."""

    worker_id: str
    incarnation: int
    why: str


class Membership(Struct, frozen=True):
    """All workers, as of `version`, which only grows, and the last of those that are gone."""

    version: int
    members: list[Member]
    gone: list[Gone] = []


def save(path: Path, membership: Membership) -> None:
    """Replace the file in one step, so that no reader sees half of it."""
    draft = path.with_name(f"{path.name}.{os.getpid()}")
    draft.write_bytes(msgspec.json.encode(membership))
    draft.replace(path)


def load(path: Path) -> Membership:
    """The file's content; no file means no workers yet."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return Membership(0, [])
    return msgspec.json.decode(content, type=Membership)
