"""What Baton may add to plain vLLM, and whether it kept to it. Pure: numbers in, a table out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from benchmarks.report import table

PLAIN: Final = "plain vLLM"
"""With the engine as Baton runs it: what the targets refer to."""
SHIPPED: Final = "plain vLLM as shipped"
AGGREGATED: Final = "Baton aggregated"
DISAGGREGATED: Final = "Baton P/D"


@dataclass(frozen=True, slots=True)
class Summary:
    """Of one server; medians over the rounds."""

    ttft_ms: float
    """Like all but the throughput: of one request at a time."""
    second_token_ms: float
    """The gap between the first and the second token."""
    token_ms: float
    """The gap between any two tokens."""
    whole_ms: float
    requests_per_s: float
    """Of 16 at a time."""


Value = Callable[[Summary], float]


def _ttft(server: Summary) -> float:
    return server.ttft_ms


def _second(server: Summary) -> float:
    return server.second_token_ms


def _whole(server: Summary) -> float:
    return server.whole_ms


def _throughput(server: Summary) -> float:
    return server.requests_per_s


_AT_MOST: Final[tuple[tuple[str, str, Value, Value], ...]] = (
    ("TTFT, ms: plain + 1", AGGREGATED, _ttft, lambda plain: plain.ttft_ms + 1.0),
    ("TTFT, ms: better than plain (goal)", AGGREGATED, _ttft, _ttft),
    ("TTFT, ms: plain + 5", DISAGGREGATED, _ttft, lambda plain: plain.ttft_ms + 5.0),
    ("TTFT, ms: plain + 2 (goal)", DISAGGREGATED, _ttft, lambda plain: plain.ttft_ms + 2.0),
    (
        "first to second token, ms: 3 x plain's time between tokens",
        DISAGGREGATED,
        _second,
        lambda plain: 3.0 * plain.token_ms,
    ),
    ("whole request, ms: 1.5 x plain", AGGREGATED, _whole, lambda plain: 1.5 * plain.whole_ms),
    ("whole request, ms: 1.5 x plain", DISAGGREGATED, _whole, lambda plain: 1.5 * plain.whole_ms),
)
_AT_LEAST: Final[tuple[tuple[str, str, Value, Value], ...]] = (
    ("requests/s: 0.9 x plain", AGGREGATED, _throughput, lambda plain: 0.9 * plain.requests_per_s),
    ("requests/s: better than plain (goal)", AGGREGATED, _throughput, _throughput),
    ("requests/s: 40", DISAGGREGATED, _throughput, lambda _: 40.0),
)


def targets(summaries: Mapping[str, Summary]) -> str:
    """Markdown: each target, what was measured, and whether that is enough."""
    plain = summaries[PLAIN]
    rows = []
    for sign, group in (("≤", _AT_MOST), ("≥", _AT_LEAST)):
        for what, name, value, limit in group:
            have, wanted = value(summaries[name]), limit(plain)
            met = have <= wanted if sign == "≤" else have >= wanted
            verdict = "met" if met else "**missed**"
            rows.append((name, what, f"{sign} {wanted:.1f}", f"{have:.1f}", verdict))
    return table(("server", "target", "limit", "measured", "verdict"), rows)
