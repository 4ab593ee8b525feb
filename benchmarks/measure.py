"""One load on one server, and what each process spent on it.

Boundary: measures and tabulates; which servers and loads, the benchmarks decide.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from benchmarks.cpu import CpuMeter
from benchmarks.load import Load, LoadClient, LoadResult
from benchmarks.report import spread, table

BACKGROUND: Final = "Ray, supervisor, idle fronts"
"""The group of processes that stand in no request's path."""
CLIENT: Final = "load client"


@dataclass(frozen=True, slots=True)
class Figure:
    """What one run gave."""

    result: LoadResult
    cpu_us: dict[str, float]
    """Per request, by group of processes; without the background."""
    background_cores: float
    others_cores: float
    """What the machine did besides: next to nothing, or the run was disturbed."""


def measure(
    client: LoadClient,
    port: int,
    groups: Mapping[str, Sequence[int]],
    load: Load,
    seed: int,
    detailed: bool = False,
) -> Figure:
    """Raises RuntimeError unless every request was served whole."""
    meter = CpuMeter(groups, may_end=[BACKGROUND])
    result = client.run(port, load, seed, detailed)
    use = meter.read()
    spent_s = {**use.cpu_s, CLIENT: result.cpu_s}
    others_s = use.machine_s - sum(spent_s.values()) - result.preparation_cpu_s
    background_s = spent_s.pop(BACKGROUND, 0.0)
    cpu_us = {name: group_s / load.requests * 1e6 for name, group_s in spent_s.items()}
    return Figure(result, cpu_us, background_s / use.span_s, others_s / use.span_s)


def cpu_table(columns: Mapping[str, Sequence[Figure]]) -> str:
    """Markdown: a row for each group of processes, a column for each series of runs."""
    names = list(dict.fromkeys(name for runs in columns.values() for name in runs[0].cpu_us))
    names.sort(key=lambda name: name == CLIENT)
    rows = []
    for name in names:
        cells = [
            spread([run.cpu_us[name] for run in runs], 0) if name in runs[0].cpu_us else ""
            for runs in columns.values()
        ]
        rows.append([name, *cells])
    sums = [[sum(run.cpu_us.values()) for run in runs] for runs in columns.values()]
    background = [[run.background_cores for run in runs] for runs in columns.values()]
    others = [[run.others_cores for run in runs] for runs in columns.values()]
    rows.append(["**sum**", *(spread(values, 0) for values in sums)])
    rows.append([f"{BACKGROUND}, cores", *(spread(values, 2) for values in background)])
    rows.append(["all else, cores", *(spread(values, 2) for values in others)])
    return table(("CPU per request, µs", *columns), rows)
