"""Expressions that put the rows or columns of another one in another order."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from .expressions import Expression

Run = tuple[int, int]  # from where to before where


@dataclass(frozen=True)
class _Runs:
    """Some of what `source` has, run after run."""

    source: Expression
    runs: tuple[Run, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        raise NotImplementedError

    @property
    def length(self) -> int:
        return sum(stop - start for start, stop in self.runs)

    @property
    def parts(self) -> tuple[Expression]:
        return (self.source,)

    @property
    def bits(self) -> float:
        return self.source.bits

    @property
    def exact(self) -> str | None:
        return self.source.exact

    def of_expert(self, expert: int | None) -> Expression:
        return self


@dataclass(frozen=True)
class RowRuns(_Runs):
    """Runs of rows of a matrix, or of numbers of a vector."""

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.length, *self.source.shape[1:])

    def within(self, rows: Run | None) -> Iterator[Run]:
        """The runs of the source that some rows of this are, all of them by default."""
        first, last = rows or (0, self.length)
        before = 0
        for start, stop in self.runs:
            low, high = max(first - before, 0), min(last - before, stop - start)
            if low < high:
                yield start + low, start + high
            before += stop - start


@dataclass(frozen=True)
class ColumnRuns(_Runs):
    """Runs of columns of a matrix."""

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.source.shape[:-1], self.length)
