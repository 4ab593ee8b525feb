"""A NIXL agent whose progress thread pauses: for engines on CPUs.

NIXL's own progress thread polls without a pause (its Python interface fixes the delay at 0), which
takes a core of each engine. Without any, a peer's read makes progress only in the calls of engine
steps, and an idle engine makes none. Loaded in the engine process by `connector`.
"""

from __future__ import annotations

import threading
import uuid
from collections import defaultdict
from typing import Any, Final

from vllm.distributed.nixl_utils import NixlWrapper, nixl_agent_config

PAUSE_S: Final = 0.004
"""How long a peer's read may have to wait for an idle engine; a call takes some 10 us."""


class PacedAgent(NixlWrapper):  # type: ignore[misc]
    """Makes progress every few milliseconds, and keeps what it is notified of until asked."""

    def __init__(self) -> None:
        from nixl._api import nixl_thread_sync_t  # vLLM sets up UCX before NIXL is first imported

        config = nixl_agent_config(
            enable_prog_thread=False,
            capture_telemetry=True,
            # Its calls come from the engine, from the thread that shakes hands and from ours.
            sync_mode=nixl_thread_sync_t.NIXL_THREAD_SYNC_STRICT,
        )
        super().__init__(str(uuid.uuid4()), config)
        self._kept: defaultdict[str, list[bytes]] = defaultdict(list)
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._progress, name="nixl-progress", daemon=True)
        self._thread.start()

    def get_new_notifs(self, backends: Any = ()) -> dict[str, list[bytes]]:
        """Notifications since the last call, by agent, in the order in which they came."""
        with self._lock:
            self._collect()
            kept, self._kept = self._kept, defaultdict(list)
        return dict(kept)

    def stop(self) -> None:
        """End the progress thread; before the agent is taken down."""
        self._stop.set()
        self._thread.join()

    def _progress(self) -> None:
        while not self._stop.wait(PAUSE_S):
            with self._lock:
                self._collect()

    def _collect(self) -> None:
        for agent, notifications in super().get_new_notifs().items():
            self._kept[agent] += notifications
