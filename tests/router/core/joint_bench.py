"""A bench for joint placement: workers as it sees them, their caches, and what it predicts."""

from __future__ import annotations

import math

from engine.spec import EngineTimes, PoolTimes, SimulatedTiming
from kvstore.index import KvIndex
from protos.enginecore import ENGINE_TAG
from protos.ids import Incarnation, RequestKey, WorkerId
from router.core.costs import Slo, Weights
from router.core.events import Role, Shape, WorkerUp
from router.core.joint import JointPlacement
from router.core.placement import Decision, View
from router.core.workers import WorkerPool

BLOCK_TOKENS = 128
TIMING = SimulatedTiming(
    step_base_s=0.006,
    prefill_token_s=20e-6,
    prefill_pair_s=1e-9,
    decode_request_s=13e-6,
    decode_context_token_s=43e-9,
    transfer_block_s=0.4e-3,
    transfer_base_s=2e-3,
)
ENGINE = EngineTimes(TIMING, max_step_tokens=8192)
ALIKE = PoolTimes(ENGINE, ENGINE)
SLO = Slo(ttft_s=2.0, tpot_s=0.05)


class Bench:
    """A policy, the workers that it sees and their caches."""

    def __init__(
        self, *names: str, slo: Slo = SLO, tie: int = 0, hold: float = math.inf,
        engines: PoolTimes = ALIKE, kv_blocks: int = 3000,
    ) -> None:  # fmt: skip
        self.pool = WorkerPool()
        for name in names:
            role = Role.PREFILL if name[0] == "p" else Role.DECODE
            self.pool.attach(
                WorkerUp(
                    WorkerId(name),
                    Incarnation(1),
                    role,
                    ENGINE_TAG,
                    BLOCK_TOKENS,
                    kv_blocks,
                    131_072,
                )
            )
        self.index = KvIndex(100_000)
        self.view = View(self.pool, self.index, BLOCK_TOKENS, True, 0)
        weights = Weights(hold=hold)
        self.policy = JointPlacement(lambda n: tie % n, engines, slo, weights)
        self.now_s = 100.0
        self._made = 0

    def place(self, tokens: int = 1280, prefix: int = 0, **more: object) -> Decision:
        self._made += 1
        values = {"max_tokens": None, "addresses": addresses(prefix, tokens)} | more
        shape = Shape(tokens, **values)  # type: ignore[arg-type]
        decision = self.policy.place(self.now_s, self.view, self.key(self._made), shape)
        assert decision is not None
        return decision

    def key(self, number: int) -> RequestKey:
        return RequestKey(f"0:{number}")

    def first_token(self, number: int) -> None:
        self.policy.first_token(self.now_s, self.key(number))

    def ended(self, number: int, output_tokens: int | None = 100) -> None:
        self.policy.ended(self.now_s, self.key(number), output_tokens)


def addresses(prefix: int, tokens: int) -> list[bytes]:
    return [f"{prefix}/{n}".encode() for n in range(tokens // BLOCK_TOKENS)]


def predicted(decision: Decision, worker: str, role: Role = Role.DECODE) -> dict[str, float]:
    (found,) = [each for each in decision.candidates if (each.worker, each.role) == (worker, role)]
    return dict(zip(decision.compared, found.numbers, strict=True))
