"""`vllm-rs bench serve`, a load client that knows nothing of Baton, runs against it unchanged."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from tests.live.cluster_process import BatonServe
from tests.live.conftest import MODEL

VLLM_RS = Path(sys.executable).parent / "vllm-rs"
TIMEOUT_S = 60.0
TRACE_REQUESTS = 20
TRACE_CHUNK_TOKENS = 512
SHRINK_INPUT = 16
"""The trace's prompts reach 87,000 tokens, the tiny model's context 8,192."""
SHRINK_OUTPUT = 32
SECONDS_PER_TIMESTAMP = 0.0005
"""The trace counts milliseconds; this is twice as fast."""


class Bench:
    """The client, pointed at a cluster; results go to a directory."""

    def __init__(self, cluster: BatonServe, tiny_model: Path, directory: Path) -> None:
        self._cluster = cluster
        self._tokenizer = tiny_model
        self._directory = directory

    def run(self, *arguments: str | int | float | Path) -> dict[str, Any]:
        """Its result JSON. Every request must have been served, and every one handed over."""
        handoffs = self._cluster.metric("baton_handoffs_total")
        command = [VLLM_RS, "bench", "serve", "--host", "127.0.0.1", "--port", self._cluster.port]
        command += ["--model", MODEL, "--tokenizer", self._tokenizer, "--disable-tqdm"]
        # A generated end of sequence would make outputs shorter than asked for.
        command += ["--ignore-eos", "--seed", 1, "--temperature", 0, "--save-result"]
        command += ["--result-dir", self._directory, "--result-filename", "result.json"]
        ended = subprocess.run(
            [str(part) for part in (*command, *arguments)],
            # It keeps a cache, in which an earlier run would decide how this one goes.
            env={**os.environ, "HOME": str(self._directory), "XDG_CACHE_HOME": ""},
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
        )
        said = ended.stdout + ended.stderr
        assert ended.returncode == 0, said
        result: dict[str, Any] = json.loads((self._directory / "result.json").read_text())
        assert result["failed"] == 0, said
        assert self._cluster.metric("baton_handoffs_total") - handoffs == result["completed"]
        return result


@pytest.fixture
def bench(cluster: BatonServe, tiny_model: Path, tmp_path: Path) -> Bench:
    return Bench(cluster, tiny_model, tmp_path)


def test_random_prompts(bench: Bench) -> None:
    result = bench.run(
        *("--dataset-name", "random", "--num-prompts", 24, "--max-concurrency", 8),
        *("--random-input-len", 200, "--random-output-len", 16),
    )
    assert (result["completed"], result["total_output_tokens"]) == (24, 24 * 16)
    assert 0 < result["median_ttft_ms"] < result["median_e2el_ms"]


def test_random_prompts_as_chats(bench: Bench) -> None:
    result = bench.run(
        *("--backend", "openai-chat", "--dataset-name", "random", "--num-prompts", 16),
        *("--random-input-len", 100, "--random-output-len", 8, "--request-rate", 20),
    )
    assert (result["completed"], result["total_output_tokens"]) == (16, 16 * 8)


def test_a_timed_trace_is_replayed_with_its_timing_and_lengths(
    bench: Bench, shared: Path, tmp_path: Path
) -> None:
    requests = shrunken_trace(shared / "traces" / "mooncake_conversation.jsonl.gz")
    assert len(requests) == TRACE_REQUESTS
    trace = tmp_path / "trace.jsonl"
    trace.write_text("".join(f"{json.dumps(request)}\n" for request in requests))
    result = bench.run(
        *("--dataset-name", "timed_trace", "--dataset-path", trace),
        *("--num-prompts", TRACE_REQUESTS),
        *("--timed-trace-sec-multiplier", SECONDS_PER_TIMESTAMP),
        *("--timed-trace-chunk-hash-size", TRACE_CHUNK_TOKENS // SHRINK_INPUT),
    )
    assert result["completed"] == TRACE_REQUESTS
    assert result["total_output_tokens"] == sum(r["output_length"] for r in requests)
    last_arrival_s = max(r["timestamp"] for r in requests) * SECONDS_PER_TIMESTAMP
    assert last_arrival_s < result["duration"] < last_arrival_s + 20


def shrunken_trace(path: Path) -> list[dict[str, Any]]:
    """The trace's first requests; prompts keep their shared prefixes. At least 2 tokens are
    generated: a request that ends with its first has nothing to hand over."""
    with gzip.open(path, "rt") as lines:
        requests = [json.loads(line) for line in islice(lines, TRACE_REQUESTS)]
    for request in requests:
        request["input_length"] = max(1, request["input_length"] // SHRINK_INPUT)
        request["output_length"] = max(2, request["output_length"] // SHRINK_OUTPUT)
    return requests


def test_conversations_of_several_turns(bench: Bench) -> None:
    conversations, turns, output_tokens = 4, 3, 12
    result = bench.run(
        *("--backend", "openai-chat", "--dataset-name", "random"),
        *("--multi-turn", "--multi-turn-num-turns", turns, "--multi-turn-concurrency", 2),
        *("--num-prompts", conversations),
        *("--random-input-len", 100, "--random-output-len", output_tokens),
    )
    assert (result["conversations_completed"], result["conversations_failed"]) == (conversations, 0)
    assert result["completed"] == conversations * turns
    assert result["total_output_tokens"] == conversations * turns * output_tokens
    first, *_, last = result["per_turn_metrics"]
    assert last["total_input_tokens"] > first["total_input_tokens"]
