"""A sampling profiler that Python loads at its start where this directory is on PYTHONPATH.

Waits, at no cost, in the processes that run the modules named in SAMPLED_MODULES (parted by
spaces): SIGUSR1 begins, SIGUSR2 ends and writes SAMPLES_DIRECTORY/MODULE.PID.json, a list of
[stack, seconds], each stack a list of `file:function:line` from the outermost call on.

Only the main thread's CPU time is counted: what passes between two samples is the later one's.
Native code shows as the Python line that called it; a loop's own work shows as the loop.
Boundary: imports nothing of Baton's.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from types import FrameType
from typing import Final

SAMPLE_EVERY_S: Final = 0.002


class Sampler:
    """Collects stacks while the process uses its CPU."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._seconds: dict[tuple[str, ...], float] = {}
        self._last_s = 0.0

    def wait(self) -> None:
        """For the signals."""
        signal.signal(signal.SIGUSR1, self._begin)
        signal.signal(signal.SIGUSR2, self._end)

    def _begin(self, _number: int, _frame: FrameType | None) -> None:
        self._last_s = time.thread_time()
        signal.signal(signal.SIGPROF, self._sample)
        signal.setitimer(signal.ITIMER_PROF, SAMPLE_EVERY_S, SAMPLE_EVERY_S)

    def _sample(self, _number: int, frame: FrameType | None) -> None:
        now_s = time.thread_time()
        stack = []
        while frame is not None:
            code = frame.f_code
            stack.append(f"{code.co_filename}:{code.co_qualname}:{frame.f_lineno}")
            frame = frame.f_back
        key = tuple(reversed(stack))
        self._seconds[key] = self._seconds.get(key, 0.0) + now_s - self._last_s
        self._last_s = time.thread_time()

    def _end(self, _number: int, _frame: FrameType | None) -> None:
        signal.setitimer(signal.ITIMER_PROF, 0.0)
        draft = f"{self._path}.draft"
        with open(draft, "w") as file:
            json.dump(list(self._seconds.items()), file)
        os.replace(draft, self._path)
        self._seconds.clear()


def _sampled_module() -> str | None:
    for module in os.environ.get("SAMPLED_MODULES", "").split():
        if module in sys.orig_argv:
            return module
    return None


if (_module := _sampled_module()) is not None:
    Sampler(f"{os.environ['SAMPLES_DIRECTORY']}/{_module}.{os.getpid()}.json").wait()
