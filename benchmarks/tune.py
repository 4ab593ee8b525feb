"""Tunes the strongest policies by one budget of trials: `python -m benchmarks.tune`.

Baton's weights and the documented knobs of Dynamo's KV router, llm-d's guide and Mooncake's
Algorithm 1 each get `--trials` values, drawn at random from SPACES by a seed; the first trial is
the defaults. They are trained on requests that the goodput report does not serve: another seed of
its synthetic workloads. (Its cuts of the traces leave no part of them unseen.)

A trial is judged by the share of requests that are served as promised, averaged over the workloads,
each at HARDER times the rate that the policy's defaults serve to 90 %. The best trial and the
defaults are then searched for their goodput on the same workloads. Virtual time: the result depends
on the command alone.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Final, NamedTuple

from benchmarks.report import table
from benchmarks.workloads import WORKLOADS, Workload
from engine.profiles import PROFILES
from router.core.costs import Weights
from simulator.cluster import Layout
from simulator.experiment import OURS, run
from simulator.goodput import highest_rate

ENGINES: Final = 8
SEED: Final = 101
"""Of the workloads; the report's are 0 to 4."""
SHARE: Final = 0.9
HARDER: Final = 1.1
CHANGED: Final = 0.5
"""The chance of a knob to leave its default in a trial: a few good ones must not be spoilt by the
others."""
PRECISION: Final = 0.05
REQUESTS: Final = 5000
"""Of a workload: enough to last for some 50 s; far fewer are over before they queue at any rate."""
_NOWHERE: Final = Path()
"""Synthetic workloads are read from nowhere."""


class Range(NamedTuple):
    """Of a knob: drawn evenly between these, or evenly by their logarithms."""

    low: float
    high: float
    by_logarithm: bool = True

    def draw(self, rng: Random) -> float:
        value = (
            math.exp(rng.uniform(math.log(self.low), math.log(self.high)))
            if self.by_logarithm
            else rng.uniform(self.low, self.high)
        )
        return float(f"{value:.3g}")


SPACES: Final[dict[str, dict[str, Range]]] = {
    OURS: {
        "arriving": Range(0.5, 20.0),
        "later": Range(2.0, 100.0),
        "delayed": Range(0.5, 50.0),
        "floor": Range(0.002, 0.2),
        "hold": Range(0.03, 1.0),
        "share_window_s": Range(2.0, 60.0),
    },
    "dynamo_kv": {
        "s": Range(0.25, 4.0),
        "k": Range(0.25, 4.0),
        "d": Range(0.0, 2.0, by_logarithm=False),
        "w": Range(0.0, 8.0, by_logarithm=False),
    },
    "llmd_guide": {
        "affinity_share": Range(0.2, 0.95, by_logarithm=False),
        "max_ttft_gap_s": Range(0.1, 30.0),
        "remote_from_tokens": Range(64.0, 8192.0),
    },
    "mooncake": {"theta": Range(1.0, 32.0)},
}
"""By policy: its knobs."""
assert SPACES[OURS].keys() == set(Weights.__slots__), "these are Baton's knobs"


class Training(NamedTuple):
    """A workload, and how many engines of a cluster compute prompts alone."""

    workload: Workload
    prefill: int


TRAINING: Final = (
    Training(WORKLOADS["agents"], 0),
    Training(WORKLOADS["prefix-groups"], 0),
    Training(WORKLOADS["bursty"], 3),
    Training(WORKLOADS["prefix-groups"], 3),
)


class Task(NamedTuple):
    """A policy with these knobs on one workload."""

    policy: str
    knobs: Mapping[str, float]
    training: int
    rate_rps: float
    """Of the run, or where a search begins."""
    requests: int


def trials(policy: str, count: int) -> list[dict[str, float]]:
    """Knobs to be tried: the defaults, then what the seed gives."""
    rng = Random(f"{policy} {SEED}")
    tried: list[dict[str, float]] = [{}]
    while len(tried) < count:
        drawn = {
            name: space.draw(rng)
            for name, space in SPACES[policy].items()
            if rng.random() < CHANGED
        }
        if drawn:
            tried.append(drawn)
    return tried


def attainment(task: Task) -> float:
    """The share of requests that are served as promised."""
    return _run(task, task.rate_rps)


def goodput(task: Task) -> float:
    """The highest rate at which SHARE of them are."""
    return highest_rate(
        lambda rate_rps: _run(task, rate_rps, SHARE) >= SHARE, task.rate_rps, 0.05, PRECISION
    )


def _run(task: Task, rate_rps: float, enough: float | None = None) -> float:
    workload, prefill = TRAINING[task.training]
    layout = Layout(PROFILES["llama-3.1-8b-h100"], prefill, ENGINES - prefill)
    cut = replace(workload, most_requests=task.requests)
    requests = list(cut.requests(_NOWHERE, rate_rps, SEED))
    allowed = None if enough is None else math.floor(len(requests) * (1 - enough) + 1e-9)
    outcome = run(layout, task.policy, workload.slo, requests, SEED, task.knobs, allowed)
    return outcome.measured.good / len(requests)


class Tuned(NamedTuple):
    """What came of a policy's trials."""

    knobs: list[dict[str, float]]
    attainments: list[list[float]]
    """By trial and workload."""
    default_rps: list[float]
    best_rps: list[float]

    @property
    def best(self) -> int:
        """Of its trials; the earliest of equals."""
        means = [statistics.mean(each) for each in self.attainments]
        return means.index(max(means))


def tune(pool: ProcessPoolExecutor, policy: str, count: int, requests: int) -> Tuned:
    """All of a policy's trials."""
    knobs, places = trials(policy, count), range(len(TRAINING))
    starts = [Task(policy, {}, n, TRAINING[n].workload.start_rps, requests) for n in places]
    default_rps = list(pool.map(goodput, starts))
    tasks = [
        Task(policy, each, n, HARDER * default_rps[n], requests) for each in knobs for n in places
    ]
    shares = list(pool.map(attainment, tasks))
    attainments = [shares[at : at + len(places)] for at in range(0, len(shares), len(places))]
    tuned = Tuned(knobs, attainments, default_rps, default_rps)
    if tuned.best:
        found = [Task(policy, knobs[tuned.best], n, default_rps[n], requests) for n in places]
        tuned = tuned._replace(best_rps=list(pool.map(goodput, found)))
    return tuned


def report(count: int, requests: int, jobs: int) -> str:
    """As Markdown."""
    names = [f"{each.workload.name}, {each.prefill} prefill" for each in TRAINING]
    summary, details = [], []
    with ProcessPoolExecutor(jobs) as pool:
        for policy in SPACES:
            tuned = tune(pool, policy, count, requests)
            for what, rates, knobs in (
                ("default", tuned.default_rps, ""),
                ("tuned", tuned.best_rps, _told(tuned.knobs[tuned.best])),
            ):
                summary.append([policy, what, *(f"{rate:.1f}" for rate in rates), knobs])
            rows = [
                [_told(knobs), *(f"{share:.1%}" for share in shares)]
                for knobs, shares in zip(tuned.knobs, tuned.attainments, strict=True)
            ]
            details.append(f"{policy}:\n\n{table(['knobs', *names], rows)}")
            print(f"{policy}: {tuned}", file=sys.stderr, flush=True)
    return "\n".join(
        (
            f"Goodput, requests/s of {ENGINES} engines, {SHARE:.0%} within both SLOs:\n",
            table(["policy", "", *names, "knobs"], summary),
            f"Share served as promised at {HARDER} times the defaults' goodput, by trial:\n",
            *details,
        )
    )


def _told(knobs: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in knobs.items()) or "defaults"


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--trials", type=int, default=16)
    parser.add_argument("--requests", type=int, default=REQUESTS, help="of each workload")
    parser.add_argument("--jobs", type=int, default=2)
    given = parser.parse_args()
    print(report(given.trials, given.requests, given.jobs))


if __name__ == "__main__":
    main()
