"""How much of a trace one LRU prefix cache can save: `python -m benchmarks.prefix_hit_rate`.

For each trace with known prompts in SHARED/traces (`--shared`, default ../shared) and each size of
the cache: the share of prompt tokens that were cached when their request came. Beside the
conversation trace stands a reference that was counted independently. Prints a Markdown table.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from benchmarks import shared_files
from benchmarks.report import machine, table
from simulator import traces
from simulator.prefix_cache import distinct_tokens, token_hit_rate

TRACES: Final = ("mooncake_conversation", "mooncake_arxiv_first1000")
SIZES_MTOKENS: Final = (1, 3, 5, 10, 20, 50)
REFERENCE_PERCENT: Final[dict[int | None, float]] = {
    1: 5.4, 3: 13.9, 5: 21.1, 10: 29.1, 20: 35.8, 50: 37.1, None: 37.4,
}  # fmt: skip
"""Of the conversation trace, by the cache's size in millions of tokens; None: without bounds."""


def percentages(path: Path) -> dict[int | None, float]:
    """The hit rate in percent by size in millions of tokens; None is a cache without bounds."""
    sizes_tokens: dict[int | None, int] = {size: size * 1_000_000 for size in SIZES_MTOKENS}
    sizes_tokens[None] = distinct_tokens(traces.read(path))
    return {
        size: 100 * token_hit_rate(traces.read(path), tokens)
        for size, tokens in sizes_tokens.items()
    }


def main() -> None:
    """Entry point."""
    shared: Path = shared_files.parser(__doc__).parse_args().shared
    with shared_files.needed():
        found = {name: percentages(shared / "traces" / f"{name}.jsonl.gz") for name in TRACES}
    rows = [
        [
            "unbounded" if size is None else f"{size} M",
            f"{percent:.1f}",
            f"{REFERENCE_PERCENT[size]:.1f}",
            *(f"{found[name][size]:.1f}" for name in TRACES[1:]),
        ]
        for size, percent in found[TRACES[0]].items()
    ]
    headings = [
        "cache, tokens",
        f"{TRACES[0]}, %",
        "reference, %",
        *(f"{n}, %" for n in TRACES[1:]),
    ]
    print(f"{machine()}\n\n{table(headings, rows)}")


if __name__ == "__main__":
    main()
