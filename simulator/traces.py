"""Request traces: who asked for how many tokens when, and which prompts begin alike.

Three formats are read, plain or compressed with gzip, a line at a time, so that a trace's length
costs no memory:

- Mooncake's JSON lines: `timestamp` (ms), `input_length`, `output_length` (tokens) and, where
  prompts are known, `hash_ids`, one for each 512 tokens of the prompt
  (https://github.com/kvcache-ai/Mooncake, FAST25-release). A `client` may name who asked.
- Azure's CSV: `TIMESTAMP` (a date), `ContextTokens`, `GeneratedTokens`
  (https://github.com/Azure/AzurePublicDataset, AzureLLMInferenceDataset2023).
- BurstGPT's CSV: `Timestamp` (s), `Request tokens`, `Response tokens`
  (https://github.com/HPMLL/BurstGPT). Requests that failed there have no response tokens and are
  left out.

Boundary: says what was asked; what the tokens are, and what becomes of them, is decided elsewhere.
"""

from __future__ import annotations

import csv
import gzip
import json
import reprlib
import zlib
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any, Final, NamedTuple

from protos.errors import ConfigError

BLOCK_TOKENS: Final = 512
"""Of the prompt, for each of `block_ids`; the last one may stand for fewer."""
_NEVER_S: Final = 1e12
"""Times from here on are none: it is 30,000 years."""
_ID_LIMIT: Final = 1 << 64
_COUNT_DIGITS: Final = 15
_START_CHARACTERS: Final = 4096
"""Enough to see what a file is."""


class TraceError(ConfigError):
    """A trace that can't be used: names the line, what is wrong, and what is expected."""


class TracedRequest(NamedTuple):
    """One request."""

    arrival_s: float
    """Since the trace's first request."""
    input_tokens: int
    output_tokens: int
    block_ids: tuple[int, ...] = ()
    """Each stands for its block after all blocks before it, as Mooncake's do: prompts with an id in
    common are equal up to there. Empty if nothing is known."""
    client: str = ""
    max_tokens: int | None = None
    """Of output, if its client sets a limit."""


def read(path: Path) -> Iterator[TracedRequest]:
    """The requests, in the order of their arrival. Raises TraceError while reading."""
    try:
        with _open(path) as file:
            yield from _checked(path, _lines(path, file))
    except (EOFError, UnicodeDecodeError, gzip.BadGzipFile, zlib.error) as error:
        raise TraceError(f"{path} can't be read as text: {error}") from None
    except OSError as error:
        raise TraceError(f"{path} can't be read: {error.strerror}; name a trace file") from None


def _checked(path: Path, lines: Iterable[tuple[int, TracedRequest]]) -> Iterator[TracedRequest]:
    """Times count from the first request on. Takes each line's number, for what is wrong."""
    first_s = before_s = None
    for number, request in lines:
        at_s = request.arrival_s
        if first_s is None or before_s is None:
            first_s = before_s = at_s
        if at_s < before_s:
            raise _wrong(
                path, number, f"its time {at_s} s is before {before_s} s, the time of the request "
                "above it; sort the trace by time",
            )  # fmt: skip
        before_s = at_s
        yield TracedRequest(at_s - first_s, *request[1:])
    if first_s is None:
        raise TraceError(f"{path} holds no requests")


def _lines(path: Path, file: IO[str]) -> Iterator[tuple[int, TracedRequest]]:
    """Requests on the file's own clock, and their lines' numbers."""
    start = file.read(_START_CHARACTERS).lstrip()[:1]
    file.seek(0)
    if start in ("", "{"):
        for number, text in enumerate(file, 1):
            if text.strip():
                yield number, _from_json(path, number, text)
        return
    yield from _from_csv(path, file)


