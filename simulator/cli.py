"""`baton simulate`: a trace, a cluster and a policy in; a table, and if asked pictures, out."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from router.core.events import Role
from simulator import plan_command, report
from simulator.cluster import Layout
from simulator.experiment import Outcome, policy_named
from simulator.measure import Latencies
from simulator.progress import Bar
from simulator.question import (
    Question,
    begin_of,
    check_reachable,
    in_units,
    read_layout,
    read_profiles,
    read_slo,
    read_workload,
)
from simulator.study import Study, in_words


def simulate(question: Question, console: Console, progress: Console) -> None:
    """Raises BatonError for what can't be run. How far it is goes to `progress`."""
    policy_named(question.policy)
    report.check_paths(question.reports)
    slo = read_slo(question.slo)
    if question.plan:
        prefill = decode = read_profiles(question)
    else:
        layout = read_layout(question)
        computing = Role.PREFILL if layout.prefill else Role.DECODE
        prefill, decode = [layout.profile_of(computing)], [layout.profile]
    workload = read_workload(question)
    reaching = check_reachable(prefill, decode, slo, begin_of(question, workload))
    count, last_s = workload.extent()
    bar = Bar(progress)
    study = Study(
        workload, question.policy, slo, question.seed, count, last_s, bar, question.routers
    )
    if question.plan:
        with bar:
            plan = plan_command.search(question, reaching, study)
        layout, outcome = plan.chosen.layout, plan.chosen.outcome
        plan_command.show(question, decode, reaching, plan, console)
    else:
        with bar:
            outcome = study.run(layout)
        console.print(_table(question, layout, outcome))
    if question.reports:
        with bar:
            report.write(question.reports, study, layout, outcome)
        console.print(f"Curves: {', '.join(map(str, question.reports))}", markup=False)


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
        ("refused at once", f"{measured.refused:,}"),
        ("let in and late", f"{measured.late:.1%}"),
        ("failed", f"{measured.failed:,}"),
        ("busy, least to most", f"{min(outcome.busy.values()):.0%} to "
                                f"{max(outcome.busy.values()):.0%}"),
    ]  # fmt: skip
    before = f", {question.routers} routers before them" if question.routers > 1 else ""
    table = Table(
        title=f"{question.policy} on {in_words(layout)}: {question.model}{before}",
        show_header=False,
    )
    for row in rows:
        table.add_row(*row)
    return table


def _quantiles(latencies: Latencies) -> str:
    if not latencies.count:
        return "-"
    values = [latencies.mean_s, *(latencies.quantile_s(share) for share in (0.5, 0.9, 0.99))]
    return ", ".join(in_units(value) for value in values)
