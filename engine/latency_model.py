"""How long an engine takes for what it computes and fetches. Pure: numbers in, seconds out."""

from __future__ import annotations

from dataclasses import dataclass

from engine.spec import SimulatedTiming


@dataclass(frozen=True, slots=True)
class StepTimes:
    """Predicts from a line: each token and each request adds a constant to a step's base."""

    timing: SimulatedTiming

    def step_s(self, prefill_tokens: int, decode_requests: int) -> float:
        """Duration of a step that computes these tokens of prompts and one per decode."""
        return (
            self.timing.step_base_s
            + prefill_tokens * self.timing.prefill_token_s
            + decode_requests * self.timing.decode_request_s
        )

    def transfer_s(self, blocks: int) -> float:
        """Time to fetch so many KV blocks from another engine."""
        return blocks * self.timing.transfer_block_s
