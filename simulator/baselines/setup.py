"""What a peer's policy is made with: chance, the engine model, the engines' limits and its knobs.

The engine model stands for what a peer measures or fits offline on its hardware: a policy gets the
simulated engine's own step times, so its predictions are as good as they can be.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from random import Random

from engine.latency_model import StepTimes, StepWork
from engine.spec import PoolTimes
from protos.errors import ConfigError, nearest


@dataclass(frozen=True, slots=True)
class Setup:
    """One policy's surroundings."""

    rng: Random
    """Seeded; breaks ties and makes random choices."""
    engines: PoolTimes
    """Without a prefill pool its engines are those of the decode pool."""
    max_running_requests: int
    """Of an engine that decodes."""
    knobs: Mapping[str, float] = field(default_factory=dict)
    """Other values for the policy's parameters, by name."""

    def read(self, defaults: Mapping[str, float]) -> dict[str, float]:
        """All parameters of a policy that has these. Raises ConfigError for any other knob."""
        for name in self.knobs:
            if name not in defaults:
                raise ConfigError(_unknown(name, defaults))
        return {**defaults, **self.knobs}

    def prefill_s(self, prompt_tokens: int, cached_tokens: int) -> float:
        """How long an otherwise idle engine computes a prompt that is cached so far.

        The last token is computed even if all are cached, as vLLM does.
        """
        uncached_tokens = max(1, prompt_tokens - cached_tokens)
        work = StepWork()
        work.add_prefill(uncached_tokens, prompt_tokens - uncached_tokens)
        # The pairs of a prompt that is cut into steps add up to those of the whole.
        engine = self.engines.prefill
        further_steps = math.ceil(uncached_tokens / engine.max_step_tokens) - 1
        return self.prefill_times.step_s(work) + further_steps * engine.timing.step_base_s

    @property
    def prefill_times(self) -> StepTimes:
        """Of engines that compute prompts."""
        return StepTimes(self.engines.prefill.timing)

    @property
    def decode_times(self) -> StepTimes:
        """Of engines that decode."""
        return StepTimes(self.engines.decode.timing)


def _unknown(name: str, defaults: Mapping[str, float]) -> str:
    if not defaults:
        return f"unknown knob {name}: this policy has no knobs; leave it out"
    meant = nearest(name, defaults)
    return f"unknown knob {name}: did you mean {meant}? There are {', '.join(defaults)}"
