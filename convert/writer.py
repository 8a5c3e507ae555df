"""Base class of resumable output writers (GGUF, ONNX): temporary files, journal, atomic rename."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from torch import Tensor

from ..errors import Interrupted
from ..files import sync
from .resume.journal import Journal


class Writer(ABC):
    """Files in the making, as a context manager: leaving it normally completes them.

    Leaving it by an exception removes what was written, unless there is a journal that keeps it.

    Args:
        name: of the output, in the journal's records.
        paths: the finished files; messages name the first, or `shown`.
        temporary: what is written until then.
        journal: goes on with what an earlier run has written, and records every piece.
    """

    def __init__(
        self,
        name: str,
        paths: list[Path],
        temporary: Iterable[Path],
        journal: Journal | None,
        shown: Path | None = None,
    ) -> None:
        self.paths = paths
        self._name = name
        self._shown = shown or paths[0]
        self._temporary = list(temporary)
        self._journal = journal
        self._pieces = {key[1:] for key in journal.done(name)} if journal else set()
        self._descriptors: dict[str, int] = {}
        self.problems: list[str] = []
        """What this run could not write as it was, a line each."""

    def has(self, name: str, first_row: int) -> bool:
        """Whether the piece of a tensor that begins with this row is written, by this run or an earlier one."""
        return (name, first_row) in self._pieces

    @abstractmethod
    def read(self, name: str, first_row: int, count: int) -> Tensor | None:
        """`count` written rows as they were given; None where the file holds their numbers in another form."""

    @abstractmethod
    def write(self, name: str, first_row: int, rows: Tensor) -> None:
        """Put rows of a tensor's planned type, uint8 [rows, row bytes], in their place; rows count over all leading
        dimensions."""

    @abstractmethod
    def _finish(self) -> None:
        """Make everything durable and give the files their names. Raises OSError."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self._discard(error)
            return
        try:
            for descriptor in self._descriptors.values():
                sync(descriptor)
            self._finish()
        except OSError as failure:
            self._discard(failure)
            raise self._failure(failure) from None

    @property
    def _complete(self) -> bool:
        """Whether all data are there, and at most the names are missing."""
        return self._journal is not None and (self._name, "complete") in self._journal

    def _completed(self) -> None:
        """From here on the files may have their names before the journal is gone; Windows names no open file anew."""
        if self._journal:
            self._journal.add((self._name, "complete"))
            self._journal.commit()
        self._close()

    def _wrote(self, name: str, first_row: int, size: int, *descriptors: int) -> None:
        """A piece of a tensor, `size` bytes, is written through `descriptors`."""
        self._pieces.add((name, first_row))
        if self._journal:
            self._journal.add((self._name, name, first_row), size, *descriptors)

    def _close(self) -> None:
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    def _discard(self, error: BaseException) -> None:
        kept = self._journal is not None and self._journal.keeps(error)
        self._close()
        if not kept:
            for path in self._temporary:
                with suppress(OSError):  # what went wrong is worth more than why a leftover stays
                    path.unlink(missing_ok=True)

    def _failure(self, error: OSError) -> Interrupted:
        return Interrupted(f"{self._shown} cannot be written: {error.strerror}; free space or choose another --output")
