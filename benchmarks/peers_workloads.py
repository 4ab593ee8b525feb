"""The workloads and engines of the peers' published measurements, as far as they are known."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np

from benchmarks.engine_profiles import fit
from engine.profiles import EngineProfile
from simulator import traces
from simulator.traces import BLOCK_TOKENS, TracedRequest

_PREFILL_SCALE: Final = 1.2
"""On fits to summed kernel times, as in `engine.profiles`."""


class Groups(NamedTuple):
    """Prompts that share their beginnings."""

    groups: int
    prompts: int
    """Of each group."""
    shared_tokens: int
    own_tokens: int
    output_tokens: int
    even_outputs: bool = False
    """Of any length up to that, evenly; else all of that length."""


def grouped(groups: Groups, requests: int, rate_rps: float, seed: int) -> Iterator[TracedRequest]:
    """A Poisson process, or all at once where the rate is infinite. Each prompt is asked for as
    often as the others, in a random order."""
    rng = np.random.default_rng(seed)
    shared = groups.shared_tokens // BLOCK_TOKENS
    tokens = groups.shared_tokens + groups.own_tokens
    own = -(-tokens // BLOCK_TOKENS) - shared
    prompts = groups.groups * groups.prompts
    order: list[int] = []
    at_s = 0.0
    for _ in range(requests):
        order = order or rng.permutation(prompts).tolist()
        prompt = order.pop()
        first_shared = prompt // groups.prompts * shared
        first_own = groups.groups * shared + prompt * own
        blocks = (
            *range(first_shared, first_shared + shared),
            *range(first_own, first_own + own),
        )
        output = groups.output_tokens
        if groups.even_outputs:
            output = int(rng.integers(1, output, endpoint=True))
        yield TracedRequest(at_s, tokens, output, blocks)
        if rate_rps < math.inf:
            at_s += rng.exponential(1 / rate_rps)


def toolagent(shared: Path, seed: int, most_requests: int = 23_608) -> Iterator[TracedRequest]:
    """A stand-in for Mooncake's toolagent trace at its own rate, of which the first 1,000 requests
    are here.

    45 % are the conversation trace's, in its order; the others are drawn from the 514 tool and
    agent prompts among those 1,000, which share one of two system prompts and nothing else. That
    makes 8,600 tokens in, 160 out and 56 % that an unlimited cache has; the trace has 8,596, 182
    and 59 %.
    """
    rng = np.random.default_rng(seed)
    tools = [
        each
        for each in traces.read(shared / "traces" / "mooncake_arxiv_first1000.jsonl.gz")
        if each.block_ids[0] in _SYSTEM_BLOCKS
    ]
    talks = traces.read(shared / "traces" / "mooncake_conversation.jsonl.gz")
    own = count(1 << 40)
    at_s = 0.0
    for _ in range(most_requests):
        at_s += rng.exponential(_TOOLAGENT_S / 23_608)
        if rng.random() < _TALKS and (talk := next(talks, None)) is not None:
            yield talk._replace(arrival_s=at_s)
            continue
        tool = tools[int(rng.integers(len(tools)))]
        system = _SYSTEM_BLOCKS[tool.block_ids[0]]
        kept = tuple(_SYSTEM_IDS + each for each in tool.block_ids[:system])
        tail = tuple(next(own) for _ in tool.block_ids[system:])
        yield tool._replace(arrival_s=at_s, block_ids=kept + tail)


_TALKS: Final = 0.45
_TOOLAGENT_S: Final = 3540.0
_SYSTEM_BLOCKS: Final = {46: 12, 74: 5}
"""By the first block of a system prompt, how many it has."""
_SYSTEM_IDS: Final = 1 << 41


def power_law(
    requests: int, rate_rps: float, mean_tokens: int, seed: int
) -> Iterator[TracedRequest]:
    """Unrelated prompts and outputs with heavy tails, as a Poisson process."""
    rng = np.random.default_rng(seed)
    exponent, longest = 1.5, 6144
    at_s = 0.0
    for _ in range(requests):
        at_s += rng.exponential(1 / rate_rps)
        # A Pareto distribution's mean is its least value times exponent / (exponent - 1).
        least = mean_tokens * (exponent - 1) / exponent
        lengths = np.minimum(longest // 2, least * (1 + rng.pareto(exponent, 2)))
        yield TracedRequest(at_s, int(lengths[0]), int(lengths[1]))


def exponential(requests: int, load: float, servers: int, seed: int) -> Iterator[TracedRequest]:
    """Poisson arrivals at this load of so many servers, each of which takes 1 s for
    MEAN_JOB_TOKENS, the mean of an exponential service."""
    rng = np.random.default_rng(seed)
    at_s = 0.0
    for _ in range(requests):
        at_s += rng.exponential(1 / (load * servers))
        yield TracedRequest(at_s, max(1, round(rng.exponential(MEAN_JOB_TOKENS))), 1)


MEAN_JOB_TOKENS: Final = 1000


def queue_server() -> EngineProfile:
    """An engine that does one job at a time, first come first served: for `exponential`."""
    return EngineProfile(
        model="server",
        gpus=1,
        kv_bytes_per_token=1,
        weights_bytes=0.0,
        step_base_s=0.0,
        prefill_token_s=1 / MEAN_JOB_TOKENS,
        prefill_pair_s=0.0,
        decode_request_s=0.0,
        decode_context_token_s=0.0,
        max_step_tokens=131_072,
        max_running_requests=1,
        kv_tokens_reported=131_072,
    )


def qwen_fp8(shared: Path) -> EngineProfile:
    """Qwen3-32B in FP8 on one H100, KV in FP8: twice the fitted costs of two H100s.

    A step's context is read in half the bytes. The cache is what 0.9 of 80 GB leaves beside 33 GB
    of weights and 3 GB of activations.
    """
    with (shared / "perf" / "h100_sxm_step_times_derived.csv").open() as file:
        wanted = ("qwen3-32b", "2", "fp8")
        rows: Sequence[dict[str, str]] = [
            row
            for row in csv.DictReader(file)
            if (row["model"], row["tp"], row["weight_dtype"]) == wanted
        ]
    costs, *_ = fit(list(rows))
    base_s, token_s, pair_s, request_s, context_s = (2 * float(cost) for cost in costs)
    return EngineProfile(
        model="Qwen3-32B FP8",
        gpus=1,
        kv_bytes_per_token=131_072,
        weights_bytes=33e9,
        step_base_s=base_s,
        prefill_token_s=_PREFILL_SCALE * token_s,
        prefill_pair_s=_PREFILL_SCALE * pair_s,
        decode_request_s=request_s,
        decode_context_token_s=context_s / 2,
        kv_tokens_reported=int((0.9 * 80e9 - 33e9 - 3e9) / 131_072),
    )
