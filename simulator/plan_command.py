"""`baton simulate --plan`: simulates what the search asks for, and tells what came of it."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from engine.profiles import PROFILES, EngineProfile
from protos.errors import ConfigError
from router.core.events import Role
from simulator.cluster import Layout
from simulator.measure import Latencies
from simulator.plan import Goal, Plan, Trial, kinds, plan
from simulator.question import ATTAINMENT, Question, Reaching, gpus_of, in_units
from simulator.study import Study, in_words


def search(question: Question, reaching: Reaching, study: Study) -> Plan:
    """Of layouts of these engines, with as many GPUs as were asked for at most."""
    goal = Goal(question.attainment or ATTAINMENT, study.requests)

    def serve(layout: Layout, to_its_end: bool, runs_after: int) -> Trial:
        allowed = None if to_its_end else goal.misses_allowed
        outcome = study.run(layout, misses_allowed=allowed, runs_after=runs_after)
        return Trial(layout, goal, outcome)

    fitting = [kind for kind in kinds(*reaching) if kind.least_gpus <= question.gpus]
    if not fitting:
        raise ConfigError(
            f"--gpus {question.gpus} is too few for engines that could meet --slo {question.slo} "
            "even alone; raise it, or loosen --slo"
        )
    return plan(fitting, question.gpus, serve)


def show(
    question: Question, known: Sequence[EngineProfile], reaching: Reaching, found: Plan,
    console: Console,
) -> None:  # fmt: skip
    """What was tried, what is best and why, and the commands for just that."""
    console.print(_table(question, found))
    for line in (
        _verdict(found),
        _parallelism(known, reaching),
        f"Again: {_simulate_command(question, found.chosen)}",
        f"Live: {_serve_command(found.chosen.layout)}",
    ):
        console.print(line, soft_wrap=True, markup=False)


def _table(question: Question, found: Plan) -> Table:
    goal = found.chosen.goal
    table = Table(
        title=f"{question.policy} on {found.chosen.layout.profile.model}: "
        f"{_percent(goal)} of {goal.requests:,} requests within {question.slo}"
    )
    headings = ("GPUs", "prefill\nengines\nx GPUs", "decode\nengines\nx GPUs", "within\nSLOs",
                "TTFT\np50, p99", "TPOT\np50, p99")  # fmt: skip
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for trial in sorted(found.tried, key=_order):
        table.add_row(*_row(trial, trial is found.chosen))
    return table


def _order(trial: Trial) -> tuple[int, ...]:
    layout = trial.layout
    prefill_gpus = layout.profile_of(Role.PREFILL).gpus
    return trial.gpus, layout.profile.gpus, prefill_gpus, layout.prefill


def _row(trial: Trial, chosen: bool) -> tuple[str, ...]:
    layout, measured = trial.layout, trial.outcome.measured
    cells = (
        f"{'→ ' if chosen else ''}{trial.gpus}",
        f"{layout.prefill} x {layout.profile_of(Role.PREFILL).gpus}" if layout.prefill else "-",
        f"{layout.decode} x {layout.profile.gpus}",
    )
    if not trial.whole:
        return (*cells, f"<{_percent(trial.goal)}", "", "")
    return (
        *cells,
        f"{measured.attainment:.1%}",
        _quantiles(measured.ttft),
        _quantiles(measured.tpot),
    )


def _quantiles(latencies: Latencies) -> str:
    if not latencies.count:
        return "-"
    return ", ".join(in_units(latencies.quantile_s(share)) for share in (0.5, 0.99))


def _verdict(found: Plan) -> str:
    chosen = found.chosen
    layout = chosen.layout
    what = f"{gpus_of(chosen.gpus)}, {in_words(layout)}"
    if layout.prefill_profile is None:
        what += f" of {gpus_of(layout.profile.gpus)} each"
    share = _percent(chosen.goal)
    if not chosen.meets:
        measured = chosen.outcome.measured
        quantile = chosen.goal.attainment
        latencies = "".join(
            f"; {share} have a {name} of at most {in_units(each.quantile_s(quantile))}"
            for name, each in (("TTFT", measured.ttft), ("TPOT", measured.tpot))
            if each.count
        )
        return (
            f"No layout that was tried does that. The best reachable is {what}: "
            f"{measured.attainment:.1%} of the requests are served so{latencies}. Raise --gpus, "
            "lower --rate, or loosen --slo."
        )
    rivals = sum(trial.meets and trial.gpus == chosen.gpus for trial in found.tried)
    reason = "nothing that was tried does it with fewer GPUs"
    if rivals > 1:
        reason += (
            f"; of {rivals} layouts that do it with as many, this one's slower latency takes the "
            "least of its SLO"
        )
    return (
        f"Chosen: {what}. Why: {reason} ({share} of the requests take at most "
        f"{chosen.ttft_share:.0%} of the TTFT and {chosen.tpot_share:.0%} of the TPOT allowed)."
    )


def _parallelism(known: Sequence[EngineProfile], reaching: Reaching) -> str:
    """Which engines there were to choose from: only what was measured."""
    model = known[0].model
    measured = _either([each for each in PROFILES.values() if each.model == model])
    said = f"An engine of {model} is known on {measured} only: nothing else was measured."
    for latency, reach in (("TTFT", reaching.prefill), ("TPOT", reaching.decode)):
        if hopeless := [each for each in known if each not in reach]:
            said += f" On {_either(hopeless)} no request would meet the {latency} even alone."
    return said


def _either(profiles: Sequence[EngineProfile]) -> str:
    *others, last = sorted(each.gpus for each in profiles)
    return f"{', '.join(map(str, others))} or {gpus_of(last)}" if others else gpus_of(last)


def _percent(goal: Goal) -> str:
    return f"{goal.attainment * 100:g}%"


def _simulate_command(question: Question, chosen: Trial) -> str:
    """That runs the layout again."""
    layout = chosen.layout
    words = ["baton", "simulate", question.workload, "--model", _name(layout.profile),
             "--gpus", f"{chosen.gpus}", "--prefill", f"{layout.prefill}",
             "--policy", question.policy, "--slo", question.slo,
             "--minutes", f"{question.minutes:.12g}", "--seed", f"{question.seed}"]  # fmt: skip
    if layout.prefill_profile is not None:
        words += ["--prefill-model", _name(layout.prefill_profile)]
    if question.rate_rps is not None:
        words += ["--rate", f"{question.rate_rps:.12g}"]
    if question.routers > 1:
        words += ["--routers", f"{question.routers}"]
    return shlex.join(words)


def _name(profile: EngineProfile) -> str:
    return next(name for name, each in PROFILES.items() if each == profile)


def _serve_command(layout: Layout) -> str:
    """That starts the layout on real GPUs."""
    command = f"baton serve --prefill {layout.prefill} --decode {layout.decode} --model CHECKPOINT"
    if layout.profile.gpus > 1:
        command = f"BATON_ENGINE_ARGS__TENSOR_PARALLEL_SIZE={layout.profile.gpus} {command}"
    if (other := layout.prefill_profile) is not None:
        command = f"BATON_PREFILL__ENGINE_ARGS__TENSOR_PARALLEL_SIZE={other.gpus} {command}"
    return command
