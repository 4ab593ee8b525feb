"""What the router process tells over HTTP, on UNIT_DIR/router.sock: health, metrics, records.

Loaded after the request path is up: nothing here is needed to serve a request.
"""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from aiohttp import web

from router.core.workers import Worker
from router.report import Report


async def serve(report: Report, path: Path) -> web.AppRunner:
    """Serve until the runner's `cleanup`."""
    api = HttpApi(report)
    app = web.Application()
    app.add_routes(
        [
            web.get("/health", api.health),
            web.get("/metrics", api.metrics),
            web.get("/requests/{id}", api.request),
            web.get("/workers", api.workers),
            web.get("/state", api.state),
        ]
    )
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)  # The process before left its name.
    await web.UnixSite(runner, str(path)).start()
    return runner


class HttpApi:
    """The routes."""

    def __init__(self, report: Report) -> None:
        self._report = report

    async def health(self, _: web.Request) -> web.Response:
        """200 once a request can be served."""
        reasons = self._report.core.not_healthy_because()
        if reasons:
            return web.json_response({"status": "unavailable", "reasons": reasons}, status=503)
        return web.json_response({"status": "ok"})

    async def metrics(self, _: web.Request) -> web.Response:
        """The router's and every worker's figures."""
        return web.Response(
            body=self._report.exposition(),
            headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"},
        )

    async def request(self, request: web.Request) -> web.Response:
        """A request's decisions and why."""
        story = self._report.core.book.find(request.match_info["id"])
        if story is None:
            return web.json_response(
                {"error": {"message": f"No request {request.match_info['id']} is known here."}},
                status=404,
            )
        return web.json_response(story.as_json(self._report.wall_offset_s()))

    async def workers(self, _: web.Request) -> web.Response:
        """The workers as this router sees them."""
        addresses = self._report.addresses()
        core = self._report.core
        workers = [
            _describe(worker, addresses.get(worker.id), core.moves.index.blocks_of(worker.id))
            for worker in core.pool
        ]
        return web.json_response({"workers": workers})

    async def state(self, _: web.Request) -> web.Response:
        """This process, and what is under way."""
        moves = self._report.core.moves
        states = Counter(str(request.state) for request in moves.requests.values())
        counts = {each.name: getattr(moves.counts, each.name) for each in fields(moves.counts)}
        answer = {**self._report.identity(), "under_way": states, "counts": counts}
        return web.json_response(answer)


def _describe(worker: Worker, address: str | None, indexed_blocks: int) -> dict[str, Any]:
    return {
        "id": worker.id,
        "role": worker.role,
        "incarnation": worker.incarnation,
        "state": worker.state,
        "address": address,
        "load": asdict(worker.load),
        "reserved": {
            "prefill_tokens": worker.reserved_prefill_tokens,
            "requests": worker.reserved_requests,
        },
        "kv_index_blocks": indexed_blocks,
    }
