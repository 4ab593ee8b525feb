"""The benchmarks run to their end, on small loads: what they measure is real, and whole.

Nothing is said here about how quick it is: that needs a machine at rest.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LIMIT_S = 400.0

pytestmark = pytest.mark.timeout(LIMIT_S + 50)


def report_of(module: str, *arguments: str) -> str:
    """Raises if it fails, as it does when a request is not served whole."""
    command = [sys.executable, "-m", f"benchmarks.{module}", "--quick", *arguments]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT_S)
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-3000:]
    return ended.stdout


def rows(report: str, first_cell: str) -> list[list[str]]:
    """The cells of the table rows that begin so."""
    lines = [line for line in report.splitlines() if line.startswith(f"| {first_cell} |")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


@pytest.mark.slow
def test_the_front_door(whole: bool) -> None:
    if not whole:
        pytest.skip("two clusters start for it, one after the other: with --whole")
    report = report_of("front_door")
    for topology in ("aggregated", "P/D"):
        measured = rows(report, topology)
        assert [cells[1] for cells in measured] == ["c=32, 128 tokens", "c=1, 128 tokens"]
        assert all(float(cells[2].split()[0].replace(",", "")) > 0 for cells in measured)
    for process in ("edge", "front", "anchor", "router", "workers"):
        ((_, *cells),) = rows(report, process)
        assert len(cells) == 4
    for link in ("client-edge", "front-anchor", "anchor-router", "router-worker"):
        ((_, *cells),) = rows(report, f"{link}, requests")
        assert all(float(cell.replace(",", "")) > 0 for cell in cells)


@pytest.mark.slow
def test_the_overhead(whole: bool) -> None:
    if not whole:
        pytest.skip("four servers start for it, one after the other: with --whole")
    report = report_of("overhead")
    for server in ("plain vLLM", "Baton aggregated", "Baton P/D"):
        assert rows(report, server)
    assert "Stages of a request alone, Baton P/D" in report


def test_the_kv_index() -> None:
    report = report_of("kv_index")
    for tokens in ("8,192", "100,000"):
        index, decision = rows(report, tokens)
        assert all(float(cell.split()[0]) > 0 for cell in index[1:] + decision[1:])
    assert "blocks stored a second" in report


def test_the_cache_reports() -> None:
    report = report_of("cache_reports")
    for block_tokens in ("16", "128"):
        ((_, *parts, whole, _),) = rows(report, block_tokens)
        assert all(float(part) >= 0 for part in parts)
        assert float(whole) > 0
