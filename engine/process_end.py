"""Waiting for the end of a process, in a worker of Ray.

Ray's workers run libuv's event loop, which hears of a child's end by SIGCHLD alone, and there that
signal may be lost: a process that has ended then seems to run. A pidfd tells without a signal.
"""

from __future__ import annotations

import asyncio
import os


async def has_ended(pid: int) -> None:
    """Returns when the process has ended, whoever's child it is and whether or not it is reaped."""
    loop = asyncio.get_running_loop()
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    event = asyncio.Event()
    loop.add_reader(descriptor, event.set)
    try:
        await event.wait()
    finally:
        loop.remove_reader(descriptor)
        os.close(descriptor)
