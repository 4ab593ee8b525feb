"""What it costs to ask who holds a prompt's prefix: `python -m benchmarks.kv_index`.

An index of a million distinct blocks of 128 tokens, each held by 2 of 256 workers. A question
hashes a prompt of 8,192 or 100,000 tokens and walks the index; all of its blocks are there, so that
it is walked to its end. Also the rate of changes, the time of one while a dropped worker is cleared
away, and the memory. One core; prints Markdown tables. `--quick` runs through all of it on a small
index.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import random
import statistics
import time
from array import array
from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

import psutil

from benchmarks.report import machine, table
from kvstore.content import block_addresses, root_address
from kvstore.index import CLEARED_AT_ONCE, KvIndex

BLOCK_TOKENS: Final = 128
PROMPT_TOKENS: Final = (8_192, 100_000)
LONGEST_BLOCKS: Final = max(PROMPT_TOKENS) // BLOCK_TOKENS
CHANGED_AT_ONCE: Final = 16
"""Blocks in one change: 2,048 tokens, about what one step of a prefill computes."""
_ROOT: Final = root_address("model", "", "", BLOCK_TOKENS)


class Sizes(NamedTuple):
    """Of the index and the run."""

    workers: int
    blocks: int
    holders: int
    questions: int


FULL: Final = Sizes(workers=256, blocks=1_000_000, holders=2, questions=1000)
QUICK: Final = Sizes(workers=256, blocks=20_000, holders=2, questions=20)


class Costs(NamedTuple):
    """What was measured."""

    question_ms: dict[int, dict[str, list[float]]]
    """By tokens of the prompt; for each question "hash", "walk" and "both"."""
    stored_per_s: float
    removed_per_s: float
    changes_after_drop_ms: list[float]
    bytes_per_block: float


def prompt(number: int) -> list[int]:
    """Always the same for a number."""
    chance = random.Random(number)
    return array("H", chance.randbytes(2 * max(PROMPT_TOKENS))).tolist()


def holders_of(number: int, sizes: Sizes) -> list[str]:
    """Who holds this prompt's blocks."""
    return [f"w{(number * sizes.holders + each) % sizes.workers}" for each in range(sizes.holders)]


def percentile(values: Sequence[float], percent: int) -> float:
    """Inclusive."""
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]


def in_parts(addresses: Sequence[bytes]) -> Iterator[Sequence[bytes]]:
    for start in range(0, len(addresses), CHANGED_AT_ONCE):
        yield addresses[start : start + CHANGED_AT_ONCE]


def measure(sizes: Sizes) -> Costs:
    """Build the index, ask it, change it."""
    index = KvIndex(2 * sizes.blocks)
    prompts = -(-sizes.blocks // LONGEST_BLOCKS)
    process = psutil.Process()
    before_bytes = process.memory_info().rss
    store_s, stored = 0.0, 0
    for number in range(prompts):
        addresses = block_addresses(_ROOT, prompt(number), BLOCK_TOKENS)
        began_s = time.perf_counter()
        for worker in holders_of(number, sizes):
            for part in in_parts(addresses):
                index.store(worker, part)
        store_s += time.perf_counter() - began_s
        stored += len(addresses) * sizes.holders
    bytes_per_block = (process.memory_info().rss - before_bytes) / index.entries
    gc.collect()
    gc.freeze()

    chance = random.Random(0)
    question_ms: dict[int, dict[str, list[float]]] = {}
    for tokens in PROMPT_TOKENS:
        times = question_ms[tokens] = {"hash": [], "walk": [], "both": []}
        for _ in range(sizes.questions):
            number = chance.randrange(prompts)
            asked = prompt(number)[:tokens]
            began_s = time.perf_counter()
            addresses = block_addresses(_ROOT, asked, BLOCK_TOKENS)
            hashed_s = time.perf_counter()
            found = index.match(addresses)
            ended_s = time.perf_counter()
            assert found == dict.fromkeys(holders_of(number, sizes), tokens // BLOCK_TOKENS)
            times["hash"].append(1000 * (hashed_s - began_s))
            times["walk"].append(1000 * (ended_s - hashed_s))
            times["both"].append(1000 * (ended_s - began_s))

    while_cleared = -(-index.blocks_of("w0") // CLEARED_AT_ONCE)
    index.drop("w0")
    changes_ms = []
    parts = in_parts(block_addresses(_ROOT, prompt(prompts), BLOCK_TOKENS))
    for part in itertools.islice(parts, while_cleared):
        began_s = time.perf_counter()
        index.store("w1", part)
        changes_ms.append(1000 * (time.perf_counter() - began_s))

    removed = 0
    remove_s = 0.0
    for number in range(min(prompts, 50)):
        addresses = block_addresses(_ROOT, prompt(number), BLOCK_TOKENS)
        began_s = time.perf_counter()
        for part in in_parts(addresses):
            index.remove(holders_of(number, sizes)[-1], part)
        remove_s += time.perf_counter() - began_s
        removed += len(addresses)
    return Costs(question_ms, stored / store_s, removed / remove_s, changes_ms, bytes_per_block)


def report(sizes: Sizes, costs: Costs) -> str:
    """As Markdown."""
    rows = [
        [
            f"{tokens:,}",
            *(
                f"{statistics.median(times[part]):.3f} / {percentile(times[part], 99):.3f}"
                for part in ("hash", "walk", "both")
            ),
        ]
        for tokens, times in costs.question_ms.items()
    ]
    headings = ["prompt tokens", "hash, ms", "walk, ms", "both, ms"]
    changes = costs.changes_after_drop_ms
    return (
        f"{machine()}\n\n{sizes.workers} workers, {sizes.blocks:,} blocks of {BLOCK_TOKENS} "
        f"tokens, each held by {sizes.holders}; {sizes.questions} questions of each length; "
        "median / 99th percentile."
        f"\n\n{table(headings, rows)}\n"
        f"Changes of {CHANGED_AT_ONCE} blocks: {costs.stored_per_s:,.0f} blocks stored a second, "
        f"{costs.removed_per_s:,.0f} removed. While a dropped worker is cleared away a change "
        f"takes {statistics.median(changes):.3f} ms, at most {max(changes):.3f} ms. "
        f"Memory: {costs.bytes_per_block:.0f} bytes a block."
    )


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a small index, few questions")
    sizes = QUICK if parser.parse_args().quick else FULL
    print(report(sizes, measure(sizes)))


if __name__ == "__main__":
    main()
