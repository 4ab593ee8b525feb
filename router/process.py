"""The router process: `python -m router.process UNIT_DIR [--standby]`.

On standby it loads everything and waits for a byte on its standard input: its predecessor's end.

A thin shell around `RouterCore`: messages become events, commands become messages. It must be back
within a moment after its death, so it imports little, and what a request does not need, last.
Boundary: it decides nothing. When its anchor's link ends, so does it; the anchor starts the next.
"""

from __future__ import annotations

import asyncio
import gc
import importlib
import logging
import os
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import msgspec
import uvloop

from protos import anchor_link, enginecore, membership
from protos.enginecore import EngineRequest
from protos.ids import Incarnation, RequestKey, TicketId, WorkerId, request_key
from router import anchor_client
from router.core import admission
from router.core.events import (
    NO_TERMS,
    Command,
    Demand,
    End,
    Ended,
    Event,
    FrontGone,
    MemberFacts,
    MembershipChanged,
    RequestAborted,
    RequestArrived,
    RequestRecovered,
    Role,
    SnapshotTaken,
    Terms,
    Tick,
    TicketAsked,
    TicketGranted,
    TicketRefused,
)
from router.core.gate import Promises
from router.core.moves import CoreSettings
from router.edge_log import EdgeLog
from router.live_core import Origin, make_core
from router.metrics import LinkBytes, Measured
from router.recorder import Recorder
from router.report import Report
from router.settings import RouterSettings, UnitPaths, load_router
from router.ticket_mint import Ticket, TicketMint
from router.tickets import TicketConnection, answer, answer_line, reason_line
from router.worker_links import WorkerLinks
from router.worker_messages import ToWorker

_log = logging.getLogger("router")

TICK_S: Final = 0.1
LONG_PAUSE_S: Final = 1.0
"""Without a look around: worth a line, since the edge waits no longer than 3 s for a ticket."""
HTTP_AFTER_S: Final = 0.1
DEFECT_STATUS: Final = 70


