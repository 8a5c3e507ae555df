"""GGUF headers: metadata and where each tensor lies. Bounds are checked before anything is allocated.

The format is ggml's docs/gguf.md, version 2 and 3, little endian. A file of several splits is read whole.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

from ..archs.expressions import TensorInfo
from ..errors import BadInput
from ..quant.formats.table import format_with_id

MAGIC = b"GGUF"
DEFAULT_ALIGNMENT = 32
SPLIT_NAME = "{prefix}-{number:05d}-of-{count:05d}.gguf"

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


def read_gguf(path: Path) -> tuple[dict[str, Any], tuple[TensorInfo, ...]]:
    """Metadata and tensors of a GGUF file; shapes are slowest dimension first.

    For a split file, `path` is its first part and the others are read too. Raises BadInput for a file that is
    truncated, corrupt or of an unknown version.
    """
    metadata, tensors = _read_file(path)
    count = metadata.get("split.count", 1)
    if not isinstance(count, int) or not 1 <= count <= 99999:
        raise BadInput(f"{path}: split.count is {count!r}, expected the number of files")
    if count > 1:
        prefix = path.name.removesuffix(SPLIT_NAME.format(prefix="", number=1, count=count))
        if prefix == path.name:
            first = SPLIT_NAME.format(prefix="NAME", number=1, count=count)
            raise BadInput(f"{path} is one of {count} splits, expected the first of them, named {first}")
        for number in range(2, count + 1):
            part = path.with_name(SPLIT_NAME.format(prefix=prefix, number=number, count=count))
            if not part.is_file():
                raise BadInput(f"{part} is missing, expected {count} splits beside {path.name}")
            keys, more = _read_file(part)
            told = (keys.get("split.count"), keys.get("split.no"))
            if told != (count, number - 1):
                raise BadInput(f"{part} says it is split {told[1]} of {told[0]}, expected {number - 1} of {count}")
            tensors += more
    names = {tensor.name for tensor in tensors}
    if len(names) != len(tensors):
        raise BadInput(f"{path}: a tensor name appears twice, the file is corrupt")
    return metadata, tuple(tensors)


def _read_file(path: Path) -> tuple[dict[str, Any], list[TensorInfo]]:
    try:
        with path.open("rb") as file:
            return _Header(file, path).read()
    except OSError as error:
        raise BadInput(f"{path} cannot be read: {error.strerror}") from None


class _Header:
    """Reads the header front to back; every length is checked against what is left of the file."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self.file = file
        self.path = path
        self.left = path.stat().st_size

    def read(self) -> tuple[dict[str, Any], list[TensorInfo]]:
        if self.take(4) != MAGIC:
            raise BadInput(f"{self.path} is not a GGUF file, expected it to begin with {MAGIC.decode()}")
        version = self.scalar("I")
        if version not in (2, 3):
            raise BadInput(f"{self.path} is GGUF version {version}, expected 2 or 3 (little endian)")
        tensor_count, value_count = self.scalar("Q"), self.scalar("Q")
        self.check_count(tensor_count, 24)
        self.check_count(value_count, 13)
        metadata = self.metadata(value_count)
        tensors = [self.tensor_header() for _ in range(tensor_count)]
        return metadata, self.place(tensors, metadata)

    def metadata(self, count: int) -> dict[str, Any]:
        metadata: dict[str, Any] = {}
        for _ in range(count):
            key = self.string()
            if not key or key in metadata:
                raise self.corrupt(f"metadata key {key!r} is empty or appears twice")
            metadata[key] = self.value(self.scalar("I"), key)
        return metadata

    def value(self, kind: int, key: str) -> Any:
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind])
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            raise self.corrupt(f"metadata key {key} has value type {kind}")
        element, count = self.scalar("I"), self.scalar("Q")
        if element == _STRING:
            self.check_count(count, 8)
            return [self.string() for _ in range(count)]
        if element not in _SCALARS:
            raise self.corrupt(f"metadata key {key} is an array of value type {element}")
        self.check_count(count, struct.calcsize(_SCALARS[element]))
        return list(
            struct.unpack(f"<{count}{_SCALARS[element]}", self.take(count * struct.calcsize(_SCALARS[element])))
        )

    def tensor_header(self) -> tuple[str, tuple[int, ...], int, int]:
        """Name, shape (slowest dimension first), type id, offset from the start of the data."""
        name, dimensions = self.string(), self.scalar("I")
        if dimensions > 4:
            raise self.corrupt(f"tensor {name} has {dimensions} dimensions, more than 4")
        sizes = tuple(self.scalar("Q") for _ in range(dimensions))
        if not all(0 < size < 2**48 for size in sizes):
            raise self.corrupt(f"tensor {name} has shape {list(sizes)}")
        return name, sizes[::-1], self.scalar("I"), self.scalar("Q")

    def place(
        self, headers: list[tuple[str, tuple[int, ...], int, int]], metadata: Mapping[str, Any]
    ) -> list[TensorInfo]:
        alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment <= 0 or alignment & (alignment - 1):
            raise BadInput(f"{self.path}: general.alignment is {alignment!r}, expected a power of two")
        data_start = -(-self.file.tell() // alignment) * alignment
        size = self.path.stat().st_size
        tensors, expected = [], 0
        for name, shape, type_id, offset in headers:
            stored = format_with_id(type_id)
            length = prod(shape[:-1]) * stored.row_bytes(shape[-1] if shape else 1)
            if offset != expected or data_start + offset + length > size:
                raise self.corrupt(f"tensor {name} lies outside the file, or not behind the one before it")
            expected = -(-(offset + length) // alignment) * alignment
            tensors.append(TensorInfo(name, stored.name, shape, str(self.path), data_start + offset, length))
        return tensors

    def scalar(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(code)))[0]

    def string(self) -> str:
        length = self.scalar("Q")
        self.check_count(length, 1)
        try:
            return self.take(length).decode("utf-8")
        except UnicodeDecodeError:
            raise self.corrupt("a string is not UTF-8") from None

    def take(self, count: int) -> bytes:
        self.check_count(count, 1)
        self.left -= count
        data = self.file.read(count)
        if len(data) != count:
            raise self.corrupt("it ends inside the header")
        return data

    def check_count(self, count: int, least_bytes: int) -> None:
        if count * least_bytes > self.left:
            raise self.corrupt("it ends inside the header")

    def corrupt(self, what: str) -> BadInput:
        return BadInput(f"{self.path} is truncated or corrupt: {what}; make or download it again")
