"""What `benchmarks.goodput` found so far, in a file: no search is made twice by the same code."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

_ROOT: Final = Path(__file__).parents[1]


@dataclass(frozen=True, slots=True)
class Cell:
    """One search."""

    model: str
    workload: str
    policy: str
    seed: int
    share: float
    requests: int
    """Of a cut; 0: as many as the workload says."""
    code: str
    """What made it; see `code_digest`."""


@lru_cache(maxsize=1)
def code_digest() -> str:
    """Of all that a result depends on besides the traces."""
    digest = hashlib.blake2b(digest_size=6)
    for folder in ("protos", "router/core", "kvstore", "engine", "simulator", "benchmarks"):
        for path in sorted(_ROOT.joinpath(folder).rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()


class Store:
    """All searches so far, one to a line; one that was cut off while it was written is none. What
    names a search is a dataclass, `Cell` or another benchmark's."""

    def __init__(self, path: Path, cell_type: Any = Cell) -> None:
        self._path = path
        self._cell_type = cell_type
        self._found: dict[Any, dict[str, Any]] = {}
        kept = ""
        for line in path.read_text().splitlines(keepends=True) if path.exists() else ():
            if line.endswith("\n"):
                self._take(json.loads(line))
                kept += line
        if path.exists():
            path.write_text(kept)

    def found(self, cell: Any) -> dict[str, Any] | None:
        """What the search found, if it is over."""
        return self._found.get(cell)

    def add(self, cell: Any, found: Mapping[str, Any]) -> None:
        """A search is over."""
        line = {**asdict(cell), **found}
        with self._path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        self._take(line)

    def _take(self, line: dict[str, Any]) -> None:
        names = self._cell_type.__slots__
        cell = self._cell_type(**{name: line[name] for name in names})
        self._found[cell] = {name: line[name] for name in line if name not in names}
