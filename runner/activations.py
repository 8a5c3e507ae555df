"""Activations between blocks, kept chunk by chunk: on a GPU, in memory, or in scratch files where memory is short."""

from __future__ import annotations

import tempfile
import weakref
from math import prod
from pathlib import Path
from typing import Protocol, Self

import torch
from torch import Tensor

from ..errors import Interrupted
from ..files import allow_open_files, read_at, reserve, write_at
from .placement import CPU, Placement

BUFFER_BYTES = 64 << 20  # of what is read before its turn comes, and as much of what waits to be written
_FLOAT = 4  # bytes
_FILES = 8192  # every activation on disk is an open file, and there are hundreds of streams


class Activations(Protocol):
    """float32 [chunks, tokens, ...], zeros at first; read and written a chunk at a time, or by rows of all chunks.

    What is read lies on the device that computes, what is written may lie anywhere. Where activations are kept changes
    no number: every row is added to in the same order, one value at a time.
    """

    def __len__(self) -> int:
        """Number of chunks."""

    def __getitem__(self, chunk: int) -> Tensor:
        """[tokens, ...], to be changed only by storing it again."""

    def __setitem__(self, chunk: int, values: Tensor) -> None: ...

    def rows(self, indices: Tensor) -> Tensor:
        """The tokens of these numbers, counted over all chunks, [indices, ...]."""

    def add_rows(self, indices: Tensor, values: Tensor) -> None:
        """Add [indices, ...] to these tokens; each number stands there once."""


class Workspace:
    """Where activations are kept. Use it as a context manager: leaving it closes the scratch files that are left.

    Args:
        memory: most bytes of them in memory; what comes beyond goes to disk. None: all of them in memory.
        folder: where the scratch files are; they have no names, so nothing stays behind. None: the system's choice.
        placement: where they are used; in a GPU's own memory there are as many as it has room for.
        buffer: most bytes to read before their turn comes, and as many may wait to be written.
    """

    def __init__(
        self,
        memory: int | None = None,
        folder: Path | None = None,
        placement: Placement = Placement(),
        buffer: int = BUFFER_BYTES,
    ) -> None:
        self.buffer = buffer
        self.device, self.experts_at_once = placement.device, placement.experts_at_once
        self._tiers = [_Tier(CPU, memory, self.device, pinned=placement.has_own_memory)]
        if placement.has_own_memory:
            self._tiers.insert(0, _Tier(self.device, placement.room, self.device))
        self._folder = folder
        self._on_disk: weakref.WeakSet[DiskActivations] = weakref.WeakSet()
        if memory is not None:
            allow_open_files(_FILES)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        for activations in self._on_disk:
            activations.close()

    def activations(self, *shape: int, whole_chunks: bool = False) -> Activations:
        """New activations. Those that are only read and written by `whole_chunks` suffer little from lying far away, so
        they leave room for others. Raises Interrupted when the disk is full."""
        for tier in self._tiers:
            if tier.holds(_FLOAT * prod(shape) * (3 if whole_chunks else 1)):
                return tier.activations(*shape)
        on_disk = DiskActivations(self._folder, *shape, device=self.device)
        self._on_disk.add(on_disk)
        return on_disk


class _Tier:
    """Memory for activations, `left` bytes of it, None for as much as it takes; `pinned` memory is a GPU's to read."""

    def __init__(self, place: torch.device, left: int | None, device: torch.device, pinned: bool = False) -> None:
        self._place, self._left, self._device, self._pinned = place, left, device, pinned

    def holds(self, size: int) -> bool:
        return self._left is None or self._taken(size) <= self._left

    def activations(self, *shape: int) -> MemoryActivations:
        values = MemoryActivations(*shape, place=self._place, device=self._device, pinned=self._pinned)
        if self._left is not None:
            size = self._taken(_FLOAT * prod(shape))
            self._left -= size
            weakref.finalize(values, self._release, size)
        return values

    def _taken(self, size: int) -> int:
        """What the allocator takes: pinned memory comes in powers of two."""
        return 1 << (size - 1).bit_length() if self._pinned and size else size

    def _release(self, size: int) -> None:
        assert self._left is not None
        self._left += size


class MemoryActivations:
    """Activations in memory, a GPU's or the process's."""

    def __init__(
        self, *shape: int, place: torch.device = CPU, device: torch.device = CPU, pinned: bool = False
    ) -> None:
        self._values = torch.zeros(shape, device=place, pin_memory=pinned)
        self._place, self._device = place, device

    def __len__(self) -> int:
        return len(self._values)

    def __getitem__(self, chunk: int) -> Tensor:
        return self._values[chunk].to(self._device)

    def __setitem__(self, chunk: int, values: Tensor) -> None:
        self._values[chunk] = values.to(self._place)

    def rows(self, indices: Tensor) -> Tensor:
        return self._values.flatten(0, 1)[indices.to(self._place)].to(self._device)

    def add_rows(self, indices: Tensor, values: Tensor) -> None:
        self._values.flatten(0, 1).index_add_(0, indices.to(self._place), values.to(self._place))


class DiskActivations:
    """Activations in a scratch file, by plain reads and writes: mapped pages would count as this process's memory."""

    def __init__(self, folder: Path | None, *shape: int, device: torch.device = CPU) -> None:
        self._shape, self._device = shape, device
        self._row_bytes = _FLOAT * prod(shape[2:])
        try:
            self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - closed by the workspace, or when the object goes
            reserve(self._file.fileno(), shape[0] * shape[1] * self._row_bytes)
        except OSError as error:
            where = folder or tempfile.gettempdir()
            raise Interrupted(f"{where} has no room for activations ({error.strerror}): free space there") from None

    def __len__(self) -> int:
        return self._shape[0]

    def __getitem__(self, chunk: int) -> Tensor:
        values = torch.empty(self._shape[1:], device=CPU)
        self._read(values, chunk * self._shape[1])
        return values.to(self._device)

    def __setitem__(self, chunk: int, values: Tensor) -> None:
        self._write(values, chunk * self._shape[1])

    def rows(self, indices: Tensor) -> Tensor:
        return self._rows(indices).to(self._device)

    def add_rows(self, indices: Tensor, values: Tensor) -> None:
        for index, sum in zip(indices.tolist(), self._rows(indices) + values.cpu(), strict=True):
            self._write(sum, index)

    def _rows(self, indices: Tensor) -> Tensor:
        values = torch.empty(len(indices), *self._shape[2:], device=CPU)
        for place, index in enumerate(indices.tolist()):
            self._read(values[place], index)
        return values

    def close(self) -> None:
        """Give the disk's space back."""
        self._file.close()

    def _read(self, values: Tensor, row: int) -> None:
        read_at(self._file.fileno(), values.numpy().data, row * self._row_bytes)

    def _write(self, values: Tensor, row: int) -> None:
        write_at(self._file.fileno(), values.cpu().contiguous().numpy().data, row * self._row_bytes)
