"""A router's KV index fed by a worker over real gRPC, both in this process."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

import pytest

from engine.service import WorkerService
from engine.simulated.engine import SimulatedEngine
from engine.spec import SimulatedTiming, WorkerSpec
from kvstore.content import block_addresses, root_address
from kvstore.index_feed import CacheChange
from protos.enginecore import EngineRequest
from protos.ids import Attempt, RequestKey, WorkerId
from protos.membership import Member, Membership
from router.core import admission
from router.core.events import AskCache, CacheReported, Event, SnapshotTaken, Submit
from router.core.moves import CoreSettings
from router.core.placement import LeastPredictedWork
from router.core.router import RouterCore
from router.metrics import LinkBytes
from router.settings import RouterSettings
from router.worker_links import WorkerLinks

TOKEN = "a token of the tests"
WORKER = WorkerId("d0")
SETTINGS = RouterSettings(
    router_id="r", link_token=TOKEN, expect_prefill=False, joint=None, local_prefill_max_tokens=0,
    served_model_names=["m"], index_block_tokens=128, worker_reconnect_s=0.2,
)  # fmt: skip


class Worker:
    """With an engine that holds 20 index blocks."""

    def __init__(self) -> None:
        spec = WorkerSpec(
            WORKER, "decode", "simulated", "none", "/nonexistent", TOKEN,
            engine_args={
                "block_size": 16, "num_gpu_blocks_override": 160, "max_model_len": 2048
            },
            simulated=SimulatedTiming(step_base_s=0.0005, transfer_block_s=0.0),
        )  # fmt: skip
        self.service = WorkerService(spec, SimulatedEngine(spec))

    async def start(self) -> None:
        self.port = await self.service.start()
        self._running = asyncio.create_task(self.service.run())

    async def stop(self) -> None:
        self._running.cancel()
        await asyncio.gather(self._running, return_exceptions=True)
        await self.service.stop()


class Router:
    """A core and its links, without the rest of the process."""

    def __init__(self, worker: Worker) -> None:
        settings = CoreSettings(expect_prefill=False, local_prefill_max_tokens=0)
        self.core = RouterCore(settings, LeastPredictedWork(lambda n: 0))
        self.feed(SnapshotTaken(()))
        self.reports = 0
        self._asked = 0
        self._links = WorkerLinks(SETTINGS, 1, self, lambda task: None, LinkBytes())
        self.cached_as = admission.CachedAs(worker.service.weights, 128)
        member = Member(
            WORKER, worker.service.incarnation, "decode", f"127.0.0.1:{worker.port}", "here", 1,
            worker.service.weights,
        )  # fmt: skip
        self._links.update(Membership(1, [member], []))

    def feed(self, event: Event) -> None:
        if isinstance(event, CacheReported):
            self.reports += 1
        for command in self.core.handle(time.monotonic(), event):
            if isinstance(command, AskCache):
                self._links.send(command)

    def on_welcome(self, worker: WorkerId, ready_payload: bytes) -> None:
        pass

    def on_metrics(self, worker: WorkerId, values: Mapping[str, float]) -> None:
        pass

    def run(self, prompt: list[int], salt: str | None = None) -> list[bytes]:
        """Have the worker compute a prompt; the addresses that admission finds for it."""
        self._asked += 1
        name = f"request-{self._asked}"
        request = EngineRequest(name, prompt, None, {"max_tokens": 1}, None, 0.0, None, salt, None)
        demand = admission.read(request, self.cached_as)
        key = RequestKey(f"0:{name}")
        self._links.send(Submit(WORKER, key, Attempt(1), demand.payload))
        return list(demand.shape.addresses)

    @property
    def indexed(self) -> int:
        return self.core.moves.index.blocks_of(WORKER)

    def matches(self, addresses: list[bytes]) -> int:
        return self.core.moves.index.match(addresses).get(WORKER, 0)

    def close(self) -> None:
        self._links.update(Membership(2, [], []))


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


@pytest.fixture
async def worker() -> AsyncIterator[Worker]:
    worker = Worker()
    await worker.start()
    yield worker
    await worker.stop()


@pytest.fixture
async def router(worker: Worker) -> AsyncIterator[Router]:
    router = Router(worker)
    await until(lambda: router.reports)  # The snapshot, with nothing in it.
    yield router
    router.close()


async def test_what_a_worker_computes_and_evicts_shows(router: Router) -> None:
    prompt = list(range(5 * 128 + 100))
    addresses = router.run(prompt)
    root = root_address(router.cached_as.weights, "", "", 128)
    assert addresses == block_addresses(root, prompt, 128)
    await until(lambda: router.matches(addresses) == 5)
    counts = router.core.moves.counts
    assert (counts.cache_snapshots, counts.cache_gaps) == (1, 0)
    told = router.reports
    router.run(prompt)  # It is cached, which is no news.
    salted = router.run(prompt, "a tenant")
    await until(lambda: router.matches(salted) == 5)
    assert router.reports == told + 1
    for number in range(4):
        router.run([1000 + number] * 1900)
    await until(lambda: router.matches(addresses) == 0)
    assert router.indexed <= 20


async def test_a_router_that_attaches_late_gets_all_at_once(worker: Worker, router: Router) -> None:
    addresses = router.run(list(range(640)))
    await until(lambda: router.matches(addresses) == 5)
    late = Router(worker)
    await until(lambda: late.matches(addresses) == 5)
    assert late.core.moves.counts.cache_changes == 0
    late.close()


async def test_after_a_gap_the_worker_is_asked_for_all(router: Router, worker: Worker) -> None:
    addresses = router.run(list(range(640)))
    await until(lambda: router.matches(addresses) == 5)
    router.feed(CacheReported(WORKER, worker.service.incarnation, CacheChange(1000)))
    assert router.matches(addresses) == 0
    await until(lambda: router.matches(addresses) == 5)
    counts = router.core.moves.counts
    assert (counts.cache_snapshots, counts.cache_gaps) == (2, 1)
    more = router.run(list(range(2000, 2640)))
    await until(lambda: router.matches(more) == 5)


async def test_a_worker_that_ends_drops_out(router: Router, worker: Worker) -> None:
    addresses = router.run(list(range(640)))
    await until(lambda: router.matches(addresses) == 5)
    await worker.service.stop_serving("its engine ended")
    await until(lambda: router.matches(addresses) == 0)
    assert router.indexed == 0
