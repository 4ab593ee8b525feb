"""`baton simulate`: a trace, a cluster and a policy in; a table, and if asked a page, out."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.table import Table

from engine.latency_model import StepTimes, StepWork
from engine.profiles import PROFILES, EngineProfile
from protos.errors import ConfigError, nearest
from router.core.costs import Slo
from simulator import page, traces, workloads
from simulator.cluster import Layout
from simulator.experiment import Outcome, policy_named, run
from simulator.measure import Latencies
from simulator.traces import TracedRequest

_SLO: Final = re.compile(r"^(\d+(?:\.\d+)?)(ms|s),(\d+(?:\.\d+)?)(ms|s)$")
_SEEN_FOR_SLO: Final = 1000
"""Requests of a workload that an SLO is held against before it is run."""


@dataclass(frozen=True, slots=True)
class Question:
    """What was typed."""

    workload: str
    """A trace's path, or the name of a synthetic one."""
    model: str
    gpus: int
    prefill: int
    """Engines that only compute prompts."""
    policy: str
    slo: str
    rate_rps: float | None
    minutes: float
    seed: int
    page: Path | None


def simulate(question: Question, console: Console) -> None:
    """Raises BatonError for what can't be run."""
    policy_named(question.policy)
    layout = _layout(question)
    slo = read_slo(question.slo)
    requests = _requests(question)
    begin = list(itertools.islice(requests, _SEEN_FOR_SLO))
    if not begin:
        raise ConfigError(
            f"nothing of {question.workload} arrives within {question.minutes:g} minutes; raise "
            "--minutes or --rate"
        )
    _check_reachable(layout.profile, slo, begin)
    outcome = run(layout, question.policy, slo, itertools.chain(begin, requests), question.seed)
    console.print(_table(question, layout, outcome))
    if question.page is not None:
        title = f"{question.workload} on {question.gpus} GPUs, {question.policy}"
        question.page.write_text(page.render(title, outcome))
        console.print(f"Curves: {question.page}")


def read_slo(text: str) -> Slo:
    """`2s,50ms`: time to first token, time per output token."""
    match = _SLO.match(text.replace(" ", ""))
    if match is None:
        raise ConfigError(
            f"--slo {text!r} can't be read; write the time to first token and the time per output "
            "token, as in --slo 2s,50ms"
        )
    ttft, ttft_unit, tpot, tpot_unit = match.groups()
    scale = {"ms": 1e-3, "s": 1.0}
    slo = Slo(float(ttft) * scale[ttft_unit], float(tpot) * scale[tpot_unit])
    if not (slo.ttft_s > 0 and slo.tpot_s > 0):
        raise ConfigError(f"--slo {text!r} leaves no time at all; both must be above 0")
    return slo


def _layout(question: Question) -> Layout:
    profile = PROFILES.get(question.model)
    if profile is None:
        near = nearest(question.model, PROFILES)
        raise ConfigError(
            f"there is no engine {question.model!r}; did you mean {near!r}? "
            f"There are {', '.join(PROFILES)}"
        )
    engines, rest = divmod(question.gpus, profile.gpus)
    if rest or engines < 1:
        raise ConfigError(
            f"--gpus {question.gpus} is no whole number of engines: {question.model} runs on "
            f"{profile.gpus}"
        )
    if not 0 <= question.prefill < engines:
        raise ConfigError(
            f"--prefill {question.prefill} leaves no engine to decode: there are {engines}"
        )
    return Layout(profile, question.prefill, engines - question.prefill)


def _requests(question: Question) -> Iterator[TracedRequest]:
    end_s = question.minutes * 60
    made = workloads.SYNTHETIC.get(question.workload)
    if made is not None:
        if question.rate_rps is None:
            raise ConfigError(f"{question.workload} needs --rate, in requests per second")
        return made(workloads.Wish(question.rate_rps, end_s, question.seed))
    path = Path(question.workload)
    if not path.exists() and "/" not in question.workload and "." not in question.workload:
        near = nearest(question.workload, workloads.SYNTHETIC)
        raise ConfigError(
            f"there is no trace {question.workload!r}; did you mean {near!r}? Name a file, or one "
            f"of {', '.join(workloads.SYNTHETIC)}"
        )
    requests = traces.read(path)
    if question.rate_rps is None:
        return workloads.until(requests, end_s)
    count, last_s = 0, 0.0
    for request in traces.read(path):
        count, last_s = count + 1, request.arrival_s
    if not last_s:
        raise ConfigError(f"{path} has no rate to speed up: all arrive at once; leave --rate out")
    factor = question.rate_rps * last_s / count
    return workloads.until(workloads.sped_up(requests, factor), end_s)


def _check_reachable(profile: EngineProfile, slo: Slo, requests: list[TracedRequest]) -> None:
    """An SLO that no request could meet alone on an idle engine is a mistake, not a result."""
    times = StepTimes(profile.timing(1))
    ttft_s, tpot_s = float("inf"), float("inf")
    for request in requests:
        prompt, token = StepWork(), StepWork()
        prompt.add_prefill(request.input_tokens, 0)
        token.add_decode(request.input_tokens)
        ttft_s = min(ttft_s, times.step_s(prompt))
        tpot_s = min(tpot_s, times.step_s(token))
    if slo.ttft_s < ttft_s or slo.tpot_s < tpot_s:
        raise ConfigError(
            f"no request can meet --slo {_ms(slo.ttft_s)},{_ms(slo.tpot_s)} even alone on "
            f"{profile.model}; the best reachable is {_ms(ttft_s)},{_ms(tpot_s)}"
        )


def _table(question: Question, layout: Layout, outcome: Outcome) -> Table:
    measured = outcome.measured
    served_s = max(outcome.duration_s, 1e-9)
    rows = [
        ("requests", f"{measured.requests:,} in {served_s:,.0f} s"),
        ("within both SLOs", f"{measured.attainment:.1%}"),
        ("TTFT mean, p50, p90, p99", _quantiles(measured.ttft)),
        ("TPOT mean, p50, p90, p99", _quantiles(measured.tpot)),
        ("output tokens/s", f"{measured.output_tokens / served_s:,.0f}"),
        ("prompt tokens cached", f"{outcome.hit_rate:.1%}"),
        ("failed", f"{measured.failed:,}"),
        ("busy, least to most", f"{min(outcome.busy.values()):.0%} to "
                                f"{max(outcome.busy.values()):.0%}"),
    ]  # fmt: skip
    table = Table(
        title=f"{question.policy} on {layout.prefill} prefill and {layout.decode} decode engines "
        f"of {question.model}",
        show_header=False,
    )
    for row in rows:
        table.add_row(*row)
    return table


def _quantiles(latencies: Latencies) -> str:
    if not latencies.count:
        return "-"
    values = [latencies.mean_s, *(latencies.quantile_s(share) for share in (0.5, 0.9, 0.99))]
    return ", ".join(_ms(value) for value in values)


def _ms(seconds: float) -> str:
    return f"{seconds:.3g}s" if seconds >= 1 else f"{seconds * 1e3:.3g}ms"
