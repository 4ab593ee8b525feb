"""The wire types of vLLM's sampling parameters (`vllm/sampling_params.py`, 0.32), to be checked.

vLLM's engine decodes a request in the thread that reads its socket; what does not fit there ends
the engine. Fronts pass some of what clients write on as it is, so workers check before they send.
"""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec import Struct, field


class StructuredOutputs(Struct, forbid_unknown_fields=True):
    """`StructuredOutputsParams`: exactly one of the first six."""

    json: str | dict[str, Any] | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: str | None = None
    disable_any_whitespace: bool = False
    disable_additional_properties: bool = False
    whitespace_pattern: str | None = None
    backend: str | None = field(default=None, name="_backend")
    backend_was_auto: bool = field(default=False, name="_backend_was_auto")

    def __post_init__(self) -> None:
        kinds = (
            self.json, self.regex, self.choice, self.grammar, self.json_object, self.structural_tag
        )  # fmt: skip
        given = sum(kind is not None for kind in kinds)
        if given != 1:
            raise ValueError(f"structured outputs take exactly one constraint, not {given}")


class SamplingParams(Struct):
    """`SamplingParams`; a field that this version does not know is left to vLLM."""

    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    watermarking: bool | None = None
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    prompt_logprob_start: int | None = None
    logprob_token_ids: list[int] | None = None
    flat_logprobs: bool = False
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    output_kind: int = 0
    stream_interval: int | None = None
    structured_outputs: StructuredOutputs | None = None
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: list[int] | None = None
    extra_args: dict[str, Any] | None = None
    bad_words: list[str] | None = None


def check(params: dict[str, Any]) -> None:
    """Raise ValueError, naming the field, for parameters that vLLM's engine could not decode."""
    try:
        msgspec.convert(params, SamplingParams)
    except msgspec.ValidationError as error:
        raise ValueError(f"the sampling parameters are wrong: {error}") from None
