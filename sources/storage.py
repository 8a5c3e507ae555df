"""Byte ranges of tensors, read by position so that memory holds only what was asked for."""

from __future__ import annotations

import os
from collections import OrderedDict
from typing import TYPE_CHECKING, Protocol

from ..archs.expressions import TensorInfo
from ..errors import BadInput, Interrupted
from ..files import open_descriptor, read_at

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
        return self._storage.read(tensor, start, stop).to(self.device)


class Storage:
    """Reads tensor rows from files; keeps a few of them open. Not thread-safe.

    Plain reads rather than memory maps: mapped pages would count as this process's memory.
    """

    device = "cpu"

    def __init__(self) -> None:
        self._descriptors: OrderedDict[str, int] = OrderedDict()

    def read(self, tensor: TensorInfo, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Stored bytes of rows `start` to `stop` (all by default), as uint8 [rows, bytes per row].

        Rows count over all leading dimensions. Raises BadInput when the file ends early, Interrupted when the system
        does not give it.
        """
        import torch  # here, so that models are looked at without it

        stop = tensor.rows if stop is None else stop
        row_bytes = tensor.length // max(tensor.rows, 1)
        data = torch.empty((stop - start, row_bytes), dtype=torch.uint8, device="cpu")
        try:
            whole = read_at(self._descriptor(tensor.file), data.numpy().data, tensor.offset + start * row_bytes)
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
        return open_descriptor(file)

    def _forget(self, file: str) -> None:
        """Close a file; it is opened again when somebody reads it."""
        if file in self._descriptors:
            os.close(self._descriptors.pop(file))
