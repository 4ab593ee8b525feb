"""How long an engine takes for what it computes and fetches. Pure: numbers in, seconds out."""

from __future__ import annotations

import math
from dataclasses import dataclass

from engine.spec import SimulatedTiming


@dataclass(slots=True)
class StepWork:
    """What one step computes, in the terms that its time depends on."""

    prefill_tokens: int = 0
    prefill_pairs: float = 0.0
    """Pairs of a prompt's token and one that it attends to: those before it, and half of those in
    the same step."""
    decode_requests: int = 0
    decode_context_tokens: int = 0
    """All that the generating requests attend to."""

    def add_prefill(self, tokens: int, context_tokens: int) -> None:
        """So many of a prompt's tokens, after so many that are computed."""
        self.prefill_tokens += tokens
        self.prefill_pairs += tokens * (context_tokens + tokens / 2)

    def add_decode(self, context_tokens: int) -> None:
        """One token of one request."""
        self.decode_requests += 1
        self.decode_context_tokens += context_tokens


@dataclass(frozen=True, slots=True)
class StepTimes:
    """A step's time is linear in its work: matrix products grow with tokens, prefill's attention
    with pairs, and decode's with the context that is read. How well that fits GPUs stands in
    benchmarks/results/engine-model.md."""

    timing: SimulatedTiming

    def step_s(self, work: StepWork) -> float:
        """Duration of a step that computes this."""
        timing = self.timing
        return (
            timing.step_base_s
            + work.prefill_tokens * timing.prefill_token_s
            + work.prefill_pairs * timing.prefill_pair_s
            + work.decode_requests * timing.decode_request_s
            + work.decode_context_tokens * timing.decode_context_token_s
        )

    def repeated_s(self, work: StepWork, steps: int) -> float:
        """Duration of so many steps of decodes alone, each with a token more of context."""
        growth_s = work.decode_requests * self.timing.decode_context_token_s
        return steps * self.step_s(work) + growth_s * steps * (steps - 1) / 2

    def steps_within(self, work: StepWork, duration_s: float) -> int:
        """The least number of such steps that take at least so long, 1 or more."""
        first_s = self.step_s(work)
        growth_s = work.decode_requests * self.timing.decode_context_token_s
        # repeated_s(n) = growth/2 n^2 + (first - growth/2) n, solved for n.
        half_s = growth_s / 2
        linear_s = first_s - half_s
        if half_s > 0:
            root = math.sqrt(linear_s * linear_s + 4 * half_s * max(0.0, duration_s))
            steps = (root - linear_s) / (2 * half_s)
        else:
            steps = duration_s / first_s
        return max(1, math.ceil(steps - 1e-9))

    def transfer_s(self, blocks: int) -> float:
        """Time to fetch so many KV blocks from another engine."""
        return self.timing.transfer_base_s + blocks * self.timing.transfer_block_s
