"""The load client of the benchmarks: `vllm-rs bench serve`, one run at a time.

Boundary: one run in, its figures out, or an error if it is not what was asked for. Prompts are
random, sent as text, and streamed back; every request has its own.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import psutil

from tests.processes import ends_with_us

VLLM_RS: Final = Path(sys.executable).parent / "vllm-rs"
LIMIT_S: Final = 300.0
_WARM_UP_SEED: Final = 1_000_000
_SAMPLE_S: Final = 0.02


@dataclass(frozen=True, slots=True)
class Load:
    """What is asked of a server, `concurrency` requests at a time."""

    concurrency: int
    prompt_tokens: int
    output_tokens: int
    requests: int

    @property
    def name(self) -> str:
        return f"c={self.concurrency}, {self.prompt_tokens} tokens"


@dataclass(frozen=True, slots=True)
class LoadResult:
    """What the client saw; times in milliseconds."""

    duration_s: float
    requests_per_s: float
    ttft_p50_ms: float
    ttft_p99_ms: float
    whole_p50_ms: float
    """From the request to its last token."""
    cpu_s: float
    """The client's own, from its first request on."""
    preparation_cpu_s: float
    """What it used before."""
    gaps_ms: list[list[float]]
    """Of each request the times between its events; only if asked for."""


class LoadClient:
    """Sends loads to servers of one model. Results and the client's caches go to `directory`."""

    def __init__(self, model: str, tokenizer: Path, directory: Path) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._directory = directory

    def warm_up(self, port: int, load: Load) -> None:
        """The same load, shorter, with prompts that no run has."""
        requests = max(load.concurrency, load.requests // 10)
        self.run(port, replace(load, requests=requests), _WARM_UP_SEED)

    def run(self, port: int, load: Load, seed: int, detailed: bool = False) -> LoadResult:
        """Raises RuntimeError unless every request was served whole."""
        process = _Run(self._command(port, load, seed, detailed), self._directory)
        result: dict[str, Any] = json.loads((self._directory / "load.json").read_bytes())
        tokens = load.requests * load.output_tokens
        # None gives more than it was asked for, so with this sum each gave exactly that.
        if (result["completed"], result["total_output_tokens"]) != (load.requests, tokens):
            raise RuntimeError(
                f"of {load.requests} requests {result['failed']} failed, and they gave "
                f"{result['total_output_tokens']} instead of {tokens} tokens"
            )
        return LoadResult(
            duration_s=result["duration"],
            requests_per_s=result["request_throughput"],
            ttft_p50_ms=result["median_ttft_ms"],
            ttft_p99_ms=result["p99_ttft_ms"],
            whole_p50_ms=result["median_e2el_ms"],
            cpu_s=process.cpu_of_last_s(result["duration"]),
            preparation_cpu_s=process.cpu_before_last_s(result["duration"]),
            gaps_ms=[[gap_s * 1e3 for gap_s in gaps] for gaps in result.get("itls", [])],
        )

    def _command(self, port: int, load: Load, seed: int, detailed: bool) -> list[str]:
        command: list[object] = [VLLM_RS, "bench", "serve", "--disable-tqdm", "--no-steady-state"]
        command += ["--host", "127.0.0.1", "--port", port]
        command += ["--model", self._model, "--tokenizer", self._tokenizer]
        command += ["--dataset-name", "random", "--random-input-len", load.prompt_tokens]
        command += ["--random-output-len", load.output_tokens, "--num-prompts", load.requests]
        command += ["--max-concurrency", load.concurrency, "--seed", seed]
        # A generated end of sequence would make outputs shorter than asked for.
        command += ["--temperature", 0, "--ignore-eos", "--save-result"]
        command += ["--result-dir", self._directory, "--result-filename", "load.json"]
        if detailed:
            command.append("--save-detailed")
        return [str(part) for part in command]


class _Run:
    """One run of a command to its end, and the CPU time that it took up to any moment."""

    def __init__(self, command: Sequence[str], directory: Path) -> None:
        """Raises RuntimeError if it fails or takes too long."""
        log_path = directory / "load.log"
        # It keeps a cache, in which other runs would decide how this one goes.
        environment = {**os.environ, "HOME": str(directory), "XDG_CACHE_HOME": "", "NO_COLOR": "1"}
        before_s, began_s = _children_cpu_s(), time.perf_counter()
        self._samples: list[tuple[float, float]] = []
        with log_path.open("wb") as log:
            process = subprocess.Popen(
                command,
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                preexec_fn=ends_with_us,
            )
            watched = psutil.Process(process.pid)
            while process.poll() is None and time.perf_counter() - began_s < LIMIT_S:
                self._samples.append((time.perf_counter(), sum(watched.cpu_times()[:2])))
                time.sleep(_SAMPLE_S)
        self._ended_s = time.perf_counter()
        if process.poll() != 0:
            process.kill()
            said = log_path.read_text(errors="replace")[-2000:]
            raise RuntimeError(f"vllm-rs bench serve failed, or took over {LIMIT_S:.0f} s:\n{said}")
        self._total_s = _children_cpu_s() - before_s

    def cpu_of_last_s(self, duration_s: float) -> float:
        """What it used from this long before its end on; what comes before is its preparation."""
        return self._total_s - self.cpu_before_last_s(duration_s)

    def cpu_before_last_s(self, duration_s: float) -> float:
        """What it used until then."""
        prepared_s = [cpu_s for at_s, cpu_s in self._samples if at_s < self._ended_s - duration_s]
        return max(prepared_s, default=0.0)


def _children_cpu_s() -> float:
    """Of all that were waited for."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime
