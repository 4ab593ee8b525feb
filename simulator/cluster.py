"""The simulated cluster: routers' cores and simulated engines on one virtual clock.

A router's core and its policy are the live ones; engines are `engine.simulated`; between them are
links that take their time. Of several routers each gets the requests that chance gives it; all see
the same workers, which tell each what the others have there, as live ones do: with every step, and
soon after a change. One event after another, in the order of their times and, at one time, of their
making: the same inputs give the same run.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Final, Protocol, runtime_checkable

from engine.base import OTHERS_INTERVAL_S
from engine.profiles import EngineProfile
from protos.ids import RequestKey, TicketId, WorkerId
from router.core.costs import Slo
from router.core.events import (
    AbortOn,
    CacheReported,
    Command,
    Demand,
    Ended,
    Event,
    LearnedElsewhere,
    MemberFacts,
    MembershipChanged,
    RequestArrived,
    Reserve,
    Role,
    Shape,
    SnapshotTaken,
    StepReported,
    Submit,
    TellLearned,
    TellQueued,
    Terms,
    Tick,
    TicketAsked,
    TicketRefused,
)
from router.core.gate import NOTHING_PROMISED, Promises
from router.core.moves import CoreSettings
from router.core.placement import Placement, View
from router.core.router import RouterCore
from simulator.traces import BLOCK_TOKENS, TracedRequest
from simulator.worker import INCARNATION, Asked, SimulatedWorker

TICK_S: Final = 0.5
_PATH: Final = "/v1/completions"
_BYTES_PER_TOKEN: Final = 4.0
_TICKETS: Final = 1000
"""More are not on their way through fronts at once; their stories tell the routes."""


@dataclass(frozen=True, slots=True)
class Layout:
    """What a cluster is made of."""

    profile: EngineProfile
    prefill: int
    decode: int
    block_tokens: int = BLOCK_TOKENS
    """Of the engines and of the KV index; divides the traces' blocks."""
    link_s: float = 0.0005
    """From a router to a worker, and back."""
    front_in_s: float = 0.0
    """From a client to its router: edge, tokenising front, anchor."""
    front_out_s: float = 0.0
    """Back to the client."""
    prefill_profile: EngineProfile | None = None
    """Of the prefill pool, if its engines are others."""
    contention: float | None = None
    """Of engines that share cores or a GPU: as many times as long a step takes that begins while
    another computes."""

    def profile_of(self, role: Role) -> EngineProfile:
        """Of a pool's engines. A transfer is as fast as the slower of its ends."""
        if (other := self.prefill_profile) is None:
            return self.profile
        own = other if role is Role.PREFILL else self.profile
        link_bytes_s = min(each.gpus * each.link_bytes_s for each in (other, self.profile))
        return replace(own, link_bytes_s=link_bytes_s / own.gpus)

    @property
    def gpus(self) -> int:
        """Of all engines."""
        prefill_gpus = self.prefill * self.profile_of(Role.PREFILL).gpus
        return prefill_gpus + self.decode * self.profile.gpus


@runtime_checkable
class Refusing(Protocol):
    """A policy that turns requests away itself, once their prompts are known: a router's own gate
    knows less when it decides."""

    def refuses(self, now_s: float, view: View, shape: Shape, slo: Slo) -> bool:
        """Whether it would miss what is promised."""
        ...


