"""What `baton simulate` is asked: what was typed, read and checked.

Everything that can't be run is refused here with a sentence, before anything is run.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

from engine.latency_model import StepTimes, StepWork
from engine.profiles import PROFILES, EngineProfile
from protos.errors import ConfigError, nearest
from router.core.costs import Slo
from simulator import traces, workloads
from simulator.cluster import Layout
from simulator.traces import BLOCK_TOKENS, TracedRequest

_SLO: Final = re.compile(r"^(\d+(?:\.\d+)?)(ms|s),(\d+(?:\.\d+)?)(ms|s)$")
_SEEN_FOR_SLO: Final = 1000
"""Requests of a workload that an SLO is held against before it is run."""
ATTAINMENT: Final = 0.9
"""Of a plan, unless it is given."""


@dataclass(frozen=True, slots=True)
class Question:
    """What was typed."""

    workload: str
    """A trace's path, or the name of a synthetic one."""
    model: str
    prefill_model: str | None
    """Of engines that only compute prompts, if they are others."""
    gpus: int
    """Of a plan: at most."""
    prefill: int | None
    """Engines that only compute prompts."""
    policy: str
    slo: str
    rate_rps: float | None
    minutes: float
    seed: int
    reports: tuple[Path, ...]
    plan: bool
    attainment: float | None
    """The share of requests that a plan is to serve as promised."""
    routers: int


@dataclass(frozen=True, slots=True)
class Workload:
    """The same requests, as often as wanted."""

    name: str
    rate_rps: float | None
    end_s: float
    seed: int
    trace_factor: float
    """By which a trace is sped up for `rate_rps`."""

    def requests(self) -> Iterator[TracedRequest]:
        """In the order of their arrival."""
        made = workloads.SYNTHETIC.get(self.name)
        if made is not None:
            assert self.rate_rps is not None, "it was asked for"
            return made(workloads.Wish(self.rate_rps, self.end_s, self.seed))
        requests = workloads.sped_up(traces.read(Path(self.name)), self.trace_factor)
        return workloads.until(requests, self.end_s)

    def extent(self) -> tuple[int, float]:
        """How many requests, and when the last arrives, in seconds."""
        count, last_s = 0, 0.0
        for request in self.requests():
            count, last_s = count + 1, request.arrival_s
        return count, last_s


def read_workload(question: Question) -> Workload:
    """Raises ConfigError for a name that is none; a trace is read only if its rate is wanted."""
    name, rate_rps = question.workload, question.rate_rps
    factor = 1.0
    if name in workloads.SYNTHETIC:
        if rate_rps is None:
            raise ConfigError(f"{name} needs --rate, in requests per second")
    else:
        path = Path(name)
        if not path.exists() and "/" not in name and "." not in name:
            near = nearest(name, workloads.SYNTHETIC)
            raise ConfigError(
                f"there is no trace {name!r}; did you mean {near!r}? Name a file, or one "
                f"of {', '.join(workloads.SYNTHETIC)}"
            )
        if rate_rps is not None:
            factor = rate_rps / _rate_rps(path)
    return Workload(name, rate_rps, question.minutes * 60, question.seed, factor)


def _rate_rps(path: Path) -> float:
    count, last_s = 0, 0.0
    for request in traces.read(path):
        count, last_s = count + 1, request.arrival_s
    if not last_s:
        raise ConfigError(f"{path} has no rate to speed up: all arrive at once; leave --rate out")
    return count / last_s


def begin_of(question: Question, workload: Workload) -> list[TracedRequest]:
    """Its first requests. Raises ConfigError if there are none."""
    begin = list(itertools.islice(workload.requests(), _SEEN_FOR_SLO))
    if not begin:
        raise ConfigError(
            f"nothing of {question.workload} arrives within {question.minutes:g} minutes; raise "
            "--minutes or --rate"
        )
    return begin


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


def _profile(name: str) -> EngineProfile:
    profile = PROFILES.get(name)
    if profile is None:
        near = nearest(name, PROFILES)
        raise ConfigError(
            f"there is no engine {name!r}; did you mean {near!r}? There are {', '.join(PROFILES)}"
        )
    return profile


