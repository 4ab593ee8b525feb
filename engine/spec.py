"""What a worker is started with and what it answers: plain values that cross Ray."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from protos.ids import Incarnation, WorkerId

Role = Literal["prefill", "decode"]
EngineKind = Literal["vllm", "simulated"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatedTiming:
    """Step times of the simulated engine: linear in what the step computes."""

    step_base_s: float = 0.004
    prefill_token_s: float = 20e-6
    prefill_pair_s: float = 0.0
    decode_request_s: float = 50e-6
    decode_context_token_s: float = 0.0
    transfer_block_s: float = 100e-6
    transfer_base_s: float = 0.0


@dataclass(frozen=True, slots=True)
class EngineTimes:
    """What predictions of an engine start from."""

    timing: SimulatedTiming
    max_step_tokens: int
    """What one of its steps computes at most."""


@dataclass(frozen=True, slots=True)
class PoolTimes:
    """Of each pool's engines, which may run on more or fewer GPUs than the other's."""

    prefill: EngineTimes
    decode: EngineTimes


@dataclass(frozen=True, slots=True)
class WorkerSpec:
    """One worker: its place in the cluster and its engine."""

    worker_id: WorkerId
    role: Role
    engine: EngineKind
    model: str
    """Directory of the model, or its hub id."""
    run_directory: str
    """The worker's own, only for its user: sockets and the engine's log."""
    link_token: str
    """What a router must show to attach."""
    listen_host: str = "127.0.0.1"
    kv_lease_s: float = 30.0
    """How long blocks that were handed off are kept for the one who fetches them."""
    engine_args: dict[str, Any] = field(default_factory=dict)
    """vLLM's engine arguments by their Python names."""
    environment: dict[str, str] = field(default_factory=dict)
    """Environment variables of the engine process."""
    simulated: SimulatedTiming = SimulatedTiming()


@dataclass(frozen=True, slots=True)
class WorkerAddress:
    """A worker that can serve."""

    worker_id: WorkerId
    incarnation: Incarnation
    role: Role
    address: str
    """HOST:PORT of its gRPC data plane."""
    node: str
    pid: int
    """The actor's process; when it or its engine process dies, both do."""
    engine_pid: int | None
    weights: str
    """Digest of what its engine computes with (`engine.weights`)."""
