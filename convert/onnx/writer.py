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

from ...archs.errors import BadInput
from ...quant.onnx_plan import OnnxPlan, StoredArray
from ...quant.packing import PACKINGS
from ...runner.onnx_model import MODEL_NAME
from ..gguf_writer import sync_folder
from .blocks import unpack_blocks

_DATA_PATTERN = "model-*.onnx_data"


class OnnxWriter:
    """An ONNX model in a folder, whose first path is the model itself. Use it as a context manager.

    Leaving the context normally makes the data files durable, adds the finished `contents` (file name -> bytes), of
    which the model itself comes last, and gives all their names. Leaving it by an exception removes everything that was
    written.

    Raises BadInput when the folder holds a model already and `overwrite` is not set, when the disk is full or the files
    cannot be written.
    """

    def __init__(self, folder: Path, plan: OnnxPlan, contents: dict[str, bytes], overwrite: bool = False) -> None:
        self._folder, self._plan, self._contents = folder, plan, contents
        if not overwrite and (folder / MODEL_NAME).exists():
            raise BadInput(f"{folder / MODEL_NAME} exists: use --overwrite to replace it, or another --output")
        self.paths = [folder / name for name in sorted((*plan.files, *contents), key=lambda name: name != MODEL_NAME)]
        self._temporary = {name: folder / f".{name}.part" for name in (*plan.files, *contents)}
        self._descriptors: dict[str, int] = {}
        try:
            for name, size in plan.files.items():
                self._descriptors[name] = os.open(self._temporary[name], os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
                os.posix_fallocate(self._descriptors[name], 0, size)
        except OSError as error:
            self._discard()
            raise self._failure(error) from None

    def write(self, name: str, first_row: int, rows: Tensor) -> None:
        """Put rows of the planned ggml type, uint8 [rows, row bytes], where they belong; rows count over all leading
        dimensions."""
        placement = self._plan.placements[name]
        packed = placement.type.name in PACKINGS
        for array, part in zip(
            placement.arrays, unpack_blocks(rows, placement.type.name) if packed else (rows,), strict=True
        ):
            data = part.contiguous().view(torch.uint8).view(-1, array.row_bytes)
            try:
                self._put(array, placement.stride * first_row, placement.stride, placement.offsets, data)
            except OSError as error:
                raise self._failure(error) from None

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
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._discard()
            return
        try:
            for descriptor in self._descriptors.values():
                os.fsync(descriptor)
            for name, content in self._contents.items():
                with self._temporary[name].open("wb") as file:
                    file.write(content)
                    os.fsync(file.fileno())
            self._rename()
        except OSError as failure:
            raise self._failure(failure) from None
        finally:
            self._discard()

    def _rename(self) -> None:
        """Whatever model was here goes first, so that its graph never meets other weights."""
        model = self._folder / MODEL_NAME
        model.unlink(missing_ok=True)
        for stale in self._folder.glob(_DATA_PATTERN):
            stale.unlink()
        for path in (*self.paths[1:], model):
            os.replace(self._temporary[path.name], path)
        sync_folder(self._folder)

    def _discard(self) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()
        for path in self._temporary.values():
            path.unlink(missing_ok=True)
        if not any(self._folder.iterdir()):
            self._folder.rmdir()

    def _failure(self, error: OSError) -> BadInput:
        return BadInput(f"{self._folder} cannot be written: {error.strerror}; free space or choose another --output")
