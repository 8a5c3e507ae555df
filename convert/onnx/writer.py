"""Writes the external data of an ONNX model piece by piece: any rows of any weight into their places.

Nothing appears under its final name before all of it is complete and on disk.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from ...errors import OutputExists
from ...files import read_at, sync, sync_folder, write_at
from ...quant.planning.onnx_packing import PACKINGS
from ...quant.planning.onnx_plan import OnnxPlan, Placement, StoredArray
from ...runner.engines import MODEL_NAME
from ..resume.journal import Journal
from ..writer import Writer
from .unpack import unpack_blocks

_DATA_PATTERN = "model-*.onnx_data"


class OnnxWriter(Writer):
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
        names = sorted((*plan.files, *contents), key=lambda name: name != MODEL_NAME)
        paths = [folder / name for name in names]
        self._folder, self._plan, self._contents = folder, plan, contents
        super().__init__(folder.name, paths, [self._part(name) for name in names], journal, folder)
        if not overwrite and self.paths[0].exists() and not self._complete:
            raise OutputExists(self.paths[0])
        try:
            for name, size in plan.files.items():
                self._open(name, size)
            self._recover()
        except OSError as error:
            self._discard(error)
            raise self._failure(error) from None

    def read(self, name: str, first_row: int, count: int) -> None:
        """Blocks are stored unpacked here; nothing gives them back."""

    def write(self, name: str, first_row: int, rows: Tensor) -> None:
        placement = self._plan.placements[name]
        packed = placement.type.name in PACKINGS
        unpacked = unpack_blocks(rows, placement.type.name) if packed else (rows,)
        parts = []
        for array, part in zip(placement.arrays, unpacked, strict=True):
            data = part.contiguous().view(torch.uint8).view(-1, array.row_bytes)
            try:
                self._put(array, placement.stride * first_row, placement.stride, placement.offsets, data)
            except OSError as error:
                raise self._failure(error) from None
            parts += [data] * len(placement.offsets)
        files = {array.file for array in placement.arrays}
        self._wrote(name, first_row, len(rows), parts, *(self._descriptors[file] for file in files))

    def _stored_parts(self, name: str, first_row: int, rows: int) -> Iterator[Tensor]:
        placement = self._plan.placements.get(name)
        if placement is None or not 0 <= first_row < first_row + rows <= _rows_of(placement):
            return
        for array in placement.arrays:
            among = torch.empty((rows, placement.stride, array.row_bytes), dtype=torch.uint8)
            position = array.offset + placement.stride * first_row * array.row_bytes
            read_at(self._descriptors[array.file], among.numpy().data, position)
            yield from (among[:, offset] for offset in placement.offsets)

    def _put(self, array: StoredArray, first_row: int, stride: int, offsets: Sequence[int], data: Tensor) -> None:
        descriptor, position = self._descriptors[array.file], array.offset + first_row * array.row_bytes
        if stride > 1:  # the rows between belong to another weight
            size = stride * data.numel()
            among = torch.empty(size, dtype=torch.uint8)
            read_at(descriptor, among.numpy().data, position)
            for offset in offsets:
                among.view(len(data), stride, -1)[:, offset] = data
            data = among
        write_at(descriptor, data.contiguous().numpy().data, position)

    def _open(self, name: str, size: int) -> None:
        """Open a data file, and write the zeros between its arrays."""
        path = self._part(name)
        if self._complete and not path.exists() and (self._folder / name).exists():
            path = self._folder / name
        descriptor = self._place(name, path, size)
        arrays = {array for placement in self._plan.placements.values() for array in placement.arrays}
        here = sorted((array for array in arrays if array.file == name), key=lambda array: array.offset)
        for array, end in zip(here, [*(array.offset for array in here[1:]), size], strict=True):
            position = array.offset + array.bytes
            write_at(descriptor, memoryview(bytes(end - position)), position)

    def _finish(self) -> None:
        for name, content in self._contents.items():
            with self._part(name).open("wb") as file:
                file.write(content)
                file.flush()
                sync(file.fileno())
        if not self._complete:
            self._remove_stale()
        self._completed()
        for path, part in reversed([*zip(self.paths, self._temporary, strict=True)]):  # the model last
            if part.exists():
                path.parent.mkdir(exist_ok=True)
                os.replace(part, path)
        for folder in {path.parent for path in self.paths}:
            sync_folder(folder)

    def _remove_stale(self) -> None:
        """Whatever model was here goes first, so that its graph never meets other weights."""
        self.paths[0].unlink(missing_ok=True)
        for stale in self._folder.glob(_DATA_PATTERN):
            stale.unlink()

    def _part(self, name: str) -> Path:
        return self._folder / f".{name.replace('/', '.')}.part"

    def _discard(self, error: BaseException) -> None:
        super()._discard(error)
        with suppress(OSError):
            if not any(self._folder.iterdir()):
                self._folder.rmdir()


def _rows_of(placement: Placement) -> int:
    """How many rows the weight has that lies there."""
    array = placement.arrays[0]
    return array.bytes // array.row_bytes // placement.stride
