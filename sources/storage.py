"""Byte ranges of tensors, read by position so that memory holds only what was asked for."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from ..archs.expressions import TensorInfo
from ..errors import BadInput, Interrupted
from ..files import open_descriptor, read_at
from .read_ahead import ReadAhead, StoredRows

if TYPE_CHECKING:
    import torch

_OPEN_FILES = 32


class Reader(Protocol):
    """What weights are decoded from: bytes, which lie where the numbers made of them will."""

    @property
    def device(self) -> torch.device | str:
        """Where that is."""

    def read(self, tensor: TensorInfo, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Stored bytes of rows `start` to `stop` (all by default), as uint8 [rows, bytes per row]."""


class OnDevice:
    """A storage as seen from a device: here bytes become tensors of that device."""

    def __init__(self, storage: Reader, device: torch.device) -> None:
        self._storage = storage
        self.device = device

    def read(self, tensor: TensorInfo, start: int = 0, stop: int | None = None) -> torch.Tensor:
        data = self._storage.read(tensor, start, stop)
        if self.device.type == "cuda":  # which fetches from pinned memory while we go on
            return data.pin_memory().to(self.device, non_blocking=True)
        return data.to(self.device)


class Storage:
    """Reads tensor rows from files; keeps a few of them open. For one thread, beside which another may read ahead.

    Plain reads rather than memory maps: mapped pages would count as this process's memory.
    """

    device = "cpu"

    def __init__(self) -> None:
        self._descriptors: OrderedDict[str, int] = OrderedDict()
        self._ahead: ReadAhead | None = None

    def read(self, tensor: TensorInfo, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Stored bytes of rows `start` to `stop` (all by default), as uint8 [rows, bytes per row].

        Rows count over all leading dimensions. Raises BadInput when the file ends early, Interrupted when the system
        does not give it.
        """
        rows = StoredRows(tensor, start, tensor.rows if stop is None else stop)
        data = self._ahead.take(rows) if self._ahead else None
        if data is not None:
            return data
        try:
            data = _bytes_of(rows, self._descriptor(tensor.file))
        except OSError as error:
            raise Interrupted(
                f"{tensor.file} cannot be read: {error.strerror}; tensor {tensor.name} lies there"
            ) from None
        if data is None:
            raise BadInput(f"{tensor.file} ends inside tensor {tensor.name}: truncated, fetch the file again")
        return data

    @contextmanager
    def reading_ahead(self, steps: Iterable[Iterable[StoredRows]], limit: int) -> Iterator[None]:
        """While this lasts, a thread reads what the next of some steps will ask for. See `ReadAhead`."""
        before = self._ahead
        with ReadAhead(steps, self._read_beside, limit) as self._ahead:
            try:
                yield
            finally:
                self._ahead = before

    def close(self) -> None:
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    def _descriptor(self, file: str) -> int:
        if file in self._descriptors:
            self._descriptors.move_to_end(file)
            return self._descriptors[file]
        if len(self._descriptors) >= _OPEN_FILES:
            os.close(self._descriptors.popitem(last=False)[1])
        self._descriptors[file] = self._open(file)
        return self._descriptors[file]

    def _open(self, file: str) -> int:
        """A descriptor for reading what tensors name as their file."""
        return open_descriptor(file)

    def _path(self, file: str) -> Path | str | None:
        """Where that file is at the moment, None while it is not here. For any thread."""
        return file

    def _read_beside(self, rows: StoredRows) -> torch.Tensor | None:
        """What `read` gives, for another thread, by a descriptor of its own; None where the file is not here or ends
        early. Raises OSError."""
        path = self._path(rows.tensor.file)
        if path is None:
            return None
        descriptor = open_descriptor(path)
        try:
            return _bytes_of(rows, descriptor)
        finally:
            os.close(descriptor)

    def _forget(self, file: str) -> None:
        """Close a file; it is opened again when somebody reads it."""
        if file in self._descriptors:
            os.close(self._descriptors.pop(file))


def _bytes_of(rows: StoredRows, descriptor: int) -> torch.Tensor | None:
    """Rows of a tensor of a file, uint8 [rows, bytes per row]; None when the file ends before. Raises OSError."""
    import torch  # here, so that models are looked at without it

    tensor, count = rows.tensor, rows.stop - rows.start
    row_bytes = tensor.length // max(tensor.rows, 1)
    pinned = torch.cuda.is_initialized()  # a GPU in use fetches it from there without stopping anybody
    data = torch.empty((count, row_bytes), dtype=torch.uint8, device="cpu", pin_memory=pinned)
    return data if read_at(descriptor, data.numpy().data, tensor.offset + rows.start * row_bytes) else None
