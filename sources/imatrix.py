"""llama.cpp's importance matrices: how large each input of each weight typically is.

Two forms exist: GGUF (sums of squares and counts for every expert), and the older binary .dat (means only).
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO, Final

import torch
from torch import Tensor
from torch.nn import functional

from ..archs.weights import Weight
from ..documents import is_file, refuse_pointer, unreadable
from ..errors import BadInput
from ..quant.formats.table import FORMATS
from .gguf import MAGIC, is_gguf, read_gguf
from .model import Model, pieces
from .storage import Storage

DIGESTS: Final = "moecast.imatrix.sha256"  # of the texts, one for each of imatrix.datasets
_SOURCE: Final = "moecast.source."


@dataclass(frozen=True)
class ImportanceMatrix:
    """Mean squares of the inputs, float32 by GGUF weight name, the matrices of a stack one after another.

    The part of an expert that no token reached is all zeros: nothing is known about it.

    Attributes:
        datasets: what the texts are called.
        chunks, chunk_size: how many chunks of how many tokens were run; a size of 0 is unknown.
        counts: from how many inputs each matrix's means are, float32 [matrices] by weight name; not in the older form.
        digests: SHA-256 of the texts, where moecast wrote the file.
        source: what is known of the model, by its keys `moecast.source.*`.
    """

    file: str
    datasets: tuple[str, ...]
    chunks: int
    means: Mapping[str, Tensor]
    chunk_size: int = 0
    counts: Mapping[str, Tensor] = field(default_factory=dict)
    digests: tuple[str, ...] = ()
    source: Mapping[str, str] = field(default_factory=dict)

    @property
    def expert_counts(self) -> dict[str, Tensor]:
        """How many tokens reached each expert, by the name of a weight of theirs, one for each layer."""
        layers: dict[str, tuple[str, Tensor]] = {}
        for name, counts in self.counts.items():
            if counts.numel() > 1:
                layers.setdefault(name.rpartition(".ffn_")[0], (name, counts))
        return dict(layers.values())

    def fitted_to(self, model: Model) -> ImportanceMatrix:
        """The same for a model that has its rows padded with zeros, or has not, unlike the one it was measured on.

        The inputs that only zeros are multiplied with are 0. What is of another shape for any other reason stays, for
        `of` to refuse.
        """
        weights = {weight.name: weight for weight in model.graph.weights()}
        means = {name: _fitted(of, weights[name], model) if name in weights else of for name, of in self.means.items()}
        return replace(self, means=means)

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


def _fitted(means: Tensor, weight: Weight, model: Model) -> Tensor:
    """The means of all matrices of a weight, with as many columns as it has where padding is the only difference."""
    if means.numel() % weight.matrices:
        return means
    rows, columns = means.view(weight.matrices, -1), weight.columns
    measured = rows.shape[1]
    if _is_padded(columns, measured) and not rows[:, columns:].any():
        return rows[:, :columns].flatten()
    if _is_padded(measured, columns) and not model.load(weight, *next(pieces(weight)))[..., measured:].any():
        return functional.pad(rows, (0, columns - measured)).flatten()
    return means


def _is_padded(columns: int, padded: int) -> bool:
    """Whether so many columns, filled up to whole blocks of some type, are `padded`."""
    return padded > columns and padded in {columns + -columns % format.block_size for format in FORMATS.values()}


def is_imatrix(path: Path) -> bool:
    """Whether a file is one of the GGUF form. Raises BadInput for a GGUF file that is corrupt."""
    return is_file(path) and is_gguf(path) and read_gguf(path)[0].get("general.type") == "imatrix"


def read_imatrix(path: Path) -> ImportanceMatrix:
    """Read either form. Raises BadInput when the file is neither, is cut off, or holds values that are not finite."""
    try:
        with path.open("rb") as file:
            beginning = file.read(64)
    except (OSError, ValueError) as error:
        raise unreadable(path, error) from None
    refuse_pointer(path, beginning)
    matrix = _read_gguf_form(path) if beginning.startswith(MAGIC) else _read_legacy(path)
    for name, means in matrix.means.items():
        if not torch.isfinite(means).all() or (means < 0).any():
            raise BadInput(f"{path}: {name} holds values that are negative or not finite: measure it again")
    return matrix


def _read_gguf_form(path: Path) -> ImportanceMatrix:
    metadata, tensors = read_gguf(path)
    if metadata.get("general.type") != "imatrix":
        raise BadInput(f"{path}: general.type is {metadata.get('general.type')!r}, expected 'imatrix'")
    with closing(Storage()) as storage:
        values = {
            tensor.name: storage.read(tensor).view(torch.float32) for tensor in tensors if tensor.dtype == "F32"
        }  # [matrices, columns]
    means, inputs = {}, {}
    for name, counts in values.items():
        weight = name.removesuffix(".counts")
        if weight == name or f"{weight}.in_sum2" not in values:
            continue
        sums = values[f"{weight}.in_sum2"]
        if counts.numel() != sums.shape[0]:
            raise BadInput(f"{path}: {weight} has {counts.numel()} counts for {sums.shape[0]} matrices: it is corrupt")
        if not torch.isfinite(counts).all() or (counts < 0).any():
            raise BadInput(f"{path}: {name} holds counts that are negative or not finite: measure it again")
        means[weight] = (sums / counts.view(-1, 1).clamp(min=1)).flatten()
        inputs[weight] = counts.flatten()
    if not means:
        raise BadInput(f"{path} holds no statistics, expected tensors named *.in_sum2 and *.counts")
    chunks, size = (_whole_number(metadata, f"imatrix.chunk_{key}", path) for key in ("count", "size"))
    datasets, digests = (_names(metadata, key, path) for key in ("imatrix.datasets", DIGESTS))
    source = source_in(metadata)
    return ImportanceMatrix(path.as_posix(), datasets, chunks, means, size, inputs, digests, source)


def source_in(metadata: Mapping[str, Any]) -> dict[str, str]:
    """The keys of a GGUF file that say which model it was made from."""
    return {key: str(value) for key, value in metadata.items() if key.startswith(_SOURCE)}


def _names(metadata: Mapping[str, Any], key: str, path: Path) -> tuple[str, ...]:
    names = metadata.get(key, [])
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise BadInput(f"{path}: {key} is {names!r}, expected names")
    return tuple(names)


def _whole_number(metadata: Mapping[str, Any], key: str, path: Path) -> int:
    number = metadata.get(key, 0)
    if type(number) is not int or number < 0:
        raise BadInput(f"{path}: {key} is {number!r}, expected a number, 0 or more")
    return number


def _read_legacy(path: Path) -> ImportanceMatrix:
    """i32 entries; each: i32 length, name, i32 calls, i32 values, f32[values] = mean * calls; then chunks, dataset."""
    try:
        with path.open("rb") as file:
            return _LegacyReader(file, path).read()
    except OSError as error:
        raise unreadable(path, error) from None


class _LegacyReader:
    """Reads the older form front to back; every length is checked against what is left of the file."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self.file = file
        self.path = path
        self.left = path.stat().st_size

    def read(self) -> ImportanceMatrix:
        means: dict[str, Tensor] = {}
        for _ in range(self.integer()):
            name, calls, count = self.text(), self.integer(), self.integer()
            if name in means or calls < 0 or count < 1:
                raise BadInput(f"{self.path}: {name!r} is there twice, or has {calls} calls or {count} values: corrupt")
            means[name] = torch.frombuffer(bytearray(self.take(4 * count)), dtype=torch.float32) / max(calls, 1)
        if not means:
            raise self.corrupt()
        has_trailer = self.left > 0
        chunks = self.integer() if has_trailer else 0
        return ImportanceMatrix(self.path.as_posix(), (self.text(),) if has_trailer else (), chunks, means)

    def integer(self) -> int:
        return int(struct.unpack("<i", self.take(4))[0])

    def text(self) -> str:
        return self.take(self.integer()).decode("utf-8", errors="replace")

    def take(self, count: int) -> bytes:
        if not 0 <= count <= self.left:
            raise self.corrupt()
        self.left -= count
        data = self.file.read(count)
        if len(data) != count:
            raise self.corrupt()
        return data

    def corrupt(self) -> BadInput:
        return BadInput(f"{self.path} is neither an imatrix GGUF nor a whole imatrix.dat: make or download it again")
