"""How well the engine model's times fit measured GPUs: `python -m benchmarks.engine_model`.

Fits `engine.latency_model` to the sweeps in SHARED/perf/dynamo_planner_measured.csv (`--shared`,
default ../shared): every other point is fitted, the rest is held out and predicted. Prints Markdown
tables; in seconds, the costs can stand under `simulated:` in a configuration.

What the sweeps are (ai-dynamo/dynamo, benchmarks/profiler/utils): TTFT of one prompt at a time; ITL
of b requests sent at once, each generating 500 tokens, over the context in the middle of that. The
prompts were meant to be cached by then. The figures say that they were computed: with long contexts
a second request adds as much as its prompt's time over 1,000 tokens, and no step could take so
long. So a request's ITL is taken to hold the prompts that follow its own, (b - 1) / 2 on average,
spread over its 500 tokens. `--cached` fits as if it were not so.
"""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np

from benchmarks import shared_files
from benchmarks.report import table
from engine.latency_model import StepTimes, StepWork
from engine.spec import SimulatedTiming

OUTPUT_TOKENS: Final = 500
OUTLIERS: Final = {("H100-SXM", 8, "prefill", 6205)}
"""GPU, TP, phase, tokens: 498 ms between neighbours of 162 and 321 ms."""
NEAR: Final = 0.1


class Setup(NamedTuple):
    """What was measured."""

    gpu: str
    model: str
    tp: int


class Point(NamedTuple):
    """One figure of a sweep."""

    phase: str
    """ "prefill": TTFT; "decode": ITL."""
    tokens: int
    """Of the prompt, or of the context while it decodes."""
    requests: int
    measured_s: float


@dataclass(frozen=True, slots=True)
class Fitted:
    """An engine's costs, and what a first token takes beyond its step."""

    timing: SimulatedTiming
    first_token_s: float
    prompts_cached: bool = False

    def predicted_s(self, point: Point) -> float:
        """What this point should have taken."""
        if point.phase == "prefill":
            return self.first_token_s + self._step_s(prompt_tokens=point.tokens)
        decode_s = self._step_s(decodes=point.requests, context_tokens=point.tokens)
        return decode_s + self.interference_s(point)

    def interference_s(self, point: Point) -> float:
        """Of other requests' prompts, for each token."""
        if self.prompts_cached:
            return 0.0
        prompt_s = self._step_s(prompt_tokens=_prompt_tokens(point)) - self._step_s()
        return (point.requests - 1) / 2 / OUTPUT_TOKENS * prompt_s

    def _step_s(
        self, *, prompt_tokens: int = 0, decodes: int = 0, context_tokens: int = 0
    ) -> float:
        work = StepWork(decode_requests=decodes, decode_context_tokens=decodes * context_tokens)
        work.add_prefill(prompt_tokens, 0)
        return StepTimes(self.timing).step_s(work)


