"""Writes the external data of an ONNX model piece by piece: any rows of any weight into their places.

Nothing appears under its final name before all of it is complete and on disk.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from ...archs.errors import BadInput, Interruption
from ...quant.onnx_plan import OnnxPlan, StoredArray
from ...quant.packing import PACKINGS
from ...runner.onnx_model import MODEL_NAME
from ..journal import Journal, synchronise
from .blocks import unpack_blocks

_DATA_PATTERN = "model-*.onnx_data"


class OnnxWriter:
    """An ONNX model in a folder, whose first path is the model itself. Use it as a context manager.

    Leaving the context normally makes the data files durable, adds the finished `contents` (file name -> bytes), of
    which the model itself comes last, and gives all their names. Leaving it by an exception removes everything that was
    written, unless there is a journal that keeps it.

    Args:
        journal: goes on with what an earlier run has written, and records every piece.

    Raises BadInput when the folder holds a model already and `overwrite` is not set, when the disk is full or the files
    cannot be written.
    """

    def __init__(
        self,
        folder: Path,
        plan: OnnxPlan,
        contents: dict[str, bytes],
        overwrite: bool = False,
        journal: Journal | None = None,
    ) -> None:
        self._folder, self._plan, self._contents, self._journal = folder, plan, contents, journal
        if not overwrite and (folder / MODEL_NAME).exists() and not self._complete:
            raise BadInput(f"{folder / MODEL_NAME} exists: use --overwrite to replace it, or another --output")
        self.paths = [folder / name for name in sorted((*plan.files, *contents), key=lambda name: name != MODEL_NAME)]
        self._temporary = {name: folder / f".{name}.part" for name in (*plan.files, *contents)}
        self._descriptors: dict[str, int] = {}
        try:
            for name, size in plan.files.items():
                self._open(name, size)
        except OSError as error:
            self._discard(error)
            raise self._failure(error) from None

    def has(self, name: str, first_row: int) -> bool:
        """Whether the piece of a tensor that begins with this row is written, by this run or an earlier one."""
        last = len(self._plan.placements[name].arrays) - 1
        return self._journal is not None and (self._folder.name, name, first_row, last) in self._journal

    def read(self, name: str, first_row: int, count: int) -> None:
        """Blocks are stored unpacked here; nothing gives them back."""

    def write(self, name: str, first_row: int, rows: Tensor) -> None:
        """Put rows of the planned ggml type, uint8 [rows, row bytes], where they belong; rows count over all leading
        dimensions."""
        placement = self._plan.placements[name]
        packed = placement.type.name in PACKINGS
        parts = unpack_blocks(rows, placement.type.name) if packed else (rows,)
        for array, part in zip(placement.arrays, parts, strict=True):
            data = part.contiguous().view(torch.uint8).view(-1, array.row_bytes)
            try:
                self._put(array, placement.stride * first_row, placement.stride, placement.offsets, data)
            except OSError as error:
                raise self._failure(error) from None
        if self._journal:
            for number, array in enumerate(placement.arrays):
                key = (self._folder.name, name, first_row, number)
                self._journal.add(key, len(rows) * array.row_bytes, self._descriptors[array.file])

    def _put(self, array: StoredArray, first_row: int, stride: int, offsets: Sequence[int], data: Tensor) -> None:
        descriptor, position = self._descriptors[array.file], array.offset + first_row * array.row_bytes
        if stride > 1:  # the rows between belong to another weight
            size = stride * data.numel()
            among = torch.frombuffer(bytearray(os.pread(descriptor, size, position)), dtype=torch.uint8)
            for offset in offsets:
                among.view(len(data), stride, -1)[:, offset] = data
            data = among
        view, done = memoryview(data.numpy().reshape(-1).data), 0
        while done < len(view):
            done += os.pwrite(descriptor, view[done:], position + done)

    def __enter__(self) -> OnnxWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self._discard(error)
            return
        try:
            self._finish()
        except OSError as failure:
            self._discard(failure)
            raise self._failure(failure) from None

    @property
    def _complete(self) -> bool:
        """Whether all data are there, and at most the names are missing."""
        return self._journal is not None and (self._folder.name, "complete") in self._journal

    def _open(self, name: str, size: int) -> None:
        """A data file of its final size, as an earlier run has left it or new."""
        path = self._temporary[name]
        if self._complete and not path.exists():
            path = self._folder / name
        started = self._complete or (self._journal is not None and self._journal.started(path))
        flags = os.O_RDWR if started else os.O_RDWR | os.O_CREAT | os.O_TRUNC
        self._descriptors[name] = os.open(path, flags, 0o666)
        if not started:
            os.posix_fallocate(self._descriptors[name], 0, size)
            if self._journal:
                self._journal.start(path)

    def _finish(self) -> None:
        """Make everything durable and give the files their names, the model last."""
        for descriptor in self._descriptors.values():
            os.fsync(descriptor)
        for name, content in self._contents.items():
            with self._temporary[name].open("wb") as file:
                file.write(content)
                os.fsync(file.fileno())
        if not self._complete:
            self._remove_stale()
        if self._journal:  # from here on the files may have their names before the journal is gone
            self._journal.add((self._folder.name, "complete"))
            self._journal.commit()
        for path in (*self.paths[1:], self.paths[0]):
            if self._temporary[path.name].exists():
                os.replace(self._temporary[path.name], path)
        synchronise(self._folder)
        self._close()

    def _remove_stale(self) -> None:
        """Whatever model was here goes first, so that its graph never meets other weights."""
        (self._folder / MODEL_NAME).unlink(missing_ok=True)
        for stale in self._folder.glob(_DATA_PATTERN):
            stale.unlink()

    def _close(self) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    def _discard(self, error: BaseException) -> None:
        kept = self._journal is not None and self._journal.keeps(error)
        self._close()
        if kept:
            return
        for path in self._temporary.values():
            path.unlink(missing_ok=True)
        if not any(self._folder.iterdir()):
            self._folder.rmdir()

    def _failure(self, error: OSError) -> Interruption:
        return Interruption(
            f"{self._folder} cannot be written: {error.strerror}; free space or choose another --output"
        )
