"""What a decision compared, of each part of a request: pure values, small enough to keep many."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple, TypeAlias, overload

import numpy as np
from numpy.typing import NDArray

from protos.ids import WorkerId
from router.core.events import Role

Column: TypeAlias = NDArray[np.float64]
"""A value for each worker."""

KEPT: Final = 16
"""Of the workers that were compared for a part: those of least cost, and the one chosen."""


class Candidate(NamedTuple):
    """One worker in one part, and the numbers that were compared: least `cost` wins."""

    worker: WorkerId
    role: Role
    """The part it would have: prefill, or decode (also of a whole request)."""
    cost: float
    numbers: tuple[float, ...]
    """By `Decision.compared`."""


class _Part(NamedTuple):
    role: Role
    workers: tuple[WorkerId, ...]
    values: NDArray[np.float32]
    """A row for each worker: its cost, then its numbers."""


class Shortlist(Sequence[Candidate]):
    """The best candidates of each part, least cost first; 2 kB where as many rows take 20 kB."""

    __slots__ = ("_parts", "left_out")

    def __init__(self) -> None:
        self._parts: list[_Part] = []
        self.left_out = 0
        """How many more were compared."""

    def add(
        self, role: Role, workers: Sequence[WorkerId], chosen: int, compared: NDArray[np.float64]
    ) -> None:
        """Keep the best of one part's candidates, a column for each: its cost, then its numbers."""
        best = compared[0].argsort(kind="stable")[:KEPT]
        kept = best.tolist()
        if chosen not in kept:  # Of many equals, chance chose another.
            best[-1] = kept[-1] = chosen
        values = compared[:, best].T.astype(np.float32, order="C")
        self._parts.append(_Part(role, tuple([workers[at] for at in kept]), values))
        self.left_out += len(workers) - len(kept)

    def __iter__(self) -> Iterator[Candidate]:
        for role, workers, values in self._parts:
            for worker, (cost, *numbers) in zip(workers, values.tolist(), strict=True):
                yield Candidate(worker, role, cost, tuple(numbers))

    def __len__(self) -> int:
        return sum(len(part.workers) for part in self._parts)

    @overload
    def __getitem__(self, at: int) -> Candidate: ...
    @overload
    def __getitem__(self, at: slice) -> list[Candidate]: ...
    def __getitem__(self, at: int | slice) -> Candidate | list[Candidate]:
        return list(self)[at]
