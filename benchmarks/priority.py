"""Real-time priority for processes that are measured, on a machine that others use as well.

Boundary: of threads that run now; what they start later has none.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

_REAL_TIME: Final = os.SCHED_RR | os.SCHED_RESET_ON_FORK


@contextmanager
def real_time(pids: Iterable[int]) -> Iterator[None]:
    """All others get what these leave. Raises PermissionError where that is not allowed."""
    threads = [int(path.name) for pid in pids for path in Path(f"/proc/{pid}/task").iterdir()]
    try:
        _schedule(threads, _REAL_TIME, 1)
        yield
    finally:
        _schedule(threads, os.SCHED_OTHER, 0)


def _schedule(threads: Iterable[int], policy: int, priority: int) -> None:
    for thread in threads:
        with suppress(ProcessLookupError):
            os.sched_setscheduler(thread, policy, os.sched_param(priority))
