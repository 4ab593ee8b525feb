"""The operator API, on a Unix socket behind the edge: who serves, how it goes, and why.

Boundary: reads what the supervisor knows and asks routers on their own sockets; changes nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

import aiohttp
from aiohttp import web

from cluster.pools import Slot
from cluster.state import ClusterState, Unit
from engine.spec import Role
from protos.ids import WorkerId
from router.core.records import REFUSED_SHARE
from router.settings import KEPT_RECORDS, UnitPaths

_ROUTER_LIMIT_S: Final = 2.0
ROLES: Final[tuple[Role, ...]] = ("prefill", "decode")


class AdminApi:
    """Routes of the operator API."""

    def __init__(self, state: ClusterState) -> None:
        self._state = state
        self._runner: web.AppRunner | None = None

    async def listen(self, path: Path) -> None:
        """Serve on the socket; one left behind by an earlier supervisor is replaced."""
        app = web.Application(middlewares=[_errors_as_json])
        app.router.add_get("/cluster", self._cluster)
        app.router.add_get("/cluster/workers", self._workers)
        app.router.add_get("/cluster/routers", self._routers)
        app.router.add_get("/cluster/requests/{id}", self._request)
        # Kept: the event loop closes a server that nobody refers to.
        self._runner = runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        await web.UnixSite(runner, str(path)).start()
        os.chmod(path, 0o600)

    async def _cluster(self, _: web.Request) -> web.Response:
        state = self._state
        settings = state.settings
        return web.json_response(
            {
                "baton_version": baton_version(),
                "uptime_s": round(time.time() - state.started_s, 1),
                "engine": settings.config.engine,
                "model": {"path": settings.model, "served_names": settings.served_names},
                "pools": {role: self._pool(role) for role in ROLES},
                "routers": len(state.units),
                "membership_version": state.version,
            }
        )

    def _pool(self, role: Role) -> dict[str, Any]:
        slots = [slot for slot in self._state.pools.slots() if slot.role == role]
        failures = [f"{slot.worker_id}: {slot.reason}" for slot in slots if slot.reason]
        return {
            "wanted": self._state.pools.wanted(role),
            "ready": self._state.pools.ready(role),
            "last_failures": failures,
        }

    async def _workers(self, _: web.Request) -> web.Response:
        seen: dict[str, dict[str, Any]] = {}
        for answer in await self._ask_routers("/workers"):
            for worker in (answer or {}).get("workers", []):
                seen.setdefault(worker["id"], worker)
        workers = [
            self._worker(slot, seen.get(slot.worker_id, {})) for slot in self._state.pools.slots()
        ]
        return web.json_response({"workers": workers})

    def _worker(self, slot: Slot, seen: dict[str, Any]) -> dict[str, Any]:
        """`seen` by a router."""
        address = self._state.address(WorkerId(slot.worker_id))
        since_s = time.time() - (time.monotonic() - slot.since_s)
        return {
            "id": slot.worker_id,
            "role": slot.role,
            "state": "dead-being-replaced" if slot.state == "dead" else slot.state,
            "since": round(since_s, 3),
            "restarts": slot.restarts,
            "last_failure": slot.reason or None,
            "node": address.node if address else None,
            "pid": address.pid if address else None,
            "engine_pid": address.engine_pid if address else None,
            "address": address.address if address else None,
            "incarnation": address.incarnation if address else None,
            "weights": address.weights if address else None,
            "seen_by_router": seen.get("state"),
            "load": seen.get("load"),
            "kv_index_blocks": seen.get("kv_index_blocks"),
        }

    async def _routers(self, _: web.Request) -> web.Response:
        units = self._state.units.values()
        return web.json_response({"routers": [_describe_unit(unit) for unit in units]})

    async def _request(self, request: web.Request) -> web.Response:
        request_id = request.match_info["id"]
        for answer in await self._ask_routers(f"/requests/{quote(request_id, safe='')}"):
            if answer is not None:
                return web.json_response(answer)
        message = (
            f"no router knows a request {request_id}: name the X-Request-Id of a response, or its "
            f"id, such as cmpl-… or chatcmpl-…; each router keeps the latest {KEPT_RECORDS:,}, and "
            f"{round(KEPT_RECORDS * REFUSED_SHARE):,} that it refused, until it restarts."
        )
        return _error(404, message, "id")

    async def _ask_routers(self, path: str) -> list[Any]:
        """Each router's answer; None of one that does not know or is away."""
        units = list(self._state.units.values())
        return await asyncio.gather(*(_ask_router(unit, path) for unit in units))


async def _ask_router(unit: Unit, path: str) -> Any:
    connector = aiohttp.UnixConnector(str(UnitPaths(unit.directory).router_socket))
    limit = aiohttp.ClientTimeout(_ROUTER_LIMIT_S)
    try:
        async with (
            aiohttp.ClientSession(connector=connector, timeout=limit) as session,
            session.get(f"http://router{path}") as response,
        ):
            return await response.json() if response.status == 200 else None
    except (aiohttp.ClientError, TimeoutError, ValueError):
        return None


def _describe_unit(unit: Unit) -> dict[str, Any]:
    """From the file that the anchor keeps: pids of itself and of what it runs."""
    try:
        state = json.loads(UnitPaths(unit.directory).anchor_state.read_bytes())
    except (OSError, ValueError):
        state = {}
    router = state.get("router", {}).get("pid")
    edge = state.get("edge", {}).get("pid")
    fronts = [front["pid"] for front in state.get("fronts", [])]
    if not state:
        condition = "starting"
    else:
        condition = "running" if all([router, edge, *fronts]) else "restarting"
    return {
        "id": unit.router_id,
        "node": unit.node,
        "state": condition,
        "pid": router,
        "fronts": fronts,
        "edge": edge,
        "anchor": state.get("anchor", {}).get("pid"),
        "seen": round(unit.seen_s, 3),
    }


@web.middleware  # type: ignore[untyped-decorator]
async def _errors_as_json(request: web.Request, handler: Any) -> web.StreamResponse:
    try:
        response: web.StreamResponse = await handler(request)
    except web.HTTPMethodNotAllowed as error:
        allowed = ", ".join(sorted(error.allowed_methods))
        return _error(405, f"{request.method} is not possible here, only {allowed}", None)
    except web.HTTPNotFound:
        return _error(404, f"the operator API has no {request.path}", None)
    return response


def _error(status: int, message: str, param: str | None) -> web.Response:
    kinds = {404: "not_found_error", 405: "invalid_request_error"}
    body = {"message": message, "type": kinds[status], "param": param, "code": status}
    return web.json_response({"error": body}, status=status)


def baton_version() -> str:
    """Of the installed package; of a bare checkout, `0`."""
    try:
        return version("baton-serve")
    except PackageNotFoundError:
        return "0"
