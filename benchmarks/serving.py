"""A `baton serve` to be measured: started as a user would, its processes told apart.

Boundary: configuration in, process ids and figures out; what is measured is the benchmarks' own.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from benchmarks.cpu import CpuMeter
from benchmarks.measure import BACKGROUND
from tests.live.cluster_process import BatonServe

_LINKS_TOLD_S: Final = 1.5
_QUIET_CORES: Final = 0.3
_QUIET_SPAN_S: Final = 1.0
_QUIET_TIMEOUT_S: Final = 120.0


class Serving:
    """A running instance."""

    def __init__(self, serve: BatonServe, run_directory: Path) -> None:
        """Returns when it has come to rest: what serves few requests starts after it is healthy."""
        self._serve = serve
        self._run_directory = run_directory
        self.port = serve.port
        self.groups = self._find_groups()
        deadline_s = time.monotonic() + _QUIET_TIMEOUT_S
        while self._cores() > _QUIET_CORES:
            if time.monotonic() > deadline_s:
                raise TimeoutError(f"the instance was not at rest after {_QUIET_TIMEOUT_S:.0f} s")
            self.groups = self._find_groups()

    def get(self, path: str) -> Any:
        """The JSON that the operator API answers."""
        return self._serve.get(path)

    def metric(self, name: str, **labels: str) -> float:
        """The sum of /metrics' samples of that name with these labels."""
        return self._serve.metric(name, **labels)

    def link_bytes(self) -> dict[str, float]:
        """What went over each link so far, `LINK, DIRECTION`. The anchor tells once a second."""
        time.sleep(_LINKS_TOLD_S)
        told = {}
        for sample, value in self._serve.metrics().items():
            name, _, labels = sample.partition("{")
            if name == "baton_link_bytes_total":
                have = dict(re.findall(r'(\w+)="([^"]*)"', labels))
                told[f"{have['link']}, {have['direction']}"] = value
        return told

    def _cores(self) -> float:
        meter = CpuMeter(self.groups, may_end=self.groups)
        time.sleep(_QUIET_SPAN_S)
        use = meter.read()
        return sum(use.cpu_s.values()) / use.span_s

    def _find_groups(self) -> dict[str, list[int]]:
        """Process ids by what they do for a request; all others stand in no request's path."""
        (state,) = self._run_directory.glob("*/units/*/anchor-state.json")
        unit = json.loads(state.read_bytes())
        workers = self._serve.workers()
        groups = {
            "edge": [unit["edge"]["pid"]],
            "front": [front["pid"] for front in unit["fronts"] if front["front"] == 0],
            "anchor": [unit["anchor"]["pid"]],
            "router": [unit["router"]["pid"]],
            "workers": [worker["pid"] for worker in workers],
        }
        if engines := [worker["engine_pid"] for worker in workers if worker["engine_pid"]]:
            groups["engine"] = engines
        known = {pid for pids in groups.values() for pid in pids}
        others = {process.pid for process in self._serve.processes()} - known
        groups[BACKGROUND] = [self._serve.process.pid, *sorted(others)]
        return groups


@contextmanager
def serving(config: dict[str, Any], environment: dict[str, str] | None = None) -> Iterator[Serving]:
    """Healthy and at rest at the beginning, gone at the end."""
    run_directory = Path(tempfile.mkdtemp(prefix="baton-bench-"))
    serve = BatonServe.start({**config, "run_directory": str(run_directory)}, env=environment)
    try:
        serve.until_healthy()
        yield Serving(serve, run_directory)
    finally:
        serve.interrupt()
        shutil.rmtree(run_directory, ignore_errors=True)
