"""Writes pieces in a thread of its own, in the order in which they were made, while the next are being made."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import NamedTuple, Self

from torch import Tensor

from .writer import Writer

_LOOK = 0.2  # seconds after which who waits looks up, because some systems tell of Ctrl-C only then


class _Piece(NamedTuple):
    name: str
    first_row: int
    rows: Tensor


class WriteBehind:
    """A writer that is waited for only when too much waits for it. Use it as a context manager.

    What goes wrong with a piece is raised by the next call. After `flush` the writer, and the journal that it writes,
    are the caller's until the next piece. Leaving the context writes what waits, unless that goes wrong; only a second
    Ctrl-C drops it.

    Args:
        limit: most bytes that wait; a larger piece is written at once.
    """

    def __init__(self, writer: Writer, limit: int) -> None:
        self._writer = writer
        self._limit = limit
        self._waiting: deque[_Piece] = deque()  # the first is being written
        self._bytes = 0  # of those
        self._failure: BaseException | None = None
        self._ending = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, daemon=True)

    @property
    def problems(self) -> list[str]:
        """What could not be written as it was, a line each."""
        return self._writer.problems

    def has(self, name: str, first_row: int) -> bool:
        """Whether the piece that begins with this row is written, or waits for it."""
        with self._changed:
            waits = any((piece.name, piece.first_row) == (name, first_row) for piece in self._waiting)
            return waits or self._writer.has(name, first_row)

    def read(self, name: str, first_row: int, count: int) -> Tensor | None:
        """What `Writer.read` gives once all that waits of this tensor is written."""
        self._await(lambda: all(piece.name != name for piece in self._waiting))
        return self._writer.read(name, first_row, count)

    def write(self, name: str, first_row: int, rows: Tensor) -> None:
        """Put rows in their place; nobody may change them any more. See `Writer.write`."""
        if rows.nbytes > self._limit:
            self.flush()
            self._writer.write(name, first_row, rows)
            return
        self._await(lambda: self._bytes + rows.nbytes <= self._limit)
        with self._changed:
            self._waiting.append(_Piece(name, first_row, rows))
            self._bytes += rows.nbytes
            self._changed.notify_all()

    def flush(self) -> None:
        """Wait until all is written."""
        self._await(lambda: not self._waiting)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._changed:
            self._ending = True
            self._changed.notify_all()
        while self._thread.is_alive():
            try:
                self._thread.join(_LOOK)
            except KeyboardInterrupt:
                with self._changed:
                    while len(self._waiting) > 1:
                        self._waiting.pop()
        if error is None:
            self.flush()  # nothing waits: it raises what went wrong

    def _await(self, condition: Callable[[], bool]) -> None:
        """Wait for something. Raises what went wrong with a piece."""
        with self._changed:
            while self._failure is None and not condition():
                self._changed.wait(_LOOK)
            if self._failure is not None:
                raise self._failure

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._ending)
                if not self._waiting:
                    return
                piece = self._waiting[0]
            try:
                self._writer.write(*piece)
            except BaseException as error:  # the maker's business, in whose thread it can be raised
                self._failure = error
            with self._changed:
                self._waiting.popleft()
                self._bytes -= piece.rows.nbytes
                if self._failure is not None:
                    self._waiting.clear()
                    self._ending = True
                self._changed.notify_all()
