"""Writes GGUF files piece by piece: the header first, then any rows of any tensor into their slot.

Nothing appears under its final name before it is complete and on disk.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from ...errors import OutputExists
from ...files import read_at, sync_folder, write_at
from ...quant.planning.plan import ALIGNMENT, StoredTensor
from ...sources.gguf import SPLIT_NAME
from ..resume.journal import Journal
from ..writer import Writer


@dataclass(frozen=True)
class _Slot:
    descriptor: int
    offset: int
    row_bytes: int
    rows: int


class GGUFWriter(Writer):
    """One GGUF file, or several when a split size is given. Use it as a context manager.

    Leaving the context normally makes the files durable and gives them their names. Leaving it by an exception removes
    what was written, unless there is a journal that keeps it.

    Args:
        path: the file; splits are named `<stem>-00001-of-00003.gguf`.
        metadata: keys and values: int is stored as u32, float as f32, lists by their elements (i32, f32, str).
        tensors: what will be written, in file order.
        split_max_bytes: largest data section of one file; a single tensor may exceed it.
        overwrite: replace files of these names, once the new ones are complete.
        journal: goes on with what an earlier run has written, and records every piece.

    Raises BadInput when a file exists already, when the disk is full or the files cannot be written.
    """

    def __init__(
        self,
        path: Path,
        metadata: Mapping[str, Any],
        tensors: Sequence[StoredTensor],
        split_max_bytes: int | None = None,
        overwrite: bool = False,
        journal: Journal | None = None,
    ) -> None:
        parts = _split(tensors, split_max_bytes)
        files = _names(path, len(parts))
        super().__init__(path.name, files, [file.with_name(f".{file.name}.part") for file in files], journal)
        self._slots: dict[str, _Slot] = {}
        existing = next((file for file in self.paths if file.exists()), None)
        if existing and not overwrite and not self._complete:
            raise OutputExists(existing)
        try:
            for number, part in enumerate(parts):
                self._open(number, part, _split_metadata(metadata, number, len(parts), len(tensors)))
            self._recover()
        except OSError as error:
            self._discard(error)
            raise self._failure(error) from None

    def read(self, name: str, first_row: int, count: int) -> Tensor:
        slot = self._slots[name]
        data = torch.empty((count, slot.row_bytes), dtype=torch.uint8)
        read_at(slot.descriptor, data.numpy().data, slot.offset + first_row * slot.row_bytes)
        return data

    def write(self, name: str, first_row: int, rows: Tensor) -> None:
        slot = self._slots[name]
        position = slot.offset + first_row * slot.row_bytes
        try:
            write_at(slot.descriptor, rows.contiguous().numpy().data, position)
        except OSError as error:
            raise self._failure(error) from None
        self._wrote(name, first_row, len(rows), [rows], slot.descriptor)

    def _stored_parts(self, name: str, first_row: int, rows: int) -> Iterator[Tensor]:
        slot = self._slots.get(name)
        if slot and 0 <= first_row < first_row + rows <= slot.rows:
            yield self.read(name, first_row, rows)

    def _open(self, number: int, tensors: Sequence[StoredTensor], metadata: Mapping[str, Any]) -> None:
        """Open one file, and write all that is no tensor: its header, and the zeros behind tensors."""
        path = self._temporary[number]
        if self._complete and not path.exists() and self.paths[number].exists():
            path = self.paths[number]
        header = self._header(metadata, tensors)
        offset = len(header)
        size = offset + sum(tensor.aligned_bytes for tensor in tensors)
        descriptor = self._place(self._temporary[number].name, path, size)
        write_at(descriptor, memoryview(header), 0)
        for tensor in tensors:
            rows = tensor.bytes // tensor.row_bytes
            self._slots[tensor.name] = _Slot(descriptor, offset, tensor.row_bytes, rows)
            padding = tensor.aligned_bytes - tensor.bytes
            write_at(descriptor, memoryview(bytes(padding)), offset + tensor.bytes)
            offset += tensor.aligned_bytes

    def _header(self, metadata: Mapping[str, Any], tensors: Sequence[StoredTensor]) -> bytes:
        with tempfile.TemporaryDirectory(dir=self._journal.folder if self._journal else None) as folder:
            scratch = Path(folder, "header")
            offset = header_bytes(scratch, metadata, tensors)
            return scratch.read_bytes().ljust(offset, b"\0")

    def _finish(self) -> None:
        self._completed()
        for temporary, final in zip(self._temporary, self.paths, strict=True):
            if temporary.exists():
                os.replace(temporary, final)
        sync_folder(self.paths[0].parent)


def _split(tensors: Sequence[StoredTensor], most: int | None) -> list[list[StoredTensor]]:
    """Consecutive tensors grouped so that no group exceeds `most` bytes, unless one tensor alone does."""
    parts: list[list[StoredTensor]] = [[]]
    size = 0
    for tensor in tensors:
        if most is not None and parts[-1] and size + tensor.aligned_bytes > most:
            parts.append([])
            size = 0
        parts[-1].append(tensor)
        size += tensor.aligned_bytes
    return parts


def _names(path: Path, count: int) -> list[Path]:
    if count == 1:
        return [path]
    return [path.with_name(SPLIT_NAME.format(prefix=path.stem, number=n + 1, count=count)) for n in range(count)]


def _split_metadata(metadata: Mapping[str, Any], number: int, count: int, tensors: int) -> Mapping[str, Any]:
    """All keys go into the first file; every file of a split says which one it is."""
    if count == 1:
        return metadata
    split = {"split.no": _U16(number), "split.count": _U16(count), "split.tensors.count": _I32(tensors)}
    return {**(metadata if number == 0 else {}), **split}


_UNUSED = np.dtype(np.float32)  # the package asks for a numpy dtype and then takes the type id


class _U16(int):
    """Stored as u16, the type that llama.cpp demands for split numbers."""


class _I32(int):
    """Stored as i32, the type that llama.cpp demands for the tensor count of a split."""


def _write_header(path: Path, metadata: Mapping[str, Any], tensors: Sequence[StoredTensor]) -> None:
    writer = gguf.GGUFWriter(path, arch="")
    writer.kv_data[0].clear()  # the architecture is among our keys, and only the first file of a split has it
    for key, value in metadata.items():
        _add(writer, key, value)
    for tensor in tensors:
        type_id: Any = tensor.type.id  # a plain number, because the package does not know the newest types
        writer.add_tensor_info(tensor.name, tensor.shape, _UNUSED, tensor.bytes, raw_dtype=type_id)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()


def header_bytes(scratch: Path, metadata: Mapping[str, Any], tensors: Sequence[StoredTensor]) -> int:
    """Where the data section of a file would begin; writes its header to `scratch` to know."""
    _write_header(scratch, metadata, tensors)
    return -(-scratch.stat().st_size // ALIGNMENT) * ALIGNMENT


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    match value:
        case bool():
            writer.add_bool(key, value)
        case _U16():
            writer.add_uint16(key, value)
        case _I32():
            writer.add_int32(key, value)
        case int():
            writer.add_uint32(key, value)
        case float():
            writer.add_float32(key, value)
        case str():
            writer.add_string(key, _utf8(value))
        case _:
            writer.add_array(key, [_utf8(part) if isinstance(part, str) else part for part in value])


def _utf8(text: str) -> str:
    """Text as a file can hold it: names of files may have bytes that are no UTF-8."""
    return text.encode(errors="replace").decode()
