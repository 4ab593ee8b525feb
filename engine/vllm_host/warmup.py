"""One request of each kind, so that the first client does not wait while code is compiled."""

from __future__ import annotations

from typing import Any, Final

from engine.base import Engine
from protos.block_events import BlockEvent
from protos.enginecore import EngineRequest
from protos.errors import EngineError

_JSON_SCHEMA: Final = '{"type":"object","properties":{"a":{"type":"boolean"}},"required":["a"]}'

KINDS: Final[dict[str, dict[str, Any]]] = {
    "greedy": {"temperature": 0.0},
    "sampled": {"temperature": 1.0, "top_p": 0.9, "top_k": 40},
    "seeded": {"temperature": 1.0, "seed": 1},
    "logprobs": {"temperature": 0.0, "logprobs": 5},
    "prompt logprobs": {"temperature": 0.0, "prompt_logprobs": 1},
    "penalties": {
        "temperature": 0.0,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.5,
        "repetition_penalty": 1.1,
    },
    "bias": {"temperature": 0.0, "logit_bias": {5: 1.0}, "min_tokens": 2},
    "guided": {
        "temperature": 0.0,
        "structured_outputs": {
            "json": _JSON_SCHEMA,
            "disable_any_whitespace": True,
            "_backend": "xgrammar",
        },
    },
}
"""Sampling parameters by what they make an engine compile or load."""

_PROMPT_TOKENS: Final = 16
_OUTPUT_TOKENS: Final = 3


async def warm_up(engine: Engine) -> list[BlockEvent]:
    """Run each kind once, all together, to their ends; returns what that did to the prefix cache.

    Raises EngineError if one fails."""
    pending = set()
    block_events: list[BlockEvent] = []
    for index, (kind, sampling) in enumerate(KINDS.items()):
        request_id = f"warm-up {kind}"
        pending.add(request_id)
        # Prompts of their own: a cached prefix would skip what is to be warmed up.
        prompt = [20 + index + position for position in range(_PROMPT_TOKENS)]
        params = {"max_tokens": _OUTPUT_TOKENS, **sampling}
        engine.add(EngineRequest(request_id, prompt, None, params, None, 0.0, None, None, None))
    while pending:
        step = await engine.step()
        block_events += step.block_events
        for output in step.outputs:
            if output.finish_reason is not None:
                pending.discard(output.request_id)
                if output.finish_reason == 3:
                    raise EngineError(f"the engine failed at its {output.request_id} request")
    return block_events
