"""What the benchmarks make of their figures: pure parts, and CPU time as /proc tells it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import replace

import psutil
import pytest

from benchmarks.cpu import CpuMeter
from benchmarks.report import interval, spread, table
from benchmarks.targets import AGGREGATED, DISAGGREGATED, PLAIN, Summary, targets

BUSY = "while True: pass"
IDLE = "import time; time.sleep(60)"
PLAIN_SUMMARY = Summary(
    ttft_ms=10.0, second_token_ms=4.0, token_ms=4.0, whole_ms=140.0, requests_per_s=100.0
)


def test_a_spread_is_the_median_with_both_ends() -> None:
    assert spread([3.0, 1.0, 2.25]) == "2.2 (1.0 to 3.0)"
    assert spread([1999.6], 0) == "2,000 (2,000 to 2,000)"


def test_an_interval_is_students() -> None:
    # Of 1, 2 and 3: a standard deviation of 1 and t of 4.30, over the root of 3.
    assert interval([1.0, 2.0, 3.0]) == "2 ± 2.5"
    assert interval([1.25]) == "1.25"


def test_a_table_is_markdown() -> None:
    assert table(("a", "b"), [("1", "2")]) == "| a | b |\n| --- | --- |\n| 1 | 2 |\n"


def verdicts(baton: Summary) -> dict[tuple[str, str], str]:
    lines = targets({PLAIN: PLAIN_SUMMARY, AGGREGATED: baton, DISAGGREGATED: baton}).splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    return {(server, what.partition(":")[2].strip()): verdict for server, what, *_, verdict in rows}


def test_each_target_is_judged_by_its_own_limit() -> None:
    as_good = verdicts(PLAIN_SUMMARY)
    assert set(as_good.values()) == {"met"}
    slow = replace(PLAIN_SUMMARY, ttft_ms=14.0, second_token_ms=12.5, requests_per_s=89.0)
    judged = verdicts(slow)
    assert judged[AGGREGATED, "plain + 1"] == "**missed**"
    assert judged[DISAGGREGATED, "plain + 5"] == "met"
    assert judged[DISAGGREGATED, "plain + 2 (goal)"] == "**missed**"
    assert judged[DISAGGREGATED, "3 x plain's time between tokens"] == "**missed**"
    assert judged[AGGREGATED, "0.9 x plain"] == "**missed**"
    assert judged[DISAGGREGATED, "40"] == "met"
    assert judged[DISAGGREGATED, "1.5 x plain"] == "met"


def test_waiting_for_a_core_is_counted_by_group() -> None:
    core = min(os.sched_getaffinity(0))
    processes = [subprocess.Popen([sys.executable, "-c", text]) for text in (BUSY, BUSY, IDLE)]
    try:
        for process in processes:
            psutil.Process(process.pid).cpu_affinity([core])
        *both, idle = [process.pid for process in processes]
        meter = CpuMeter({"both": both, "idle": [idle]})
        waited_s: dict[str, float] = {"both": 0.0, "idle": 0.0}
        while waited_s["both"] < 0.3:
            time.sleep(0.05)
            waited_s = {name: waited_s[name] + more for name, more in meter.read().waited_s.items()}
        assert waited_s["idle"] < waited_s["both"]
    finally:
        for process in processes:
            process.kill()
            process.wait()


def test_cpu_time_is_counted_by_group() -> None:
    processes = [subprocess.Popen([sys.executable, "-c", text]) for text in (BUSY, IDLE)]
    busy, idle = (psutil.Process(process.pid) for process in processes)
    try:
        meter = CpuMeter({"busy": [busy.pid], "idle": [idle.pid]}, may_end=["idle"])
        before_s = sum(busy.cpu_times()[:2])
        while sum(busy.cpu_times()[:2]) < before_s + 0.3:
            time.sleep(0.01)
        use = meter.read()
        assert use.cpu_s["busy"] >= 0.3
        assert use.cpu_s["idle"] < use.cpu_s["busy"]
        assert use.machine_s >= 0.2  # Both clocks tick in hundredths.
        idle.kill()
        idle.wait()
        assert meter.read().cpu_s["idle"] == 0.0
        busy.kill()
        busy.wait()
        with pytest.raises(psutil.NoSuchProcess):
            meter.read()
    finally:
        for process in processes:
            process.kill()
            process.wait()
