"""A run's report: the rates beside the run's own, and the files that it is written to."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from protos.errors import ConfigError
from simulator import page, picture
from simulator.cluster import Layout
from simulator.experiment import Outcome
from simulator.figures import AtRate, figures
from simulator.study import Study, in_words

_FACTORS: Final = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)
"""Of the workload's rate."""


def check_paths(paths: Sequence[Path]) -> None:
    """Before anything is run: raises ConfigError for what can't be written."""
    for path in paths:
        if path.suffix not in (".html", ".png"):
            raise ConfigError(f"--report {path} must end in .html or .png")
        if not path.parent.is_dir():
            raise ConfigError(f"--report {path}: there is no directory {path.parent}; make it")


def write(paths: Sequence[Path], study: Study, layout: Layout, outcome: Outcome) -> None:
    """To each path, in the format that it names."""
    title = f"{study.workload.name}: {study.policy} on {in_words(layout)} of {layout.profile.model}"
    measured = outcome.measured
    summary = (
        f"{measured.requests:,} requests, {measured.attainment:.1%} within both SLOs, "
        f"{outcome.hit_rate:.1%} of prompt tokens cached."
    )
    drawn = figures(outcome, _other_rates(study, layout, outcome))
    for path in paths:
        if path.suffix == ".html":
            path.write_text(page.render(title, summary, drawn))
        else:
            picture.write(path, title, summary, drawn)


def _other_rates(study: Study, layout: Layout, outcome: Outcome) -> list[AtRate]:
    """The same requests, slower and faster; none if all arrive at once."""
    if not study.last_s:
        return []
    others = [factor for factor in _FACTORS if factor != 1]
    found = {1.0: outcome}
    for number, factor in enumerate(others, 1):
        found[factor] = study.run(layout, factor=factor, runs_after=len(others) - number)
    rates = []
    for factor in _FACTORS:
        offered_rps = factor * study.requests / study.last_s
        attained = found[factor].measured.attainment
        rates.append(AtRate(offered_rps, offered_rps * attained, found[factor].hit_rate))
    return rates
