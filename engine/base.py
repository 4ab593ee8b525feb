"""What the worker knows of an engine: the interface that vLLM and the simulated engine share.

Requests and outputs are vLLM's own engine-core structs (`protos.enginecore`); an engine is told to
hand off or to resume through them, so the simulated engine obeys the same words as the real one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple, Protocol

from protos.block_events import BlockEvent
from protos.enginecore import EngineOutput, EngineRequest

OTHERS_INTERVAL_S: Final = 0.005
"""How often at most a worker tells routers of others' work alone."""


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What an engine says of itself once it can serve."""

    engine_tag: str
    """The layout of its structs; a router sends only to tags that it speaks."""
    block_size_tokens: int
    kv_blocks_total: int
    max_model_len_tokens: int
    ready_payload: bytes
    """`protos.enginecore.ReadyResponse`, msgpack, for the fronts."""
    weights: str
    """Digest of what it computes with (`engine.weights`)."""
    vocabulary_tokens: int | None = None
    """Token ids are below this; None: any will do."""


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """An engine's load as of its last step."""

    running: int = 0
    waiting: int = 0
    """Requests that wait for a place, for KV state or for a grammar."""
    kv_blocks_used: int = 0
    kv_blocks_total: int = 0
    step_time_s: float = 0.0
    """From the step before to this one; 0 after idling."""


class PlacedWork(NamedTuple):
    """What one router or several have on an engine."""

    prompts: int = 0
    """That are not computed."""
    prompt_tokens: int = 0
    """Of these, what is to be computed."""
    prompt_pairs: int = 0
    """Of these, (token to be computed, token that it attends to)."""
    computed_tokens: int = 0
    """Of prompts that are computed; grows, except when one of the routers is forgotten."""
    computed_pairs: int = 0
    decodes: int = 0
    """Requests that decode there, or will after their prompt."""
    context_tokens: int = 0
    """Theirs when they were submitted."""
    running: int = 0
    """Of these, those that decode now."""
    running_context_tokens: int = 0
    coming_tokens: int = 0
    """Of KV state that is to be computed or fetched."""
    routers: int = 0
    """How many these are."""


NOTHING_PLACED: Final = PlacedWork()

QUEUE_REPEATED_S: Final = 0.25
"""How often a router repeats what waits there."""
QUEUE_VALID_S: Final = 1.0
"""For so long it is believed what was said of a queue: else a router that hangs would keep others
from going on."""


class Queued(NamedTuple):
    """What waits at one router or several for its turn."""

    requests: int = 0
    work_s: float = 0.0
    """That their prompts take, on one engine."""
    first_due_in_s: float = math.inf
    """From now, until the one that is due first is."""


NOTHING_QUEUED: Final = Queued()


@dataclass(slots=True)
class EngineStep:
    """What one step produced."""

    outputs: list[EngineOutput]
    load: EngineLoad
    counters: dict[str, float] = field(default_factory=dict)
    """What this step adds to the engine's counters, under vLLM's metric names; any label stands in
    the name as Prometheus writes it, e.g. `vllm:prompt_tokens_by_source_total{source="..."}`."""
    block_events: Sequence[BlockEvent] = ()
    """What it changed in the engine's prefix cache."""


class Engine(Protocol):
    """An engine. Ids are unique over its life. Calls come from one event loop."""

    async def start(self) -> EngineInfo:
        """Load and warm up; returns when it can serve. Raises EngineError."""
        ...

    def add(self, request: EngineRequest) -> None:
        """Queue a request; its outputs come with the steps, an error as finish reason 3."""
        ...

    def abort(self, request_ids: list[str]) -> None:
        """End these and free their blocks, also of one that was handed off and waits to be
        fetched. Unknown ids are ignored. No output follows.

        A router also sends this once a hand-off has been fetched: vLLM's engine learns of that
        by itself, the simulated one does not."""
        ...

    async def step(self) -> EngineStep:
        """Wait for the next step that has something to tell: outputs, or just load and counters.

        A cancelled call loses nothing. Raises EngineError once the engine died."""
        ...

    async def stop(self) -> None:
        """End it and what it started. May be called at any time, more than once."""
        ...
