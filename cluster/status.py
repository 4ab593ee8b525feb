"""`baton status` and `baton explain`: the operator API, readable."""

from __future__ import annotations

import json
import time
import urllib.error
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from cluster.ports import fetch
from protos.errors import BatonError

_LIMIT_S = 5.0


def show_status(address: str, console: Console) -> None:
    """Pools and workers. Raises BatonError if nobody answers."""
    cluster = _ask(address, "/cluster")
    workers = _ask(address, "/cluster/workers")["workers"]
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


def explain(address: str, request_id: str, console: Console) -> None:
    """A request's decisions and why. Raises BatonError if nobody knows it."""
    _print_value(_ask(address, f"/cluster/requests/{request_id}"), console, "")


def _print_value(value: Any, console: Console, indent: str) -> None:
    items = value.items() if isinstance(value, dict) else [("-", item) for item in value]
    for key, item in items:
        label = key if key == "-" else f"{key}:"
        if isinstance(item, dict | list) and item and len(json.dumps(item)) > 80:
            console.print(f"{indent}{label}", markup=False)
            _print_value(item, console, indent + "  ")
        else:
            text = item if isinstance(item, str) else json.dumps(item)
            console.print(f"{indent}{label} {text}", markup=False)


def _ask(address: str, path: str) -> Any:
    try:
        return fetch(address.rstrip("/") + path, _LIMIT_S)
    except urllib.error.HTTPError as error:
        raise BatonError(_message_of(error, f"{address}{path}")) from None
    except (OSError, ValueError):
        raise BatonError(
            f"no Baton answers at {address}: start one with `baton serve`, or name another "
            "address with --url."
        ) from None


def _message_of(error: urllib.error.HTTPError, where: str) -> str:
    try:
        message: str = json.loads(error.read())["error"]["message"]
    except (OSError, ValueError, KeyError, TypeError):
        return f"{where} answered with status {error.code}."
    return message


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"


def _text(value: object) -> str:
    return "-" if value is None else str(value)