def _prompt_tokens(point: Point) -> int:
    return max(0, point.tokens - OUTPUT_TOKENS // 2)


def read(path: Path) -> dict[Setup, list[Point]]:
    """The sweeps, without the outliers."""
    sweeps: dict[Setup, list[Point]] = defaultdict(list)
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            tp, tokens = int(row["tp"]), int(row["isl_or_context"])
            if (row["gpu"], tp, row["phase"], tokens) in OUTLIERS:
                continue
            requests = round(float(row["est_batch"]))
            point = Point(row["phase"], tokens, requests, float(row["latency_ms"]) / 1000)
            sweeps[Setup(row["gpu"], row["model"].rpartition("/")[2], tp)].append(point)
    return dict(sweeps)


def fit(points: Sequence[Point], prompts_cached: bool = False) -> Fitted:
    """The costs with the least squared relative error."""
    prompts = [point for point in points if point.phase == "prefill"]
    first_s, token_s, pair_s = least_squares(
        [[1.0, each.tokens, each.tokens**2 / 2] for each in prompts],
        [each.measured_s for each in prompts],
        [each.measured_s for each in prompts],
    )
    so_far = Fitted(
        SimulatedTiming(
            step_base_s=0.0, prefill_token_s=token_s, prefill_pair_s=pair_s,
            decode_request_s=0.0,
        ),
        0.0,
        prompts_cached,
    )  # fmt: skip
    decodes = [point for point in points if point.phase == "decode"]
    base_s, request_s, context_token_s = least_squares(
        [[1.0, each.requests, each.requests * each.tokens] for each in decodes],
        [each.measured_s - so_far.interference_s(each) for each in decodes],
        [each.measured_s for each in decodes],
    )
    timing = SimulatedTiming(
        step_base_s=base_s, prefill_token_s=token_s, prefill_pair_s=pair_s,
        decode_request_s=request_s, decode_context_token_s=context_token_s,
    )  # fmt: skip
    return Fitted(timing, first_s - base_s, prompts_cached)


def least_squares(
    terms: Sequence[Sequence[float]], wanted: Sequence[float], scales: Sequence[float]
) -> list[float]:
    """Factors of the terms, none below 0, for the least squares of error / scale."""
    scale = np.array(scales)
    matrix, target = np.array(terms) / scale[:, None], np.array(wanted) / scale
    kept = list(range(matrix.shape[1]))
    while True:
        found, *_ = np.linalg.lstsq(matrix[:, kept], target, rcond=None)
        if (found >= 0).all():
            factors = np.zeros(matrix.shape[1])
            factors[kept] = found
            return [float(factor) for factor in factors]
        del kept[int(np.argmin(found))]


class Quality(NamedTuple):
    """Relative errors of held-out points."""

    points: int
    mean: float
    largest: float
    near: float
    """The share of points within `NEAR`."""


def quality(fitted: Fitted, points: Sequence[Point]) -> Quality:
    """Of these predictions."""
    errors = [abs(fitted.predicted_s(each) / each.measured_s - 1) for each in points]
    near = sum(error <= NEAR for error in errors) / len(errors)
    return Quality(len(errors), sum(errors) / len(errors), max(errors), near)


def split(points: Sequence[Point]) -> tuple[list[Point], list[Point]]:
    """What is fitted, and what is held out: every other point of each phase."""
    fitted: list[Point] = []
    held_out: list[Point] = []
    for phase in ("prefill", "decode"):
        of_phase = [point for point in points if point.phase == phase]
        fitted += of_phase[::2]
        held_out += of_phase[1::2]
    return fitted, held_out


def report(sweeps: dict[Setup, list[Point]], prompts_cached: bool) -> str:
    """As Markdown."""
    errors, costs = [], []
    for setup, points in sweeps.items():
        to_fit, held_out = split(points)
        fitted = fit(to_fit, prompts_cached)
        name = f"{setup.model}, {setup.gpu}, TP{setup.tp}"
        for phase in ("prefill", "decode"):
            found = quality(fitted, [each for each in held_out if each.phase == phase])
            fitted_points = sum(each.phase == phase for each in to_fit)
            errors.append(
                [name, phase, f"{fitted_points}", f"{found.points}", f"{found.mean:.1%}",
                 f"{found.largest:.1%}", f"{found.near:.0%}"]
            )  # fmt: skip
        timing = fitted.timing
        costs.append(
            [name, f"{timing.step_base_s * 1e3:.2f}", f"{timing.prefill_token_s * 1e6:.1f}",
             f"{timing.prefill_pair_s * 1e9:.2f}", f"{timing.decode_request_s * 1e6:.1f}",
             f"{timing.decode_context_token_s * 1e9:.1f}", f"{fitted.first_token_s * 1e3:.1f}"]
        )  # fmt: skip
    error_headings = [
        "model, GPU", "phase", "fitted", "held out", "mean error", "largest", "within 10 %",
    ]  # fmt: skip
    cost_headings = [
        "model, GPU", "step_base, ms", "prefill_token, µs", "prefill_pair, ns",
        "decode_request, µs", "decode_context_token, ns", "first token besides, ms",
    ]  # fmt: skip
    return f"{table(error_headings, errors)}\n{table(cost_headings, costs)}"


def main() -> None:
    """Entry point."""
    parser = shared_files.parser(__doc__)
    parser.add_argument("--cached", action="store_true", help="as if no prompt was computed twice")
    given = parser.parse_args()
    with shared_files.needed():
        points = read(given.shared / "perf" / "dynamo_planner_measured.csv")
    print(report(points, given.cached))


if __name__ == "__main__":
    main()
