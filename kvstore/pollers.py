"""Names for threads that poll on without end, so that nobody takes them for an engine at work.

Boundary: no vLLM, no NIXL; used by the connector and by the one who watches the engine process.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Final

POLLER_NAME: Final = "nixl"
"""What Linux shows as the thread's name."""


def own_threads() -> set[str]:
    """Ids of this process's threads."""
    return set(os.listdir("/proc/self/task"))


def name_new_threads(before: set[str]) -> None:
    """Name the threads that were not there `before`, by `own_threads`, as pollers."""
    for thread in own_threads() - before:
        with contextlib.suppress(OSError):  # It has ended.
            Path(f"/proc/self/task/{thread}/comm").write_text(POLLER_NAME)
