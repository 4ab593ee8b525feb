"""What live cache reports cost, from an engine's block events to the router's index:
`python -m benchmarks.cache_reports`.

An engine with a full prefix cache computes new prompts of 8,192 tokens in steps of 2,048, and so
evicts as much as it stores. Each step's events take the whole way in this process: msgpack out of
the engine, translation and numbering in the worker, protobuf, and the index of the router. The
events themselves, which vLLM makes, are not in it. One core; prints a Markdown table, in
microseconds per engine block stored (and one evicted). `--quick` takes few prompts.
"""

from __future__ import annotations

import argparse
import random
import time
from array import array
from collections import deque
from collections.abc import Iterator
from typing import Final

from benchmarks.report import machine, table
from engine.cache_outlet import CacheOutlet
from kvstore.engine_blocks import EngineBlocks
from kvstore.index import KvIndex
from kvstore.index_feed import CacheChange, IndexFeed
from kvstore.index_report import CacheReports
from protos import worker_pb2
from protos.block_events import (
    BlockEvent,
    BlocksRemoved,
    BlocksStored,
    decode_block_events,
    encode_block_events,
)
from protos.ids import Incarnation, WorkerId
from router.worker_messages import SnapshotParts, cache_changed

BLOCK_SIZES: Final = (16, 128)
PROMPT_TOKENS: Final = 8_192
STEP_TOKENS: Final = 2_048
CACHE_TOKENS: Final = 512_000
STAGES: Final = ("engine", "worker", "link", "router")
_WORKER: Final = WorkerId("w")


def steps(block_tokens: int, prompts: int) -> Iterator[list[BlockEvent]]:
    """Each step's events; the first prompts fill the cache."""
    chance = random.Random(1)
    cached: deque[bytes] = deque()
    per_step = STEP_TOKENS // block_tokens
    for _ in range(prompts):
        tokens = array("H", chance.randbytes(2 * PROMPT_TOKENS)).tolist()
        hashes = [chance.randbytes(32) for _ in range(PROMPT_TOKENS // block_tokens)]
        for first in range(0, len(hashes), per_step):
            new = hashes[first : first + per_step]
            parent = hashes[first - 1] if first else None
            start = first * block_tokens
            events: list[BlockEvent] = [
                BlocksStored(new, parent, tokens[start : start + STEP_TOKENS])
            ]
            cached.extend(new)
            excess = len(cached) - CACHE_TOKENS // block_tokens
            if excess > 0:
                events.insert(0, BlocksRemoved([cached.popleft() for _ in range(excess)]))
            yield events


def measure(block_tokens: int, prompts: int) -> dict[str, float]:
    """By stage: seconds per block, of the steps with a full cache."""
    cache = CacheReports(EngineBlocks("model", block_tokens))
    outlet, index = CacheOutlet(cache), KvIndex(1_000_000)
    feed = IndexFeed(index, _WORKER)
    outlet.ask()
    snapshot = SnapshotParts().add(outlet.take_part())
    assert snapshot is not None
    feed.begin(snapshot)
    spent_s = dict.fromkeys(STAGES, 0.0)
    blocks = 0
    for events in steps(block_tokens, prompts + CACHE_TOKENS // PROMPT_TOKENS):
        marks_s = [time.perf_counter()]
        payload = encode_block_events(events)
        marks_s.append(time.perf_counter())
        cache.take(decode_block_events(payload))
        change = outlet.take_change()
        assert change is not None
        marks_s.append(time.perf_counter())
        sent = worker_pb2.CacheChange.FromString(change.SerializeToString())
        marks_s.append(time.perf_counter())
        report = cache_changed(_WORKER, Incarnation(1), sent).report
        assert isinstance(report, CacheChange)
        assert feed.change(report)
        marks_s.append(time.perf_counter())
        if len(events) == 2:
            blocks += STEP_TOKENS // block_tokens
            for stage, began_s, ended_s in zip(STAGES, marks_s, marks_s[1:], strict=False):
                spent_s[stage] += ended_s - began_s
    assert index.blocks_of(_WORKER) == CACHE_TOKENS // 128
    return {stage: seconds / blocks for stage, seconds in spent_s.items()}


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few prompts")
    prompts = 5 if parser.parse_args().quick else 200
    rows = []
    for block_tokens in BLOCK_SIZES:
        costs_s = measure(block_tokens, prompts)
        whole_s = sum(costs_s.values())
        stages = [f"{1e6 * costs_s[stage]:.2f}" for stage in STAGES]
        rate = f"{block_tokens / whole_s / 1e6:.1f} M"
        rows.append([str(block_tokens), *stages, f"{1e6 * whole_s:.2f}", rate])
    headings = ["tokens a block", *(f"{stage}, us" for stage in STAGES), "all, us", "tokens/s"]
    print(f"{machine()}\n\n{table(headings, rows)}")


if __name__ == "__main__":
    main()