def read_layout(question: Question) -> Layout:
    """Of a question that is no plan."""
    if question.attainment is not None:
        raise ConfigError("--attainment says what --plan is to reach; add --plan or leave it out")
    profile, prefill = _profile(question.model), question.prefill or 0
    if question.prefill_model not in (None, question.model):
        return _of_two_kinds(question, profile, prefill)
    engines, rest = divmod(question.gpus, profile.gpus)
    if rest or engines < 1:
        raise ConfigError(
            f"--gpus {question.gpus} is no whole number of engines: {question.model} runs on "
            f"{profile.gpus}"
        )
    if not 0 <= prefill < engines:
        raise ConfigError(f"--prefill {prefill} leaves no engine to decode: there are {engines}")
    return Layout(profile, prefill, engines - prefill)


def _of_two_kinds(question: Question, profile: EngineProfile, prefill: int) -> Layout:
    assert question.prefill_model is not None, "it is another"
    other = _profile(question.prefill_model)
    if other.model != profile.model:
        raise ConfigError(
            f"--prefill-model {question.prefill_model} is another model than {question.model}: "
            "what it computes can't be handed over"
        )
    if prefill < 1:
        raise ConfigError("--prefill-model needs --prefill, the number of its engines")
    engines, rest = divmod(question.gpus - prefill * other.gpus, profile.gpus)
    if rest or engines < 1:
        raise ConfigError(
            f"--gpus {question.gpus} less {prefill} times {other.gpus} for prompts is no whole "
            f"number of engines to decode: {question.model} runs on {profile.gpus}"
        )
    return Layout(profile, prefill, engines, prefill_profile=other)


def read_profiles(question: Question) -> list[EngineProfile]:
    """What a plan chooses from: all degrees of tensor parallelism that are known of a model."""
    profile = _profile(question.model)
    if question.prefill is not None:
        raise ConfigError("--plan finds the number of prefill engines; leave --prefill out")
    if question.prefill_model is not None:
        raise ConfigError("--plan finds what engines compute prompts; leave --prefill-model out")
    profiles = [each for each in PROFILES.values() if each.model == profile.model]
    fitting = [each for each in profiles if each.gpus <= question.gpus]
    if not fitting:
        least = min(each.gpus for each in profiles)
        raise ConfigError(
            f"--gpus {question.gpus} is too few: {profile.model} runs on {least} or more"
        )
    return fitting


class Reaching(NamedTuple):
    """Engines on which some request could be in time, alone on an idle one."""

    prefill: list[EngineProfile]
    """For its first token."""
    decode: list[EngineProfile]
    """For the later ones."""


def check_reachable(
    prefill: Sequence[EngineProfile], decode: Sequence[EngineProfile], slo: Slo,
    requests: Sequence[TracedRequest],
) -> Reaching:  # fmt: skip
    """Those of either pool that could meet its latency. If a pool has none, the SLO is a mistake,
    not a result: raises ConfigError with the best that is reachable."""
    alone = {each: _alone_s(each, requests) for each in dict.fromkeys((*prefill, *decode))}
    reaching = Reaching(
        [each for each in prefill if slo.ttft_s >= alone[each].ttft_s],
        [each for each in decode if slo.tpot_s >= alone[each].tpot_s],
    )
    if not reaching.prefill or not reaching.decode:
        best = " or ".join(
            f"{in_units(least.ttft_s)},{in_units(least.tpot_s)} on {gpus_of(profile.gpus)}"
            for profile, least in alone.items()
        )
        raise ConfigError(
            f"no request can meet --slo {in_units(slo.ttft_s)},{in_units(slo.tpot_s)} even alone "
            f"on {decode[0].model}; the best reachable is {best}"
        )
    return reaching


def _alone_s(profile: EngineProfile, requests: Sequence[TracedRequest]) -> Slo:
    """The least TTFT and TPOT of these requests, each with all cached that those before it had."""
    times = StepTimes(profile.timing(1))
    ttft_s, tpot_s = float("inf"), float("inf")
    known: set[int] = set()
    for request in requests:
        prompt, token = StepWork(), StepWork()
        blocks = sum(1 for _ in itertools.takewhile(known.__contains__, request.block_ids))
        known.update(request.block_ids)
        cached_tokens = min(blocks * BLOCK_TOKENS, request.input_tokens - 1)
        prompt.add_prefill(request.input_tokens - cached_tokens, cached_tokens)
        token.add_decode(request.input_tokens)
        ttft_s = min(ttft_s, times.step_s(prompt))
        tpot_s = min(tpot_s, times.step_s(token))
    return Slo(ttft_s, tpot_s)


def in_units(seconds: float) -> str:
    """As `--slo` is written."""
    return f"{seconds:.3g}s" if seconds >= 1 else f"{seconds * 1e3:.3g}ms"


def gpus_of(count: int) -> str:
    """In words."""
    return "1 GPU" if count == 1 else f"{count} GPUs"
