"""The `baton` command. Heavy modules are imported inside the commands, so that help is quick."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from protos.errors import BatonError, ConfigError

app = typer.Typer(
    name="baton",
    help="Serve a large language model from prefill and decode workers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

ConfigFile = Annotated[Path | None, typer.Option("--config", help="YAML file.")]
Url = Annotated[str, typer.Option("--url", help="Where Baton answers.")]
_DEFAULT_URL = "http://127.0.0.1:8000"


@app.command()
def serve(
    config: ConfigFile = None,
    model: Annotated[
        str | None, typer.Option(help="Directory or hub id; default: a tiny model.")
    ] = None,
    prefill: Annotated[int | None, typer.Option(help="Number of prefill workers.")] = None,
    decode: Annotated[int | None, typer.Option(help="Number of decode workers.")] = None,
    engine: Annotated[str | None, typer.Option(help="vllm or simulated.")] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on.")] = None,
    grpc_port: Annotated[int | None, typer.Option(help="Port of the gRPC API.")] = None,
) -> None:
    """Serve on this machine until Ctrl-C."""
    flags = {
        "model.path": model,
        "prefill.replicas": prefill,
        "decode.replicas": decode,
        "engine": engine,
        "http.host": host,
        "http.port": port,
        "grpc.port": grpc_port,
    }

    def work() -> None:
        from cluster.config import load
        from cluster.serve import serve as run

        raise typer.Exit(run(load(config, os.environ, flags)))

    _report_errors("serve", work)


@app.command()
def status(url: Url = _DEFAULT_URL) -> None:
    """Show pools and workers."""

    def work() -> None:
        from rich.console import Console

        from cluster.status import show_status

        show_status(url, Console(highlight=False))

    _report_errors("status", work)


@app.command()
def explain(
    request_id: Annotated[
        str,
        typer.Argument(metavar="ID", help="X-Request-Id of the answer, or its id: cmpl-…"),
    ],
    url: Url = _DEFAULT_URL,
    as_json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
) -> None:
    """Show what was decided for a request, why, and what came of it."""

    def work() -> None:
        from rich.console import Console

        from cluster.explain import explain as run

        # Wide enough for its tables where there is no terminal to fit them into.
        width = None if sys.stdout.isatty() else 120
        run(url, request_id, Console(highlight=False, soft_wrap=True, width=width), as_json)

    _report_errors("explain", work)


@app.command()
def replay(
    recording: Annotated[
        Path, typer.Argument(metavar="FILE", help="A file that `router.record_events` wrote.")
    ],
) -> None:
    """Check that a router's recorded events give the commands that they gave live."""

    def work() -> None:
        from rich.console import Console

        from cluster.replay import replay_file

        if not replay_file(recording, Console(highlight=False, soft_wrap=True)):
            raise typer.Exit(1)

    _report_errors("replay", work)


@app.command()
def simulate(
    workload: Annotated[
        str,
        typer.Argument(metavar="TRACE", help="A trace file, or e.g. poisson, sessions, agents."),
    ],
    gpus: Annotated[int, typer.Option(help="GPUs of the simulated cluster; of a plan: most.")] = 8,
    model: Annotated[str, typer.Option(help="Model and GPUs of an engine.")] = "llama-3.1-8b-h100",
    prefill: Annotated[
        int | None, typer.Option(help="Engines that only compute prompts; default: none.")
    ] = None,
    prefill_model: Annotated[
        str | None, typer.Option(help="Of those, if they run on more or fewer GPUs.")
    ] = None,
    policy: Annotated[str, typer.Option(help="Baton's placement, or a peer's.")] = "baton",
    slo: Annotated[str, typer.Option(help="Time to first token, per output token.")] = "2s,50ms",
    rate: Annotated[
        float | None, typer.Option(min=0.001, help="Requests/s; default: the trace's own.")
    ] = None,
    minutes: Annotated[float, typer.Option(min=0.01, help="So much of it.")] = 20.0,
    seed: Annotated[int, typer.Option(min=0, help="Of workload and ties.")] = 0,
    plan: Annotated[
        bool, typer.Option("--plan", help="Find the cheapest layout that meets the SLO.")
    ] = False,
    attainment: Annotated[
        float | None,
        typer.Option(min=0.01, max=1.0, help="Of a plan: share of requests; default 0.9."),
    ] = None,
    routers: Annotated[
        int, typer.Option(min=1, help="Before the same workers; requests are spread by chance.")
    ] = 1,
    reports: Annotated[
        list[Path] | None, typer.Option("--report", help="Write curves: to NAME.html or NAME.png.")
    ] = None,
) -> None:
    """Run a trace on a simulated cluster of GPUs."""

    def work() -> None:
        from rich.console import Console

        from simulator.cli import simulate as run
        from simulator.question import Question

        question = Question(
            workload, model, prefill_model, gpus, prefill, policy, slo, rate, minutes, seed,
            tuple(reports or ()), plan, attainment, routers,
        )  # fmt: skip
        run(question, Console(highlight=False), Console(stderr=True))

    _report_errors("simulate", work)


@app.command("config")
def show_config(
    config: ConfigFile = None,
    reference: Annotated[
        bool, typer.Option("--reference", help="Print docs/configuration.md instead.")
    ] = False,
) -> None:
    """Show the configuration in effect."""

    def work() -> None:
        if reference:
            from cluster.config_reference import reference as page

            sys.stdout.write(page())
            return
        import yaml

        from cluster.config import load

        values: dict[str, Any] = load(config, os.environ, {}).model_dump()
        sys.stdout.write(yaml.safe_dump(values, sort_keys=False))

    _report_errors("config", work)


def _report_errors(command: str, work: Callable[[], None]) -> None:
    """Errors that were raised on purpose become a sentence each; bad input ends with code 2."""
    try:
        work()
    except BatonError as error:
        for line in str(error).splitlines():
            print(f"baton {command}: {line}", file=sys.stderr)
        raise typer.Exit(2 if isinstance(error, ConfigError) else 1) from None
