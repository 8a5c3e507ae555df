"""Reads what will soon be asked for in a thread of its own, while what came before is computed with."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, NamedTuple, Self

from ..archs.expressions import Columns, Expression, Padded, Rows, Stack, TensorInfo, Transposed, stored_tensors
from ..archs.rearranged import RowRuns

if TYPE_CHECKING:
    import torch

_STEPS = 2  # beyond the one in use
_LOOK = 0.2  # seconds after which who waits looks up, because some systems tell of Ctrl-C only then


class StoredRows(NamedTuple):
    """Rows `start` to `stop` of a stored tensor, counted over all its leading dimensions."""

    tensor: TensorInfo
    start: int
    stop: int

    @property
    def bytes(self) -> int:
        return (self.stop - self.start) * (self.tensor.length // max(self.tensor.rows, 1))

    def contain(self, others: StoredRows) -> bool:
        """Whether others, of the same tensor, are among these."""
        return self.start <= others.start < others.stop <= self.stop


def stored_rows(source: Expression, expert: int | None, rows: tuple[int, int] | None) -> Iterator[StoredRows]:
    """What `decode.evaluate` reads for the same arguments, without what is small: vectors, and scales of some rows."""
    if isinstance(source, Stack):
        assert expert is not None
        yield from stored_rows(source.experts[expert], None, rows)
    elif isinstance(source, Rows):
        yield from stored_rows(source.source, expert, source.span(rows))
    elif isinstance(source, Columns):
        yield from stored_rows(source.source, expert, rows)
    elif isinstance(source, Transposed):
        yield from stored_rows(source.source, expert, None)
    elif isinstance(source, RowRuns) and len(source.shape) > 1:
        for run in source.within(rows):
            yield from stored_rows(source.source, expert, run)
    elif isinstance(source, Padded) and len(source.shape) > 1:
        start, stop = (min(row, source.source.shape[-2]) for row in rows or (0, source.shape[-2]))
        yield from stored_rows(source.source, expert, (start, stop))
    elif len(source.shape) > 1:
        height = source.shape[-2]
        start, stop = rows or (0, height)
        first = (expert or 0) * height
        for tensor in stored_tensors(source):
            if len(tensor.shape) > 1 and tensor.shape[-2] == height:
                yield StoredRows(tensor, first + start, first + stop)
            elif (start, stop) == (0, height) and expert is None:
                yield StoredRows(tensor, 0, tensor.rows)


@dataclass(eq=False)
class _Announced:
    """Rows that a step will ask for, and their bytes once they are read; `passed` when nobody waits for these."""

    rows: StoredRows
    step: int
    data: torch.Tensor | None = None
    passed: bool = False


class ReadAhead:
    """Reads the rows of the next steps of some work; a context manager, which ends with it.

    The rows of a step are kept until a later one asks for its own. What was not announced, is not read yet, or could
    not be read is left to whoever needs it: reading ahead raises nothing.

    Args:
        steps: the rows that each step asks for, in order.
        read: gives the bytes of rows, uint8 [rows, row bytes], from another thread; None where they are not at hand.
        limit: most bytes that are kept, those of the step in use included.
    """

    def __init__(
        self, steps: Iterable[Iterable[StoredRows]], read: Callable[[StoredRows], torch.Tensor | None], limit: int
    ) -> None:
        self._read = read
        self._limit = limit
        unique = ((number, rows) for number, step in enumerate(steps) for rows in dict.fromkeys(step))
        self._announced = [_Announced(rows, number) for number, rows in unique if 0 < rows.bytes <= limit]
        self._of_tensor: dict[TensorInfo, list[_Announced]] = {}
        for announced in self._announced:
            self._of_tensor.setdefault(announced.rows.tensor, []).append(announced)
        self._step = 0  # in use
        self._kept = 0  # bytes
        self._reading: _Announced | None = None
        self._stopped = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        if self._announced and self._announced[-1].step > 0:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        if self._thread.ident is not None:
            self._thread.join()  # at most one read of a file that is here

    def take(self, rows: StoredRows) -> torch.Tensor | None:
        """The bytes of rows that lie within announced ones; None when they are to be read now, by who asks."""
        with self._changed:
            candidates = (a for a in self._of_tensor.get(rows.tensor, ()) if a.step >= self._step)
            announced = next((a for a in candidates if a.rows.contain(rows)), None)
            if announced is None:
                return None
            self._enter(announced.step)
            while announced is self._reading:
                self._changed.wait(_LOOK)
            announced.passed = True
            first = announced.rows.start
            return None if announced.data is None else announced.data[rows.start - first : rows.stop - first]

    def _enter(self, step: int) -> None:
        """A step has begun: what those before it had is of no use any more."""
        if step > self._step:
            self._step = step
            for announced in self._announced:
                if announced.step < step and announced.data is not None:
                    self._kept -= announced.rows.bytes
                    announced.data = None
            self._changed.notify_all()

    def _run(self) -> None:
        for announced in self._announced:
            with self._changed:
                self._changed.wait_for(partial(self._is_decided, announced))
                if self._stopped:
                    return
                if self._is_late(announced):
                    continue
                self._reading = announced
            try:
                data = self._read(announced.rows)
            except Exception:  # whoever needs it meets the same, where it can be raised
                data = None
            with self._changed:
                self._reading = None
                if data is not None and announced.step >= self._step:
                    announced.data = data
                    self._kept += announced.rows.bytes
                self._changed.notify_all()

    def _is_decided(self, announced: _Announced) -> bool:
        """Whether it can be read now, or need not be."""
        near = announced.step <= self._step + _STEPS
        return self._stopped or self._is_late(announced) or (near and self._kept + announced.rows.bytes <= self._limit)

    def _is_late(self, announced: _Announced) -> bool:
        return announced.passed or announced.step < self._step
