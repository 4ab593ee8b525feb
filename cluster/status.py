"""`baton status`: pools and workers, readable."""

from __future__ import annotations

import time

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from cluster.client import ask


def show_status(address: str, console: Console) -> None:
    """Pools and workers. Raises BatonError if nobody answers."""
    cluster = ask(address, "/cluster")
    workers = ask(address, "/cluster/workers")["workers"]
    pools = ", ".join(
        f"{role} {pool['ready']} of {pool['wanted']}" for role, pool in cluster["pools"].items()
    )
    names = ", ".join(cluster["model"]["served_names"])
    console.print(f"{names} on {cluster['engine']}, up {_duration(cluster['uptime_s'])}")
    console.print(f"ready: {pools}; routers: {cluster['routers']}")
    table = Table(box=SIMPLE_HEAD)
    for heading in ("worker", "state", "since", "pid", "running", "waiting", "KV", "restarts"):
        table.add_column(heading, no_wrap=True)
    for worker in workers:
        load = worker["load"] or {}
        used, total = load.get("kv_blocks_used"), load.get("kv_blocks_total")
        table.add_row(
            worker["id"],
            worker["state"],
            _duration(time.time() - worker["since"]),
            _text(worker["pid"]),
            _text(load.get("running")),
            _text(load.get("waiting")),
            "-" if used is None else f"{used}/{total}",
            _text(worker["restarts"]),
        )
    console.print(table)
    for worker in workers:
        if worker["last_failure"]:
            console.print(f"{worker['id']}: the one before: {worker['last_failure']}")


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"


def _text(value: object) -> str:
    return "-" if value is None else str(value)
