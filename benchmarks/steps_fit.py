"""What real engines take, as the engine model's costs. Pure: measured times in, a profile out.

An engine that has idled takes longer to a first token than its steps do: that is told apart.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import NamedTuple, TypeVar

from benchmarks.engine_model import least_squares
from benchmarks.report import table
from engine.latency_model import StepTimes, StepWork
from engine.profiles import EngineProfile

_Point = TypeVar("_Point")


@dataclass(frozen=True, slots=True)
class Measured:
    """Medians, in seconds."""

    prompts: dict[int, float]
    """By tokens: from a prompt to its first token, of an engine that has idled."""
    decodes: dict[tuple[int, int], float]
    """By requests and context: from a step to the next one."""
    fetches: dict[int, float]
    """By tokens: from a hand-off to the next token, without that step's own time. Empty where
    an engine has no other."""
    beside: dict[int, float]
    """By tokens: as `prompts`, while the other engine decodes. Empty where an engine has none."""
    block_tokens: int
    kv_tokens: int
    max_step_tokens: int
    max_running_requests: int
    max_model_len_tokens: int


class Fit(NamedTuple):
    """What was found."""

    profile: EngineProfile
    wake_s: float
    """What a first token of an engine that has idled takes beside its step."""
    contention: float | None
    """As many times as long a prompt's step takes while the other engine decodes; None without
    another. Waking is taken to be no longer."""


def mean(measured: Sequence[Measured]) -> Measured:
    """Of measurements of the same points."""
    first, *_ = measured
    return replace(
        first,
        prompts=_means([each.prompts for each in measured]),
        decodes=_means([each.decodes for each in measured]),
        fetches=_means([each.fetches for each in measured]),
        beside=_means([each.beside for each in measured]),
    )


def _means(found: Sequence[Mapping[_Point, float]]) -> dict[_Point, float]:
    return {point: statistics.fmean(each[point] for each in found) for point in found[0]}


def fit(measured: Measured) -> Fit:
    """The engine model's costs, by least squares of relative errors; of contention the mean."""
    terms = [[*_terms(_prompt_work(tokens)), 1.0] for tokens in measured.prompts]
    terms += [[*_terms(_decode_work(*each)), 0.0] for each in measured.decodes]
    seconds = [*measured.prompts.values(), *measured.decodes.values()]
    *costs, wake_s = least_squares(terms, seconds, seconds)
    fetches_s = list(measured.fetches.values())
    base_s, token_s = 0.0, 0.0
    if fetches_s:
        base_s, token_s = least_squares([[1.0, n] for n in measured.fetches], fetches_s, fetches_s)
    profile = EngineProfile(
        model="tiny", gpus=1, kv_bytes_per_token=1, weights_bytes=0.0,
        step_base_s=costs[0], prefill_token_s=costs[1], prefill_pair_s=costs[2],
        decode_request_s=costs[3], decode_context_token_s=costs[4],
        max_step_tokens=measured.max_step_tokens,
        max_running_requests=measured.max_running_requests,
        max_model_len_tokens=measured.max_model_len_tokens,
        kv_tokens_reported=measured.kv_tokens,
        link_bytes_s=1 / max(token_s, 1e-12), transfer_base_s=base_s,
    )  # fmt: skip
    times = StepTimes(profile.timing(measured.block_tokens))
    ratios = [
        (seconds - wake_s) / times.step_s(_prompt_work(tokens))
        for tokens, seconds in measured.beside.items()
    ]
    return Fit(profile, wake_s, max(1.0, statistics.fmean(ratios)) if ratios else None)


def _prompt_work(tokens: int) -> StepWork:
    work = StepWork()
    work.add_prefill(tokens, context_tokens=0)
    return work


def _decode_work(requests: int, context_tokens: int) -> StepWork:
    work = StepWork()
    for _ in range(requests):
        work.add_decode(context_tokens)
    return work


def _terms(work: StepWork) -> list[float]:
    """What the costs are factors of."""
    return [
        1.0, work.prefill_tokens, work.prefill_pairs, work.decode_requests,
        work.decode_context_tokens,
    ]  # fmt: skip


def report(measured: Measured) -> str:
    """Markdown: every point beside the fit, and the costs."""
    found = fit(measured)
    times = StepTimes(found.profile.timing(measured.block_tokens))
    points = [
        (f"prompt of {tokens} tokens", seconds, found.wake_s + times.step_s(_prompt_work(tokens)))
        for tokens, seconds in measured.prompts.items()
    ]
    points += [
        (f"step of {each[0]} x {each[1]} tokens", seconds, times.step_s(_decode_work(*each)))
        for each, seconds in measured.decodes.items()
    ]
    points += [
        (f"fetch of {n} tokens", seconds, times.transfer_s(-(-n // measured.block_tokens)))
        for n, seconds in measured.fetches.items()
    ]
    points += [
        (
            f"prompt of {tokens} tokens while the other engine decodes", seconds,
            found.wake_s + (found.contention or 1.0) * times.step_s(_prompt_work(tokens)),
        )
        for tokens, seconds in measured.beside.items()
    ]  # fmt: skip
    rows = [
        (name, f"{1e3 * seconds:.2f}", f"{1e3 * fitted:.2f}", f"{fitted / seconds - 1:+.0%}")
        for name, seconds, fitted in points
    ]
    all_costs = {**asdict(times.timing), "first token after a pause": found.wake_s}
    costs = [
        (name, f"{1e6 * value:.4g}")
        for name, value in all_costs.items()
        if measured.fetches or not name.startswith("transfer_")
    ]
    fits = table(("what", "ms", "fitted, ms", "error"), rows)
    return f"{fits}\n{table(('cost', 'µs'), costs)}"
