"""Byte ranges of tensors, read by position so that memory holds only what was asked for."""

from __future__ import annotations

import os
from collections import OrderedDict

import torch

from ..archs.weights import TensorInfo
from ..errors import BadInput, Interrupted

_OPEN_FILES = 32


class Storage:
    """Reads tensor rows from files; keeps a few of them open. Not thread-safe.

    Plain reads rather than memory maps: mapped pages would count as this process's memory.
    """

    def __init__(self) -> None:
        self._descriptors: OrderedDict[str, int] = OrderedDict()

    def read(self, tensor: TensorInfo, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Stored bytes of rows `start` to `stop` (all by default), as uint8 [rows, bytes per row].

        Rows count over all leading dimensions. Raises BadInput when the file ends early, Interrupted when the system
        does not give it.
        """
        stop = tensor.rows if stop is None else stop
        row_bytes = tensor.length // max(tensor.rows, 1)
        data = torch.empty((stop - start, row_bytes), dtype=torch.uint8)
        try:
            whole = read_at(self._descriptor(tensor.file), data, tensor.offset + start * row_bytes)
        except OSError as error:
            raise Interrupted(
                f"{tensor.file} cannot be read: {error.strerror}; tensor {tensor.name} lies there"
            ) from None
        if not whole:
            raise BadInput(f"{tensor.file} ends inside tensor {tensor.name}: truncated, fetch the file again")
        return data

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
        return os.open(file, os.O_RDONLY)

    def _forget(self, file: str) -> None:
        """Close a file; it is opened again when somebody reads it."""
        if file in self._descriptors:
            os.close(self._descriptors.pop(file))


def read_at(descriptor: int, values: torch.Tensor, position: int) -> bool:
    """Fill contiguous `values` with the bytes at a position of a file; False when it ends before they are full."""
    view, done = memoryview(values.numpy().data).cast("B"), 0
    while done < len(view):
        count = os.preadv(descriptor, [view[done:]], position + done)
        if count == 0:
            return False
        done += count
    return True


def write_at(descriptor: int, values: torch.Tensor, position: int) -> int:
    """Put the bytes of `values` at a position of a file, and return how many they are. Raises OSError."""
    view, done = memoryview(values.contiguous().numpy().data).cast("B"), 0
    while done < len(view):
        done += os.pwrite(descriptor, view[done:], position + done)
    return done
