"""What a decision costs, and of it the KV index: `python -m benchmarks.kv_index`.

An index of a million distinct blocks of 128 tokens, each held by 2 of 256 workers. A question
hashes a prompt of 8,192 or 100,000 tokens and walks the index; all of its blocks are there, so that
it is walked to its end. A decision hashes such a prompt and places its request jointly, on one half
of the workers, on the other, or on both, where 1,024 others are: it walks the index, compares all
workers, and counts. Its time is the processor's, so that a machine's other work is left out; the
lengths take turns, in rounds, and the rounds' spread is told. Also the rate of the index's changes,
the time of one while a dropped worker is cleared away, and the memory. One core; prints Markdown
tables. `--quick` runs through all of it on a small index.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import random
import statistics
import time
from array import array
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

import psutil

from benchmarks.report import machine, table
from engine.profiles import PROFILES
from engine.spec import EngineTimes, PoolTimes
from kvstore.content import block_addresses, root_address
from kvstore.index import CLEARED_AT_ONCE, KvIndex
from protos.enginecore import ENGINE_TAG
from protos.ids import Incarnation, RequestKey, WorkerId
from router.core.costs import Slo
from router.core.events import Role, Shape, WorkerUp
from router.core.joint import JointPlacement
from router.core.placement import View
from router.core.workers import WorkerPool

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
    rounds: int
    """Of decisions, as many of each length in each as there are questions."""


FULL: Final = Sizes(workers=256, blocks=1_000_000, holders=2, questions=1000, rounds=5)
QUICK: Final = Sizes(workers=256, blocks=20_000, holders=2, questions=20, rounds=2)
UNDER_WAY: Final = 1024
ENGINE: Final = EngineTimes(
    PROFILES["llama-3.1-8b-h100"].timing(BLOCK_TOKENS), max_step_tokens=8192
)


class Costs(NamedTuple):
    """What was measured."""

    question_ms: dict[int, dict[str, list[float]]]
    """By tokens of the prompt; for each question "hash", "walk" and "both"."""
    decision_ms: dict[int, list[list[float]]]
    """By tokens of the prompt, in rounds."""
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
    stored_per_s, bytes_per_block = build(sizes, index, prompts)
    gc.collect()
    gc.freeze()
    return Costs(
        question_ms=time_questions(sizes, index, prompts),
        decision_ms=time_decisions(sizes, index, prompts),
        stored_per_s=stored_per_s,
        bytes_per_block=bytes_per_block,
        changes_after_drop_ms=time_changes_after_drop(index, prompts),
        removed_per_s=time_removals(sizes, index, prompts),
    )


def build(sizes: Sizes, index: KvIndex, prompts: int) -> tuple[float, float]:
    """Fill it with so many prompts; returns blocks stored a second, and bytes of each."""
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
    return stored / store_s, (process.memory_info().rss - before_bytes) / index.entries


def time_questions(sizes: Sizes, index: KvIndex, prompts: int) -> dict[int, dict[str, list[float]]]:
    """See `Costs.question_ms`."""
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
    return question_ms


def time_changes_after_drop(index: KvIndex, prompts: int) -> list[float]:
    """Milliseconds of each change while what a dropped worker held is cleared away."""
    while_cleared = -(-index.blocks_of("w0") // CLEARED_AT_ONCE)
    index.drop("w0")
    changes_ms = []
    parts = in_parts(block_addresses(_ROOT, prompt(prompts), BLOCK_TOKENS))
    for part in itertools.islice(parts, while_cleared):
        began_s = time.perf_counter()
        index.store("w1", part)
        changes_ms.append(1000 * (time.perf_counter() - began_s))
    return changes_ms


def time_removals(sizes: Sizes, index: KvIndex, prompts: int) -> float:
    """Blocks removed a second."""
    removed, remove_s = 0, 0.0
    for number in range(min(prompts, 50)):
        addresses = block_addresses(_ROOT, prompt(number), BLOCK_TOKENS)
        began_s = time.perf_counter()
        for part in in_parts(addresses):
            index.remove(holders_of(number, sizes)[-1], part)
        remove_s += time.perf_counter() - began_s
        removed += len(addresses)
    return removed / remove_s


def time_decisions(sizes: Sizes, index: KvIndex, prompts: int) -> dict[int, list[list[float]]]:
    """Of requests for prompts that are in the index."""
    pool = WorkerPool()
    for number in range(sizes.workers):
        role = Role.PREFILL if number % 2 else Role.DECODE
        name = WorkerId(f"w{number}")
        pool.attach(WorkerUp(name, Incarnation(1), role, ENGINE_TAG, BLOCK_TOKENS, 4000, 131_072))
    gc.set_threshold(50_000, 20, 100)  # As the router process does.
    view = View(pool, index, BLOCK_TOKENS, True, 0)
    chance = random.Random(1)
    policy = JointPlacement(chance.randrange, PoolTimes(ENGINE, ENGINE), Slo(2.0, 0.05))
    under_way: deque[RequestKey] = deque()
    decision_ms: dict[int, list[list[float]]] = {tokens: [] for tokens in PROMPT_TOKENS}
    made, now_s = 0, 0.0
    for _ in range(sizes.rounds):
        for times in decision_ms.values():
            times.append([])
        for _ in range(sizes.questions):
            for tokens in PROMPT_TOKENS:
                asked = prompt(chance.randrange(prompts))[:tokens]
                made, now_s = made + 1, now_s + 0.01
                key = RequestKey(f"0:{made}")
                began_s = time.thread_time()
                addresses = block_addresses(_ROOT, asked, BLOCK_TOKENS)
                decision = policy.place(now_s, view, key, Shape(tokens, None, addresses=addresses))
                decision_ms[tokens][-1].append(1000 * (time.thread_time() - began_s))
                assert decision is not None
                under_way.append(key)
                if made % 2:  # Half of them decode.
                    policy.first_token(now_s, key)
                if len(under_way) > UNDER_WAY:
                    policy.ended(now_s, under_way.popleft(), 200)
    return decision_ms


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
    decisions = [
        [
            f"{tokens:,}",
            _over_rounds([statistics.median(each) for each in rounds]),
            _over_rounds([percentile(each, 99) for each in rounds]),
        ]
        for tokens, rounds in costs.decision_ms.items()
    ]
    headings = ["prompt tokens", "hash, ms", "walk, ms", "both, ms"]
    changes = costs.changes_after_drop_ms
    return (
        f"{machine()}\n\n{sizes.workers} workers, {sizes.blocks:,} blocks of {BLOCK_TOKENS} "
        f"tokens, each held by {sizes.holders}; {sizes.questions} questions of each length; "
        "median / 99th percentile."
        f"\n\n{table(headings, rows)}\n"
        f"Whole decisions, hashing included, processor time; medians of {sizes.rounds} rounds of "
        f"{sizes.questions} of each length, and in brackets the least and the most:\n\n"
        f"{table(['prompt tokens', 'median, ms', '99th percentile, ms'], decisions)}\n"
        f"Changes of {CHANGED_AT_ONCE} blocks: {costs.stored_per_s:,.0f} blocks stored a second, "
        f"{costs.removed_per_s:,.0f} removed. While a dropped worker is cleared away a change "
        f"takes {statistics.median(changes):.3f} ms, at most {max(changes):.3f} ms. "
        f"Memory: {costs.bytes_per_block:.0f} bytes a block."
    )


def _over_rounds(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a small index, few questions")
    sizes = QUICK if parser.parse_args().quick else FULL
    print(report(sizes, measure(sizes)))


if __name__ == "__main__":
    main()
