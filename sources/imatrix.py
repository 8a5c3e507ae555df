"""llama.cpp's importance matrices: how large each input of each weight typically is.

Two forms exist: GGUF (sums of squares and counts for every expert), and the older binary .dat (means only).
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..errors import BadInput
from .gguf import MAGIC, read_gguf
from .storage import Storage


@dataclass(frozen=True)
class ImportanceMatrix:
    """Mean squares of the inputs, float32 by GGUF weight name, the matrices of a stack one after another.

    The part of an expert that no token reached is all zeros: nothing is known about it.
    """

    file: str
    datasets: tuple[str, ...]
    chunks: int
    means: Mapping[str, Tensor]

    def of(self, name: str, columns: int, matrices: int = 1) -> Tensor | None:
        """The importance of a weight's columns, [matrices, columns]; None where the file has nothing on it.

        A matrix that works in groups, each on its own slice of the input, was measured on all slices: their mean
        counts. Raises BadInput when the file was measured on a model of another shape.
        """
        means = self.means.get(name)
        if means is None:
            return None
        if means.numel() % (columns * matrices):
            raise BadInput(
                f"{self.file}: {name} has {means.numel()} values, expected {matrices} x {columns}: it was measured "
                "on another model"
            )
        return means.view(matrices, -1, columns).mean(dim=1)


def read_imatrix(path: Path) -> ImportanceMatrix:
    """Read either form. Raises BadInput when the file is neither, is cut off, or holds values that are not finite."""
    try:
        with path.open("rb") as file:
            is_gguf = file.read(4) == MAGIC
    except OSError as error:
        raise BadInput(f"{path} cannot be read: {error.strerror}") from None
    matrix = _read_gguf_form(path) if is_gguf else _read_legacy(path)
    for name, means in matrix.means.items():
        if not torch.isfinite(means).all() or (means < 0).any():
            raise BadInput(f"{path}: {name} holds values that are negative or not finite: measure it again")
    return matrix


def _read_gguf_form(path: Path) -> ImportanceMatrix:
    metadata, tensors = read_gguf(path)
    if metadata.get("general.type") != "imatrix":
        raise BadInput(f"{path}: general.type is {metadata.get('general.type')!r}, expected 'imatrix'")
    storage = Storage()
    values = {
        tensor.name: storage.read(tensor).view(torch.float32) for tensor in tensors if tensor.dtype == "F32"
    }  # [matrices, columns]
    storage.close()
    means = {}
    for name, counts in values.items():
        weight = name.removesuffix(".counts")
        if weight == name or f"{weight}.in_sum2" not in values:
            continue
        sums = values[f"{weight}.in_sum2"]
        if counts.numel() != sums.shape[0]:
            raise BadInput(f"{path}: {weight} has {counts.numel()} counts for {sums.shape[0]} matrices: it is corrupt")
        means[weight] = (sums / counts.view(-1, 1).clamp(min=1)).flatten()
    if not means:
        raise BadInput(f"{path} holds no statistics, expected tensors named *.in_sum2 and *.counts")
    datasets = metadata.get("imatrix.datasets", [])
    return ImportanceMatrix(path.as_posix(), tuple(datasets), int(metadata.get("imatrix.chunk_count", 0)), means)


def _read_legacy(path: Path) -> ImportanceMatrix:
    """i32 entries; each: i32 length, name, i32 calls, i32 values, f32[values] = mean * calls; then chunks, dataset."""
    data = path.read_bytes()
    position = 0

    def take(count: int) -> bytes:
        nonlocal position
        if not 0 <= count <= len(data) - position:
            raise BadInput(f"{path} is neither an imatrix GGUF nor a whole imatrix.dat: make or download it again")
        position += count
        return data[position - count : position]

    def integer() -> int:
        return int(struct.unpack("<i", take(4))[0])

    def text() -> str:
        return take(integer()).decode("utf-8", errors="replace")

    means = {}
    for _ in range(integer()):
        name, calls = text(), integer()
        values = torch.frombuffer(bytearray(take(4 * integer())), dtype=torch.float32)
        means[name] = values / max(calls, 1)
    has_trailer = position < len(data)
    chunks = integer() if has_trailer else 0
    return ImportanceMatrix(path.as_posix(), (text(),) if has_trailer else (), chunks, means)