def _from_json(path: Path, number: int, text: str) -> TracedRequest:
    try:
        entry = json.loads(text)
    except ValueError as error:  # Also a number of thousands of digits.
        raise _wrong(path, number, f"it is no JSON: {error}") from None
    if not isinstance(entry, dict):
        raise _wrong(path, number, "it is no JSON object")
    time_ms = entry.get("timestamp")
    if (
        isinstance(time_ms, bool)
        or not isinstance(time_ms, int | float)
        or not 0 <= time_ms < _NEVER_S * 1000
    ):
        raise _wrong(
            path,
            number,
            f"timestamp is {reprlib.repr(time_ms)}; it must be milliseconds, 0 or more",
        )
    input_tokens = _count(path, number, "input_length", entry.get("input_length"))
    output_tokens = _count(path, number, "output_length", entry.get("output_length"))
    block_ids = entry.get("hash_ids", [])
    if not isinstance(block_ids, list) or not all(
        type(each) is int and 0 <= each < _ID_LIMIT for each in block_ids
    ):
        raise _wrong(
            path, number, "hash_ids must be a list of whole numbers, each 0 or more and of 64 bits"
        )  # fmt: skip
    wanted = -(-input_tokens // BLOCK_TOKENS)
    if block_ids and len(block_ids) != wanted:
        raise _wrong(
            path, number, f"it has {len(block_ids)} hash_ids; {input_tokens} tokens have {wanted}, "
            f"one for each {BLOCK_TOKENS}",
        )  # fmt: skip
    client = entry.get("client")
    client = "" if client is None else str(client)
    return TracedRequest(time_ms / 1000, input_tokens, output_tokens, tuple(block_ids), client)


def _date_s(path: Path, number: int, name: str, text: str) -> float:
    try:
        time = datetime.fromisoformat(text)
    except ValueError:
        raise _wrong(
            path, number, f"{name} is {reprlib.repr(text)}; it must be a date and time"
        ) from None
    # Azure's times are UTC and do not say so; local time would jump twice a year.
    return (time if time.tzinfo else time.replace(tzinfo=UTC)).timestamp()


def _seconds(path: Path, number: int, name: str, text: str) -> float:
    try:
        time_s = float(text)
    except ValueError:
        time_s = -1.0
    if not 0 <= time_s < _NEVER_S:
        raise _wrong(path, number, f"{name} is {reprlib.repr(text)}; it must be seconds, 0 or more")
    return time_s


class _CsvFormat(NamedTuple):
    """The columns that tell of a request."""

    time: str
    input_tokens: str
    output_tokens: str
    time_s: Callable[[Path, int, str, str], float]
    holds_failures: bool
    """Requests without output."""

    @property
    def names(self) -> tuple[str, ...]:
        return self[:3]


_CSV_FORMATS: Final = (
    _CsvFormat("TIMESTAMP", "ContextTokens", "GeneratedTokens", _date_s, holds_failures=False),
    _CsvFormat("Timestamp", "Request tokens", "Response tokens", _seconds, holds_failures=True),
)


def _from_csv(path: Path, file: IO[str]) -> Iterator[tuple[int, TracedRequest]]:
    rows = csv.reader(file)
    try:
        header = [name.strip() for name in next(rows)]
        form = next((each for each in _CSV_FORMATS if set(each.names) <= set(header)), None)
        if form is None:
            known = "; ".join(", ".join(each.names) for each in _CSV_FORMATS)
            raise _wrong(path, 1, f"it names neither JSON nor the columns of a known CSV ({known})")
        time_at, input_at, output_at = map(header.index, form.names)
        for row in rows:
            number = rows.line_num
            if row and len(row) < len(header):
                raise _wrong(
                    path, number, f"it has {len(row)} columns; the first line has {len(header)}"
                )
            if not row or (form.holds_failures and row[output_at].strip() == "0"):
                continue
            yield (
                number,
                TracedRequest(
                    form.time_s(path, number, form.time, row[time_at]),
                    _cell_count(path, number, form.input_tokens, row[input_at]),
                    _cell_count(path, number, form.output_tokens, row[output_at]),
                ),
            )
    except csv.Error as error:
        raise _wrong(path, rows.line_num, f"it is no CSV: {error}") from None


def _cell_count(path: Path, number: int, name: str, cell: str) -> int:
    text = cell.strip()
    is_count = text.isdecimal() and len(text) <= _COUNT_DIGITS
    return _count(path, number, name, int(text) if is_count else text)


def _count(path: Path, number: int, name: str, given: Any) -> int:
    if type(given) is not int or given < 1:
        raise _wrong(
            path, number,
            f"{name} is {reprlib.repr(given)}; it must be a whole number of tokens, 1 or more",
        )  # fmt: skip
    return given


def _wrong(path: Path, number: int, what: str) -> TraceError:
    return TraceError(f"{path} line {number}: {what}")


def _open(path: Path) -> IO[str]:
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8", newline="")
    return path.open(encoding="utf-8", newline="")
