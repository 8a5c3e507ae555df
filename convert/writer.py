"""Base class of resumable output writers (GGUF, ONNX): temporary files, journal, atomic rename."""

from __future__ import annotations

import os
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from ..errors import Interrupted
from ..files import open_descriptor, reserve, sync
from .resume.journal import Journal
from .resume.records import Key


class Writer(ABC):
    """Files in the making, as a context manager: leaving it normally completes them.

    Leaving it by an exception removes what was written, unless there is a journal that keeps it.

    Args:
        name: of the output, in the journal's records.
        paths: the finished files; messages name the first, or `shown`.
        temporary: what is written until then.
        journal: goes on with what an earlier run has written, and records every piece with its checksum. Subclasses
            open their files with `_place`, and then `_recover`.
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
        self._pieces: dict[tuple[str, int], int] = {}  # checksums, 0 without a journal
        self._descriptors: dict[str, int] = {}
        self.problems: list[str] = []
        """What this run could not write as it was, a line each."""
        self.bytes_there = 0
        """What earlier runs have written of the output's data."""

    def has(self, name: str, first_row: int) -> bool:
        """Whether the piece of a tensor that begins with this row is written, by this run or an earlier one."""
        return (name, first_row) in self._pieces

    def checksum(self, name: str, first_row: int) -> int:
        """The CRC-32 of a written piece; 0 without a journal, which it is for."""
        return self._pieces[name, first_row]

    @abstractmethod
    def read(self, name: str, first_row: int, count: int) -> Tensor | None:
        """`count` written rows as they were given; None where the file holds their numbers in another form."""

    @abstractmethod
    def write(self, name: str, first_row: int, rows: Tensor) -> None:
        """Put rows of a tensor's planned type, uint8 [rows, row bytes], in their place; rows count over all leading
        dimensions."""

    @abstractmethod
    def _stored_parts(self, name: str, first_row: int, rows: int) -> Iterator[Tensor]:
        """The bytes of written rows in the order in which they were summed up; none for rows that no tensor has."""

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

    def _wrote(self, name: str, first_row: int, rows: int, parts: Iterable[Tensor], *descriptors: int) -> None:
        """So many rows of a tensor are written through `descriptors`, by `parts` that `_stored_parts` would give."""
        checksum = 0
        if self._journal:
            size, checksum = _summed_up(parts)
            self._journal.add((self._name, name, first_row, rows, checksum), size, *descriptors)
        self._pieces[name, first_row] = checksum

    def _place(self, key: str, path: Path, size: int) -> int:
        """Open a file for reading and writing at its final size; what an earlier run has put there stays.

        The descriptor goes by `key`. Raises OSError.
        """
        if self._journal and path in self._temporary:
            self._journal.start(path)
        new = 0 if self._journal else os.O_TRUNC
        descriptor = self._descriptors[key] = open_descriptor(path, os.O_RDWR | os.O_CREAT | new)
        found = os.fstat(descriptor).st_size
        if found > size:
            os.ftruncate(descriptor, size)
        elif found < size:
            reserve(descriptor, size)
        return descriptor

    def _recover(self) -> None:
        """Take over what an earlier run has written and is as it was; the rest is written again."""
        if self._journal is None:
            return
        pieces = sorted({key[1:] for key in self._journal.done(self._name) if _is_piece(key)})
        if not pieces:
            return
        progress, damaged = self._journal.progress, 0
        progress.begin("Checking what is there", len(pieces), "pieces")
        for name, first_row, rows, checksum in pieces:
            size, found = _summed_up(self._stored_parts(str(name), int(first_row), int(rows)))
            if size and found == checksum:
                self._pieces[str(name), int(first_row)] = found
                self.bytes_there += size
            else:
                damaged += 1
            progress.advance(1, str(name))
        if damaged:
            progress.note(f"{self._shown}: {damaged} of {len(pieces)} pieces are not as they were: written again")

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


def _is_piece(key: Key) -> bool:
    """Whether a key names a piece: the output, a tensor, its first row, how many rows, their checksum."""
    return tuple(map(type, key)) == (str, str, int, int, int)


def _summed_up(parts: Iterable[Tensor]) -> tuple[int, int]:
    """How many bytes parts have together, and their CRC-32."""
    size = checksum = 0
    for part in parts:
        content = part.contiguous().view(torch.uint8).numpy().data
        size, checksum = size + content.nbytes, zlib.crc32(content, checksum)
    return size, checksum