class Cluster:
    """Routers, one for each policy object, and their workers. `on_end` is told of every request
    that was let in, with times as its client sees them."""

    def __init__(
        self,
        layout: Layout,
        placements: Sequence[Placement],
        on_end: Callable[[Ended], None],
        on_refusal: Callable[[], None] = lambda: None,
        promises: Promises = NOTHING_PROMISED,
    ) -> None:
        self.now_s = 0.0
        self.under_way = 0
        self.prompt_tokens = 0
        """Of all that were let in."""
        self.ended_s = 0.0
        """When the last request did."""
        self._layout = layout
        self._front_s = layout.front_in_s + layout.front_out_s
        self._on_end = on_end
        self._on_refusal = on_refusal
        self._bodies, spread = Random(0), Random(0)
        self.router_of: Callable[[TracedRequest], int] = lambda _: spread.randrange(
            len(self.routers)
        )
        """To which router a request goes: to any, by chance."""
        self._events: list[tuple[float, int, Callable[[float], None]]] = []
        self._made = 0
        self._asked: dict[RequestKey, Asked] = {}
        settings = CoreSettings(
            expect_prefill=layout.prefill > 0,
            local_prefill_max_tokens=0,
            kept_records=_TICKETS,
            max_requests=1 << 30,
            index_block_tokens=layout.block_tokens,
            promises=promises,
            fetches_prefixes=True,
        )
        self.routers = [RouterCore(settings, placement) for placement in placements]
        self._refusing = [each if isinstance(each, Refusing) else None for each in placements]
        self._slo = Slo(promises.ttft_s or math.inf, promises.tpot_s or math.inf)
        manifests: dict[bytes, dict[str, object]] = {}
        names = [(Role.PREFILL, n) for n in range(layout.prefill)]
        names += [(Role.DECODE, n) for n in range(layout.decode)]
        self.workers = {
            worker.id: worker
            for worker in (
                SimulatedWorker(
                    WorkerId(f"{role}-{n}"),
                    role,
                    layout.profile_of(role),
                    layout.block_tokens,
                    manifests,
                )
                for role, n in names
            )
        }
        self._due_s: dict[WorkerId, float | None] = dict.fromkeys(self.workers)
        self._tells_s: dict[WorkerId, float] = dict.fromkeys(self.workers, -math.inf)
        """When each tells, or last told, of others' work between steps."""
        for router in range(len(self.routers)):
            self._start(router)

    def run(
        self, requests: Iterable[TracedRequest], enough: Callable[[], bool] = lambda: False
    ) -> None:
        """Serve a trace to its end, or until it is enough."""
        arrivals = enumerate(requests)
        self._next_arrival(arrivals)
        self._at(TICK_S, self._tick)
        events = self._events
        while events and not enough():
            self.now_s, _, act = heapq.heappop(events)
            act(self.now_s)

    def _start(self, router: int) -> None:
        facts = tuple(
            MemberFacts(each.id, each.role, False, INCARNATION, "")
            for each in self.workers.values()
        )
        self._feed(router, MembershipChanged(facts))
        self._feed(router, SnapshotTaken(()))
        for worker in self.workers.values():
            self._feed(router, worker.up())
            self._feed(router, worker.cache())

    def _at(self, time_s: float, act: Callable[[float], None]) -> None:
        self._made += 1
        heapq.heappush(self._events, (time_s, self._made, act))

    # Requests

    def _next_arrival(self, arrivals: Iterator[tuple[int, TracedRequest]]) -> None:
        item = next(arrivals, None)
        self._arriving = item is not None
        if item is None:
            return
        number, request = item

        def arrive(now_s: float) -> None:
            self._next_arrival(arrivals)
            self._arrive(RequestKey(f"0:{number}"), request)

        self._at(request.arrival_s, arrive)

    def _arrive(self, key: RequestKey, request: TracedRequest) -> None:
        self.under_way += 1
        hashes = prompt_hashes(request, self._layout.block_tokens)
        self._asked[key] = Asked(request.input_tokens, request.output_tokens, hashes)
        router = self.router_of(request)
        shape = Shape(request.input_tokens, request.max_tokens, addresses=hashes)
        if self._policy_refuses(router, shape):
            self._refused(key)
            return
        # The output's length is nobody's to know, but for its limit.
        ticket = TicketId(key)
        terms = Terms(body_bytes=self._body_bytes(request), tenant=request.client)
        asked = TicketAsked(ticket, "POST", _PATH, terms)
        *others, decided = self.routers[router].handle(self.now_s, asked)
        for command in others:
            self._obey(router, command)
        if isinstance(decided, TicketRefused):
            self._refused(key)
            return
        self.prompt_tokens += request.input_tokens
        arrived = RequestArrived(key, Demand(shape, b""), ticket, terms=terms)
        if self._layout.front_in_s:
            self._at(self.now_s + self._layout.front_in_s, lambda _: self._feed(router, arrived))
        else:
            self._feed(router, arrived)

    def _body_bytes(self, request: TracedRequest) -> int:
        """Texts differ in how many bytes a token is: before it is tokenised nobody knows."""
        return round(request.input_tokens * _BYTES_PER_TOKEN * self._bodies.lognormvariate(0, 0.15))

    def _policy_refuses(self, router: int, shape: Shape) -> bool:
        policy = self._refusing[router]
        if policy is None:
            return False
        return policy.refuses(self.now_s, self.routers[router].moves.view, shape, self._slo)

    def _refused(self, key: RequestKey) -> None:
        self.under_way -= 1
        del self._asked[key]
        self._on_refusal()

    # The routers

    def _feed(self, router: int, event: Event) -> None:
        for command in self.routers[router].handle(self.now_s, event):
            self._obey(router, command)

    def _obey(self, router: int, command: Command) -> None:
        if isinstance(command, TellLearned):
            self._pass_on(router, command)
        elif isinstance(command, Submit | Reserve | TellQueued | AbortOn):
            worker = self.workers[command.worker]

            def deliver(now_s: float) -> None:
                if isinstance(command, Submit):
                    asked, lent = self._asked[command.key], None
                    if (fetch := command.fetch) is not None:
                        hashes = asked.prompt_hashes[: fetch.blocks]
                        lent = self.workers[fetch.worker].lend(hashes)
                    worker.submit(now_s, router, command, asked, lent)
                elif isinstance(command, Reserve):
                    worker.reserve(router, command)
                elif isinstance(command, TellQueued):
                    worker.queue(now_s, router, command)
                else:
                    worker.abort(now_s, command)
                self._tell_others(now_s, worker)
                self._wake(now_s, worker)

            self._at(self.now_s + self._layout.link_s, deliver)
        elif isinstance(command, Ended):
            self.under_way -= 1
            self.ended_s = self.now_s
            del self._asked[command.key]
            self._on_end(self._as_its_client_sees(command))

    def _pass_on(self, router: int, command: TellLearned) -> None:
        """By way of a worker, which keeps nothing of it."""
        learned = LearnedElsewhere(str(router), command.learned)

        def arrive(_: float) -> None:
            for other in range(len(self.routers)):
                if other != router:
                    self._feed(other, learned)

        self._at(self.now_s + 2 * self._layout.link_s, arrive)

    def _as_its_client_sees(self, ended: Ended) -> Ended:
        ttft_s, front_s = ended.time_to_first_token_s, self._front_s
        if ttft_s is None or not front_s:
            return ended
        return replace(ended, time_to_first_token_s=ttft_s + front_s)

    def _tick(self, now_s: float) -> None:
        for router in range(len(self.routers)):
            self._feed(router, Tick())
        if self._arriving or self.under_way:
            self._at(now_s + TICK_S, self._tick)

    # The workers

    def _wake(self, now_s: float, worker: SimulatedWorker) -> None:
        due_s = worker.next_s(now_s, self._slowdown(worker))
        if due_s != self._due_s[worker.id]:
            self._due_s[worker.id] = due_s
            if due_s is not None:
                self._at(due_s, lambda at_s: self._due(at_s, worker))

    def _slowdown(self, worker: SimulatedWorker) -> float | None:
        """As many times as long as alone its next step takes; None if that never changes."""
        if (contention := self._layout.contention) is None:
            return None
        others = (each for each in self.workers.values() if each is not worker)
        return contention if any(each.computing for each in others) else 1.0

    def _due(self, now_s: float, worker: SimulatedWorker) -> None:
        if self._due_s[worker.id] != now_s:
            return  # Something came in between, and it was planned anew.
        self._due_s[worker.id] = None
        told = worker.finish(now_s, len(self.routers))
        if told:
            self._report(now_s, enumerate(told))
        self._wake(now_s, worker)

    def _report(
        self, now_s: float, told: Iterable[tuple[int, Sequence[StepReported | CacheReported]]]
    ) -> None:
        def arrive(_: float) -> None:
            for router, reports in told:
                for report in reports:
                    self._feed(router, report)

        self._at(now_s + self._layout.link_s, arrive)

    def _tell_others(self, now_s: float, worker: SimulatedWorker) -> None:
        """Of what a router has just given to it or taken back; not too often."""
        if len(self.routers) == 1 or self._tells_s[worker.id] > now_s:
            return  # It will tell of this with what came before.
        tells_s = self._tells_s[worker.id] = max(
            now_s, self._tells_s[worker.id] + OTHERS_INTERVAL_S
        )

        def tell(at_s: float) -> None:
            reports = worker.told_of_others(at_s, len(self.routers))
            self._report(at_s, [(router, [report]) for router, report in reports])

        self._at(tells_s, tell)


def prompt_hashes(request: TracedRequest, block_tokens: int) -> Sequence[bytes]:
    """Content addresses of a prompt's full blocks: of what the trace says is shared.

    A trace's id stands for its block after all blocks before it, as an address does
    (`traces.TracedRequest.block_ids`).
    """
    parts = BLOCK_TOKENS // block_tokens
    assert parts * block_tokens == BLOCK_TOKENS, "a trace's block is whole blocks of the engines"
    full = request.input_tokens // block_tokens
    if parts == 1:
        return [block.to_bytes(8, "big") for block in request.block_ids[:full]]
    hashes = [
        block.to_bytes(8, "big") + bytes((part,))
        for block in request.block_ids
        for part in range(parts)
    ]
    return hashes[:full]
