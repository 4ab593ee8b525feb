"""Fits the simulator's engine profiles: `python -m benchmarks.engine_profiles`.

SHARED/perf/h100_sxm_step_times_derived.csv (`--shared`, default ../shared) holds summed kernel
times of a step by model, GPUs, batch and context. The engine model's costs are fitted to them by
least squares of relative errors, one fit for prefill and decode together. Prints a Markdown table;
the profiles in `engine/profiles.py` hold these numbers, prefill's 1.2 times, but for one step base
that is explained there.
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Final

import numpy as np

from benchmarks import shared_files
from benchmarks.report import table

ENGINES: Final = (
    ("llama-3.1-8b", "1", "bfloat16"),
    ("qwen3-32b", "2", "bfloat16"),
    ("llama-3.1-70b", "4", "bfloat16"),
    ("llama-3.1-70b", "8", "bfloat16"),
)
"""Model, GPUs and weights, as the file names them."""


def fit(rows: list[dict[str, str]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Costs in seconds (base, prompt token, pair, request, context token), and the relative errors
    of prefill and of decode points."""
    terms, seconds, prefills = [], [], []
    for row in rows:
        tokens, batch = float(row["context_tokens"]), float(row["batch"])
        prefill = row["phase"] == "prefill"
        if prefill:
            terms.append((1.0, tokens, tokens * tokens / 2, 0.0, 0.0))
        else:
            terms.append((1.0, 0.0, 0.0, batch, batch * tokens))
        seconds.append(float(row["step_ms"]) / 1000)
        prefills.append(prefill)
    work, measured_s, is_prefill = np.array(terms), np.array(seconds), np.array(prefills)
    costs, *_ = np.linalg.lstsq(work / measured_s[:, None], np.ones_like(measured_s), rcond=None)
    errors = np.abs(work @ costs / measured_s - 1)
    return costs, errors[is_prefill], errors[~is_prefill]


def report(shared: Path) -> str:
    """As Markdown."""
    with (shared / "perf" / "h100_sxm_step_times_derived.csv").open() as file:
        known = list(csv.DictReader(file))
    rows = []
    for model, gpus, weights in ENGINES:
        costs, prefill, decode = fit(
            [
                row
                for row in known
                if (row["model"], row["tp"], row["weight_dtype"]) == (model, gpus, weights)
            ]
        )
        scaled = costs * (1e3, 1e6, 1e9, 1e6, 1e9)
        rows.append(
            [
                f"{model}, TP{gpus}, {weights}",
                *(f"{cost:.3g}" for cost in scaled),
                f"{prefill.mean():.1%} ({prefill.max():.0%})",
                f"{decode.mean():.1%} ({decode.max():.0%})",
            ]
        )
    headings = [
        "engine", "step base, ms", "prompt token, µs", "pair, ns", "request, µs",
        "context token, ns", "error of prefill: mean (largest)", "of decode",
    ]  # fmt: skip
    return table(headings, rows)


def main() -> None:
    """Entry point."""
    given = shared_files.parser(__doc__).parse_args()
    with shared_files.needed():
        print(report(given.shared))


if __name__ == "__main__":
    main()
