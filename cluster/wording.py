"""What `baton explain` says in words: reasons, ends, and numbers with their units."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from router.core.placement import Reason

_REASONS: Final[dict[str, str]] = {
    Reason.LONG_PROMPT: (
        "Its prompt of {prompt_tokens} tokens is longer than router.local_prefill_max_tokens "
        "({local_prefill_max_tokens}): a prefill worker computes it, another worker goes on."
    ),
    Reason.SHORT_PROMPT: (
        "Its prompt of {prompt_tokens} tokens is no longer than router.local_prefill_max_tokens "
        "({local_prefill_max_tokens}): it is computed where the output is made."
    ),
    Reason.SPLIT_COSTS_LESS: (
        "By what is predicted, a prefill worker and a decode worker cost less together than the "
        "best worker for both."
    ),
    Reason.WHOLE_COSTS_LESS: (
        "By what is predicted, one worker for both costs no more than the best prefill worker "
        "and the best decode worker together."
    ),
    Reason.PROMPT_LOGPROBS: (
        "It asks for the log-probabilities of its prompt, which can't be handed over: one worker "
        "does all of it."
    ),
    Reason.ONE_TOKEN: "It asks for one token, so there is nothing to hand over.",
    Reason.NO_PREFILL_POOL: "There is no prefill pool: one worker does all of it.",
    Reason.PREFILL_DOWN: (
        "No prefill worker could be used, although there should be one: a decode worker does all "
        "of it."
    ),
    Reason.DECODE_DOWN: "No decode worker could be used: a prefill worker does all of it.",
    Reason.RESUME: "It has tokens already and goes on with them on another worker.",
}
_WHO_ENDED: Final = {
    "C": "its client left",
    "c": "its client was silent for too long",
    "S": "the front broke it off",
    "s": "the front was silent for too long",
    "P": "the edge refused to pass it on",
}
"""By the first of HAProxy's two letters."""
_NAMES: Final = {
    "ttft_s": "TTFT",
    "tpot_s": "TPOT",
    "kv_use": "KV use",
    "prefill_tokens": "prefill\ntokens",
    "cached_tokens": "cached\ntokens",
}


def reason_sentence(decision: Mapping[str, Any]) -> str:
    """Why it was decided so."""
    sentence = _REASONS.get(decision["reason"])
    if sentence is None:
        return f"Reason: {decision['reason'].replace('_', ' ')}."
    return sentence.format(**decision)


def edge_sentence(edge: Mapping[str, str]) -> str:
    """How the response ended."""
    status, letters = edge["status"], edge["termination"]
    if not status:
        return "the response has not ended"
    if letters in ("--", ""):
        return f"answered with status {status}"
    who = _WHO_ENDED.get(letters[0], f"HAProxy says {letters}")
    return f"status {status}, but the response did not end in order: {who}"


def name_of(number: str) -> str:
    """A heading for a number whose name ends with its unit."""
    return _NAMES.get(number) or number.removesuffix("_s").replace("_", " ")


def value_of(number: str, value: float | None) -> str:
    """With its unit."""
    if value is None:
        return "-"
    if number.endswith("_s"):
        return duration(value)
    if number == "kv_use":
        return f"{value:.0%}"
    return plain(value)


def duration(seconds: float) -> str:
    """In milliseconds below a second."""
    if seconds < 1:
        return f"{seconds * 1000:.3g} ms"
    return f"{seconds:.3g} s" if seconds < 100 else f"{seconds:.0f} s"


def plain(value: float) -> str:
    """Whole numbers as such, others with three digits."""
    return f"{value:,.0f}" if value == int(value) else f"{value:.3g}"
