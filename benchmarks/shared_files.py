"""Traces and tables that are not part of the project: where benchmarks find them."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from simulator.traces import TraceError


def parser(description: str | None) -> argparse.ArgumentParser:
    """Of a benchmark's command line; `--shared` is what names the directory."""
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawTextHelpFormatter
    )
    made.add_argument("--shared", type=Path, default=Path("../shared"))
    return made


@contextmanager
def needed() -> Iterator[None]:
    """Exit with one sentence if inside a file is absent, or a trace can't be used."""
    try:
        yield
    except TraceError as error:
        _leave(str(error))
    except FileNotFoundError as error:
        _leave(f"{error.filename} is absent")


def _leave(reason: str) -> NoReturn:
    sys.exit(f"{reason}; --shared names the directory that holds traces/ and perf/")