class RouterProcess:
    """Everything that the process holds."""

    def __init__(self, paths: UnitPaths, settings: RouterSettings) -> None:
        self._paths = paths
        self._settings = settings
        self._incarnation = time.time_ns()
        core_settings = CoreSettings(
            settings.expect_prefill, settings.local_prefill_max_tokens, settings.kept_records,
            settings.max_requests, Promises(settings.promised_ttft_s, settings.promised_tpot_s),
            settings.index_block_tokens,
        )  # fmt: skip
        origin = Origin(core_settings, settings.joint, tie_break_seed=self._incarnation)
        self.core = make_core(origin)
        self._recorder = _recorder(settings, self._incarnation, origin)
        self._cached_as = admission.CachedAs("", settings.index_block_tokens)
        self._mint = TicketMint(settings.link_token, settings.ticket_ttl_s)
        self._measured = Measured()
        self._fronts_told = _FrontsTold()
        self._membership: membership.Membership | None = None
        self._told_of_others: list[WorkerId] = []
        """Members of other weights than those served."""
        self._link_bytes = LinkBytes()
        self._links = WorkerLinks(
            settings, self._incarnation, self, self._on_task_done, self._link_bytes
        )
        self._edge_log = EdgeLog(paths.edge_log_socket, self.feed, self._link_bytes)
        self._worker_values: dict[str, Mapping[str, float]] = {}
        self._anchor: anchor_client.AnchorClient | None = None
        self._took_over = False
        self._underway: list[RequestRecovered] = []
        """Of the parts of the snapshot that have come."""
        self._servers: list[object] = []
        """Kept from being collected."""
        self._exit: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    async def run(self) -> int:
        """Serve until SIGTERM or the anchor's end; returns the exit status."""
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(self._on_defect)
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._end, 0)
        self._read_membership()
        await self._listen()
        anchor = await anchor_client.connect(self._paths.anchor_socket, self, self._link_bytes)
        self._anchor = anchor
        anchor.send(anchor_link.Hello(self._incarnation, os.getpid()))
        tasks = [asyncio.create_task(self._tick()), asyncio.create_task(self._serve_http())]
        for task in tasks:
            task.add_done_callback(self._on_task_done)
        try:
            return await self._exit
        finally:
            if self._recorder is not None:
                self._recorder.close()

    async def _listen(self) -> None:
        await self._edge_log.listen()
        path = self._paths.ticket_socket
        path.unlink(missing_ok=True)
        server = await asyncio.get_running_loop().create_unix_server(
            lambda: TicketConnection(self._answer), str(path), backlog=4096
        )
        self._servers.append(server)

    async def _serve_http(self) -> None:
        # Off the loop, and after the streams go on: loading it takes longer than all the rest.
        await asyncio.sleep(HTTP_AFTER_S)
        http_api = await asyncio.to_thread(_load_http_api)
        report = Report(
            self.core, self._settings, self._incarnation, self._measured, self._worker_values,
            self._links, self._edge_log, self._link_bytes,
        )  # fmt: skip
        self._servers.append(await http_api.serve(report, self._paths.router_socket))
        gc.collect()
        gc.freeze()

    async def _tick(self) -> None:
        ticked_s = time.monotonic()
        while True:
            await asyncio.sleep(TICK_S)
            before_s, ticked_s = ticked_s, time.monotonic()
            if ticked_s - before_s > LONG_PAUSE_S:
                _log.warning("the loop stood still for %.1f s", ticked_s - before_s)
            if self._recorder is not None:
                self._recorder.flush()
            self._read_membership()
            self._links.check_silence(asyncio.get_running_loop().time())
            self.feed(Tick())

    # Events in, commands out

    def feed(self, event: Event) -> None:
        """Let the core decide, and do what it says."""
        for command in self._handle(event):
            self._carry_out(command)

    def _handle(self, event: Event) -> list[Command]:
        now_s = time.monotonic()
        if self._recorder is None:
            return self.core.handle(now_s, event)
        commands = None
        try:
            commands = self.core.handle(now_s, event)
        finally:
            self._recorder.record(now_s, event, commands)
        return commands

    def _carry_out(self, command: Command) -> None:
        if isinstance(command, anchor_link.Deliver):
            assert self._anchor is not None
            self._anchor.deliver(command)
        elif isinstance(command, ToWorker):
            self._links.send(command)
        elif isinstance(command, Ended):
            self._measured.observe(command)
            if command.end is End.FAILED:
                _log.warning("request %s failed: %s", command.key, command.error)

    def _answer(self, line: str) -> bytes:
        """A line of the edge."""
        kind, _, ticket = line.partition("\t")
        if kind == "why":
            return reason_line(self.core.book.find(ticket))
        return answer_line(answer(line, self._mint, time.time(), self._decide_ticket))

    def _decide_ticket(self, question: TicketAsked) -> TicketGranted | TicketRefused:
        *others, decided = self._handle(question)
        for command in others:  # A request's turn has come meanwhile.
            self._carry_out(command)
        assert isinstance(decided, TicketGranted | TicketRefused)
        return decided

    # From the anchor

    def on_anchor_message(self, message: anchor_link.FromAnchor) -> None:
        """Requests come, are aborted, or were under way."""
        if isinstance(message, anchor_link.Add):
            self._add(message)
        elif isinstance(message, anchor_link.Abort):
            for request_id in message.request_ids:
                self.feed(RequestAborted(request_key(message.front, request_id)))
        elif isinstance(message, anchor_link.FrontGone):
            self.feed(FrontGone(message.front))
        elif isinstance(message, anchor_link.Snapshot):
            self._take_over(message)

    def on_anchor_lost(self, why: str) -> None:
        """There is nobody left to serve."""
        _log.info("the anchor's link ended: %s", why)
        self._end(1)

    def _add(self, message: anchor_link.Add) -> None:
        key = request_key(message.front, message.request_id)
        try:
            request = enginecore.decode_request(message.payload)
        except msgspec.DecodeError as error:
            self._refuse(message.front, message.request_id, key, error)
            return
        ticket, deadline_s, terms = _agreed(self._mint.find(request, time.time()))
        demand = self._read(request, terms)
        self.feed(RequestArrived(key, demand, ticket, deadline_s, terms))

    def _read(self, request: EngineRequest, terms: Terms) -> Demand:
        own = self._settings.share_prefixes == "tenant"
        return admission.read(request, self._cached_as, terms.tenant if own else None)

    def _take_over(self, snapshot: anchor_link.Snapshot) -> None:
        for each in snapshot.underway:
            key = request_key(each.front, each.request_id)
            try:
                request = enginecore.decode_request(each.payload)
            except msgspec.DecodeError as error:
                self._refuse(each.front, each.request_id, key, error, each.given_tokens)
                continue
            ticket, deadline_s, terms = _agreed(self._mint.find(request, time.time(), late=True))
            demand = self._read(request, terms)
            self._underway.append(
                RequestRecovered(key, demand, ticket, each.given_tokens, deadline_s, terms)
            )
        if snapshot.more:
            return
        underway, self._underway = self._underway, []
        self.feed(SnapshotTaken(tuple(underway)))
        self._took_over = True
        if self._membership is not None:
            self._links.update(self._membership)
        _log.info("took over %d requests under way", len(underway))

    def _refuse(
        self, front: int, request_id: str, key: RequestKey, error: Exception, position: int = 0
    ) -> None:
        """It can't even be read."""
        assert self._anchor is not None
        _log.warning("request %s can't be read: %s", key, error)
        payload = enginecore.error_output(request_id)
        delivery = anchor_link.Delivery(request_id, position, 0, True, payload)
        self._anchor.send(anchor_link.Deliver(front, [delivery]))

    # From the workers

    def _read_membership(self) -> None:
        read = membership.load(self._paths.membership)
        if read == self._membership:
            return
        self._membership = read
        facts = [
            MemberFacts(
                WorkerId(each.worker_id),
                Role(each.role),
                each.draining,
                Incarnation(each.incarnation),
                each.weights,
            )
            for each in read.members
        ]
        self.feed(MembershipChanged(tuple(facts)))
        self._note_weights()
        # Before the snapshot is in, what workers hold could not be understood.
        if self._took_over:
            self._links.update(read)

    def _note_weights(self) -> None:
        pool = self.core.pool
        self._cached_as = self._cached_as._replace(weights=pool.weights)
        others = pool.members_of_other_weights
        if others and others != self._told_of_others:
            _log.warning(
                "%s: other weights than those served (%s), so no requests until all workers that "
                "have these are gone or drain", ", ".join(others), pool.weights,
            )  # fmt: skip
        self._told_of_others = others

    def on_welcome(self, worker: WorkerId, ready_payload: bytes) -> None:
        """Fronts can be told what their engine is."""
        payload = self._fronts_told.update(ready_payload, self.core.pool.max_model_len_tokens)
        if payload is not None and self._anchor is not None:
            self._anchor.send(anchor_link.Ready(payload))

    def on_metrics(self, worker: WorkerId, values: Mapping[str, float]) -> None:
        """Kept as they are until someone asks."""
        self._worker_values[worker] = values

    # Ends

    def _end(self, status: int) -> None:
        if not self._exit.done():
            self._exit.set_result(status)

    def _on_task_done(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.critical("a defect ends this process", exc_info=error)
            self._end(DEFECT_STATUS)

    def _on_defect(self, _: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        # Going on with a state that is not understood could give a client wrong text; the next
        # process starts from what anchor and workers know.
        _log.critical("a defect ends this process: %s", context, exc_info=context.get("exception"))
        self._end(DEFECT_STATUS)


class _FrontsTold:
    """What fronts are told of their one engine: the first worker's words, the shortest context."""

    def __init__(self) -> None:
        self._payload = b""
        self._max_model_len_tokens: int | None = None

    def update(self, ready_payload: bytes, max_model_len_tokens: int | None) -> bytes | None:
        """What to tell them now, if it changed."""
        self._payload = self._payload or ready_payload
        if max_model_len_tokens in (None, self._max_model_len_tokens):
            return None
        self._max_model_len_tokens = max_model_len_tokens
        ready = enginecore.decode_ready(self._payload)
        ready.max_model_len = max_model_len_tokens
        return enginecore.encode(ready)


def _agreed(ticket: Ticket | None) -> tuple[TicketId | None, float | None, Terms]:
    """Its id, its deadline on the core's clock, and its terms."""
    if ticket is None:
        return None, None, NO_TERMS
    deadline_s = ticket.deadline_s
    if deadline_s is not None:
        deadline_s += time.monotonic() - time.time()
    return ticket.id, deadline_s, ticket.terms


def _recorder(settings: RouterSettings, incarnation: int, origin: Origin) -> Recorder | None:
    """What records this process's events, if that is wanted."""
    if settings.record_events is None:
        return None
    path = Path(settings.record_events) / f"{settings.router_id}-{incarnation}.events"
    try:
        return Recorder(path, settings.router_id, origin)
    except OSError as error:
        _log.error("no events are recorded: %s can't be created: %s", path, error)
        return None


def _load_http_api() -> ModuleType:
    return importlib.import_module("router.http_api")


async def _run(paths: UnitPaths, settings: RouterSettings) -> int:
    return await RouterProcess(paths, settings).run()


def _show_name(name: str) -> None:
    """In `ps` and `top`: 15 characters at most."""
    Path("/proc/self/comm").write_text(name)


def main() -> None:
    """Run the router process of the unit that the command line names."""
    directory, *flags = sys.argv[1:] or [""]
    if not directory or flags not in ([], ["--standby"]):
        sys.exit("usage: python -m router.process UNIT_DIR [--standby]")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    os.umask(0o077)
    # Requests live for long and hold no cycles: full collections would only stop the streams.
    gc.set_threshold(50_000, 20, 100)
    if flags:
        _load_http_api()
        gc.collect()
        gc.freeze()
        _show_name("router-standby")
        if not os.read(0, 1):
            return  # Nobody needs it any more.
    _show_name("router")
    paths = UnitPaths(directory)
    status = uvloop.run(_run(paths, load_router(paths.router_settings)))
    # What is left are threads of libraries, which nothing needs to wait for.
    os._exit(status)


if __name__ == "__main__":
    main()
