"""A peer's policy on a small cluster, and what it decided: the words that its tests are told in."""

from __future__ import annotations

from random import Random
from typing import Any

from engine.base import EngineLoad
from engine.spec import EngineTimes, PoolTimes, SimulatedTiming
from kvstore.index import KvIndex
from protos.enginecore import ENGINE_TAG
from protos.ids import Incarnation, RequestKey, WorkerId
from router.core.events import Role, Shape, WorkerUp
from router.core.placement import Decision, View
from router.core.workers import WorkerPool
from simulator.baselines import BASELINES, Setup
from simulator.baselines.policy import PeerPolicy

BLOCK_TOKENS = 10
TIMING = SimulatedTiming(
    step_base_s=0.010,
    prefill_token_s=0.001,
    prefill_pair_s=0.0,
    decode_request_s=0.002,
    decode_context_token_s=0.00001,
)
MAX_STEP_TOKENS = 100


def setup(seed: int = 0, timing: SimulatedTiming = TIMING, **knobs: float) -> Setup:
    engine = EngineTimes(timing, MAX_STEP_TOKENS)
    return Setup(Random(seed), PoolTimes(engine, engine), 256, knobs)


def key(name: str) -> RequestKey:
    return RequestKey(f"0:{name}")


def addresses(prompt: str) -> list[bytes]:
    """A block for each letter; equal ones are equal beginnings."""
    return [prompt[: end + 1].encode() for end in range(len(prompt))]


class Peer:
    """A policy and its cluster. A worker named p... is of the prefill pool, d... of the decode
    pool; a prompt's letters are blocks of 10 tokens."""

    def __init__(
        self, name: str, workers: str, seed: int = 0, timing: SimulatedTiming = TIMING,
        **knobs: float,
    ) -> None:  # fmt: skip
        policy = BASELINES[name](setup(seed, timing, **knobs))
        assert isinstance(policy, PeerPolicy)
        self.policy = policy
        self.pool = WorkerPool()
        self.index = KvIndex(1000)
        self.view = View(self.pool, self.index, BLOCK_TOKENS, " p" in f" {workers}", 0)
        self.now_s = 100.0
        for worker in workers.split():
            self.up(worker)

    def up(self, worker: str) -> None:
        role = Role.PREFILL if worker.startswith("p") else Role.DECODE
        self.pool.attach(
            WorkerUp(WorkerId(worker), Incarnation(1), role, ENGINE_TAG, BLOCK_TOKENS, 100, 1000)
        )

    def down(self, worker: str) -> None:
        found = self.pool.get(WorkerId(worker))
        assert found is not None
        self.pool.detach(found)

    def load(
        self, worker: str, running: int = 0, waiting: int = 0, used: int = 0, total: int = 100
    ) -> None:
        """What the worker reports from now on."""
        found = self.pool.get(WorkerId(worker))
        assert found is not None
        found.load = EngineLoad(running, waiting, used, total)

    def cached(self, worker: str, prompt: str) -> None:
        """The engine tells that it holds this."""
        self.index.store(worker, addresses(prompt))

    def ask(self, name: str, prompt: str = "a", **shape: Any) -> Decision | None:
        """Place a request; 10 tokens for each letter unless it says how many."""
        shape = {"prompt_tokens": BLOCK_TOKENS * len(prompt), "max_tokens": None, **shape}
        asked = Shape(addresses=addresses(prompt), **shape)
        return self.policy.place(self.now_s, self.view, key(name), asked)

    def place(self, name: str, prompt: str = "a", **shape: Any) -> Decision:
        """That can be placed."""
        decision = self.ask(name, prompt, **shape)
        assert decision is not None
        return decision

    def place_on(self, worker: str, count: int, prompt: str = "", prompt_tokens: int = 1) -> None:
        """Give one worker so many requests, whatever the policy thinks."""
        others = [each.id for each in self.pool if each.id != worker]
        for other in others:
            self.down(other)
        for number in range(count):
            self.place(f"{worker}-{prompt}-{number}", prompt, prompt_tokens=prompt_tokens)
        for other in others:
            self.up(other)

    def first_token(self, name: str) -> None:
        self.policy.first_token(self.now_s, key(name))

    def ended(self, name: str, output_tokens: int | None = 5) -> None:
        self.policy.ended(self.now_s, key(name), output_tokens)


def costs(decision: Decision, role: Role = Role.DECODE) -> dict[str, float]:
    return {each.worker: each.cost for each in decision.candidates if each.role is role}


def numbers(decision: Decision, worker: str, role: Role = Role.DECODE) -> dict[str, float]:
    """What was compared of one worker."""
    found = next(
        each for each in decision.candidates if each.worker == worker and each.role is role
    )
    return dict(zip(decision.compared, found.numbers, strict=True))


def chosen_over_seeds(name: str, workers: str, **knobs: Any) -> set[str | None]:
    """Where a first request goes."""
    return {Peer(name, workers, seed, **knobs).place("a").worker for seed in range(30)}
