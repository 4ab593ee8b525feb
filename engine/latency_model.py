"""How long an engine takes for what it computes and fetches. Pure: numbers in, seconds out."""

from __future__ import annotations

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

    def transfer_s(self, blocks: int) -> float:
        """Time to fetch so many KV blocks from another engine."""
        return blocks * self.timing.transfer_block_s
