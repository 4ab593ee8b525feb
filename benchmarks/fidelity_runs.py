"""One workload on both sides: live, through a `baton serve` of its own, and simulated.

Boundary: what to run and its requests in, what clients saw out. Of the live system the simulation
is told what the configuration says, the engine's profile, and three times that are measured before
all runs, on requests that are alone: from a client to the router, from the router to an engine and
from there to the client.
"""

from __future__ import annotations

import os
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, replace
from random import Random
from typing import Any, Final, NamedTuple

from benchmarks.cpu import CpuMeter
from benchmarks.fidelity import Seen
from benchmarks.measure import BACKGROUND
from benchmarks.open_loop import Served, play
from benchmarks.priority import real_time
from benchmarks.serving import Serving, serving
from benchmarks.timeline import moments
from cluster.launch import UNPROMISED_TPOT_MS, UNPROMISED_TTFT_MS
from engine.latency_model import StepTimes, StepWork
from router.core.costs import Slo
from router.core.events import End, Ended
from router.core.joint import JointPlacement
from router.core.placement import Placement, Reason
from simulator.cluster import Cluster, Layout
from simulator.experiment import engines_of
from simulator.traces import TracedRequest

_ALONE: Final = 20
PAUSE_S: Final = 0.25
"""Between requests that are alone: what has idled for a moment takes longer, and under the loads
that are compared most has."""
_WARM_UP: Final = 8
_WARM_UP_SALT: Final = 1_000_000
_SPLIT: Final = (Reason.SPLIT_COSTS_LESS, Reason.LONG_PROMPT)


def simulated_engines(layout: Layout) -> dict[str, Any]:
    """The configuration of a `baton serve` with such engines, and the default policy."""
    profile = layout.profile
    return {
        "engine": "simulated",
        "prefill": {"replicas": layout.prefill},
        "decode": {"replicas": layout.decode},
        "simulated": asdict(profile.timing(layout.block_tokens)),
        "engine_args": {
            "block_size": layout.block_tokens,
            "num_gpu_blocks_override": profile.kv_tokens // layout.block_tokens,
            "max_model_len": profile.max_model_len_tokens,
            "max_num_seqs": profile.max_running_requests,
            "max_num_batched_tokens": profile.max_step_tokens,
        },
    }


def default_placement(layout: Layout, seed: int) -> Placement:
    """The policy of a router before such engines that is told nothing else."""
    slo = Slo(UNPROMISED_TTFT_MS / 1000, UNPROMISED_TPOT_MS / 1000)
    return JointPlacement(Random(seed).randrange, engines_of(layout), slo)


class Hops(NamedTuple):
    """Medians of requests that are alone, in seconds."""

    front_in_s: float
    front_out_s: float
    link_s: float
    """One way."""


class LiveRun(NamedTuple):
    """What came of a live run, and what it ran beside."""

    seen: Seen
    reasons: Counter[str]
    """Of placements."""
    own_cores: float
    """Of the processes in requests' path."""
    others_cores: float
    engines_waited: float
    """For a core, of the time in which they ran or could have."""
    client_late_s: float
    """The longest that a request was sent after its time."""

    @property
    def split(self) -> float:
        """The share of requests that went over two workers."""
        return split_share(self.reasons)


def run_live(
    configuration: dict[str, Any], requests: Sequence[TracedRequest], prioritised: bool = False,
    look: Callable[[Serving], None] = lambda baton: None,
) -> LiveRun:  # fmt: skip
    """On an instance of its own, which is looked at before and after. Raises RuntimeError unless
    every request was served whole."""
    with serving(configuration) as baton:
        look(baton)
        groups = _path_of(baton)
        with _priority(groups, prioritised):
            play(baton.port, _warm_up(requests), _WARM_UP_SALT)
            meter = CpuMeter(groups)
            served = play(baton.port, requests)
            use = meter.read()
        seen, reasons = _records(baton, served)
        look(baton)
    own_s = sum(use.cpu_s.values())
    engines = "engine" if "engine" in groups else "workers"
    waited_s = use.waited_s[engines]
    return LiveRun(
        seen, reasons, own_s / use.span_s, (use.machine_s - own_s) / use.span_s,
        waited_s / (waited_s + use.cpu_s[engines]),
        max(each.sent_late_s for each in served),
    )  # fmt: skip


