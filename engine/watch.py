"""Has something hung? Times and what was seen of it in, a verdict out: pure, no clock.

One rule for all who judge: only time that the watcher itself was awake counts. One that was stopped
or starved finds everybody silent when it wakes, although nobody was; it gives them a new window.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

HANG_S: Final = 8.0
"""Work waits and nothing comes of it for so long: it hangs, unless it computes."""
QUIET_S: Final = 7.0
"""The last part of it, in which it computed nothing."""
BUSY_SHARE: Final = 0.02
"""Of a core, by one thread, is computing. Measured on 2 cores: the busiest thread of an idle engine
uses 0.002, that of one that only waits for blocks or a grammar 0.13."""
STOPPED_S: Final = 5.0
"""A signal has stopped it for so long: it hangs, with and without work."""
ENDLESS_S: Final = 300.0
"""No step and no prompt takes so long, however busy its engine is."""
LONGEST_LOOK_S: Final = 1.0
"""A watcher whose looks lie further apart was not awake in between."""


class AwakeClock:
    """Seconds that its reader was awake: of a longer pause between looks only a part counts."""

    def __init__(self, now_s: float, longest_look_s: float = LONGEST_LOOK_S) -> None:
        self.time_s = 0.0
        self._longest_look_s = longest_look_s
        self._looked_s = now_s

    def look(self, now_s: float) -> float:
        """Go on to `now_s`, a monotonic time; returns `time_s`."""
        self.time_s += min(now_s - self._looked_s, self._longest_look_s)
        self._looked_s = now_s
        return self.time_s


class EngineWatch:
    """Whether an engine hangs: work waits, and it neither ends a step nor uses CPU time."""

    def __init__(self, now_s: float) -> None:
        self._clock = AwakeClock(now_s)
        self._warm = False
        self._stopped_s = 0.0
        """How long it has been stopped (SIGSTOP)."""
        self._stepless_s = 0.0
        """Seconds with work waiting since its last step; those without work don't count."""
        self._quiet_s = 0.0
        """The part of it that was watched since a thread was last seen to compute."""
        self._used: dict[str, float] = {}
        """CPU seconds by thread within `_quiet_s`."""
        self._seen: Mapping[str, float] = {}
        """Their CPU seconds as of the last look; empty if there was none within `_quiet_s`."""

    def warmed_up(self) -> None:
        """It has computed a request of each kind. Until then it loads code while it computes, and
        waits for disks that may be busy with what was just installed: quiet is no hang."""
        self._warm = True

    def stepped(self) -> None:
        """It ended a step, or said anything else."""
        self._stepless_s = 0.0
        self._restart_quiet()

    def look(
        self,
        now_s: float,
        *,
        waits: bool,
        stopped: bool,
        threads: Callable[[], Mapping[str, float]],
    ) -> str | None:
        """What is wrong with it, if it hangs; to be called about twice a second.

        `waits`: it has work. `stopped`: its process is. `threads`: the CPU seconds of each of its
        threads and its children's so far; asked for only while it may hang.
        """
        before_s = self._clock.time_s
        passed_s = self._clock.look(now_s) - before_s
        self._stopped_s = self._stopped_s + passed_s if stopped else 0.0
        if self._stopped_s >= STOPPED_S:
            return f"it has been stopped (SIGSTOP) for {self._stopped_s:.0f} s"
        if not waits:
            return None
        self._stepless_s += passed_s
        if self._stepless_s >= ENDLESS_S:
            return f"work waits and it has ended no step for {self._stepless_s:.0f} s"
        if self._warm and self._stepless_s > passed_s:  # No step since the last look.
            return self._judge_use(passed_s, threads())
        return None

    def _judge_use(self, passed_s: float, threads: Mapping[str, float]) -> str | None:
        if not self._seen:
            self._seen = threads
            return None
        self._quiet_s += passed_s
        for name, cpu_s in threads.items():
            used_s = cpu_s - self._seen.get(name, 0.0)
            self._used[name] = self._used.get(name, 0.0) + used_s
        self._seen = threads
        busiest_s = max(self._used.values(), default=0.0)
        if busiest_s > BUSY_SHARE * QUIET_S:
            self._restart_quiet()
        elif self._quiet_s >= QUIET_S and self._stepless_s >= HANG_S:
            return (
                f"work waits, it has ended no step for {self._stepless_s:.0f} s and used no CPU "
                f"time ({busiest_s * 1000:.0f} ms in {self._quiet_s:.0f} s)"
            )
        return None

    def _restart_quiet(self) -> None:
        self._quiet_s = 0.0
        self._used = {}
        self._seen = {}