def measure_hops(layout: Layout, prompt_tokens: int, prioritised: bool) -> Hops:
    """With simulated engines, whose own time is known: what a first token takes beside it."""
    work = StepWork()
    work.add_prefill(prompt_tokens, context_tokens=0)
    step_s = StepTimes(layout.profile.timing(layout.block_tokens)).step_s(work)
    with serving(simulated_engines(layout)) as baton, _priority(_path_of(baton), prioritised):
        moments(baton, _WARM_UP, prompt_tokens=16, output_tokens=2)
        times = moments(baton, _ALONE, prompt_tokens, output_tokens=2, pause_s=PAUSE_S)

    def median_s(begin: str, end: str) -> float:
        return statistics.median(each[end] - each[begin] for each in times)

    there_and_back_s = median_s("arrived", "first_token") - step_s
    return Hops(
        median_s("sent", "arrived"), median_s("first_token", "client_first"), there_and_back_s / 2
    )


def run_simulated(
    layout: Layout, placement: Placement, hops: Hops, requests: Sequence[TracedRequest]
) -> tuple[Seen, Counter[str]]:
    """The same requests; with the reasons of placements."""
    ends: list[Ended] = []
    cluster = Cluster(replace(layout, **hops._asdict()), [placement], ends.append)
    cluster.run(requests)
    assert all(each.end is End.COMPLETE for each in ends)
    cached = sum(worker.cached_tokens for worker in cluster.workers.values())
    seen = Seen(
        [each.time_to_first_token_s for each in ends if each.time_to_first_token_s is not None],
        [each.time_per_output_token_s for each in ends if each.time_per_output_token_s is not None],
        cached / cluster.prompt_tokens,
    )
    return seen, Counter(map(str, cluster.routers[0].moves.counts.decisions.elements()))


def _path_of(baton: Serving) -> dict[str, list[int]]:
    groups = {name: pids for name, pids in baton.groups.items() if name != BACKGROUND}
    return {**groups, "client": [os.getpid()]}


def _priority(
    groups: Mapping[str, Sequence[int]], prioritised: bool
) -> AbstractContextManager[None]:
    pids = [pid for group in groups.values() for pid in group]
    return real_time(pids) if prioritised else nullcontext()


def _records(baton: Serving, served: Sequence[Served]) -> tuple[Seen, Counter[str]]:
    """With what the router tells of each: what was cached where its prompt was computed, and why
    it was placed there."""
    prompt_tokens = cached_tokens = 0
    reasons: Counter[str] = Counter()
    for each in served:
        (record,) = baton.get(f"/cluster/requests/{each.request_id}")["requests"]
        prompt_tokens += record["prompt_tokens"]
        cached_tokens += record["attempts"][0]["prompt_use"]["cached_tokens"]
        reasons[record["decisions"][0]["reason"]] += 1
    seen = Seen(
        [each.ttft_s for each in served],
        [each.tpot_s for each in served if each.tpot_s is not None],
        cached_tokens / prompt_tokens,
    )
    return seen, reasons


def _warm_up(requests: Sequence[TracedRequest]) -> list[TracedRequest]:
    """A few, short, whose prompts are no others'."""
    return [
        each._replace(input_tokens=16, output_tokens=4, block_ids=())
        for each in requests[:_WARM_UP]
    ]


def split_share(reasons: Mapping[str, int]) -> float:
    """Of placements, those on two workers."""
    return sum(n for name, n in reasons.items() if name in _SPLIT) / sum(reasons.values())
