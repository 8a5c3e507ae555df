"""Writes llama.cpp's importance matrices: for every weight the sum of squares of each input, and their number."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ...documents import exists
from ...errors import BadInput, Interrupted, OutputExists
from ...quant.formats.table import format_named
from ...quant.planning.plan import StoredTensor
from ...sources.imatrix import DIGESTS, ImportanceMatrix, read_imatrix
from ..conversion import InputFile
from .writer import GGUFWriter


@dataclass(frozen=True)
class Origin:
    """What an importance matrix is measured on.

    Attributes:
        datasets, digests: the names of texts, and the SHA-256 of each; no digests where one is unknown.
        chunks, chunk_size: how many chunks of how many tokens.
        source: what is known of the model, metadata `moecast.source.*`.
    """

    datasets: tuple[str, ...]
    digests: tuple[str, ...]
    chunks: int
    chunk_size: int
    source: Mapping[str, str]

    @classmethod
    def of(cls, text: Path, tokens: Tensor, source: Mapping[str, str]) -> Origin:
        """Of a text whose ids are `tokens` [chunks, context]."""
        chunks, context = tokens.shape
        return cls((text.name,), (InputFile.of(text).sha256,), chunks, context, source)

    def metadata(self) -> dict[str, Any]:
        return {
            "general.type": "imatrix",
            "imatrix.datasets": [*self.datasets],
            "imatrix.chunk_count": self.chunks,
            "imatrix.chunk_size": self.chunk_size,
            **({DIGESTS: [*self.digests]} if self.digests else {}),
            **self.source,
        }


class ImatrixWriter:
    """An importance matrix in llama.cpp's GGUF form. Use it as a context manager.

    Layers go to a temporary file as they come, because the header, which names all of them, stands before the data.
    Leaving the context normally completes the file; leaving it by an exception leaves nothing.

    Args:
        path: the file.
        origin: what it is measured on.
        overwrite: replace an existing file.

    Raises OutputExists when the file exists, Interrupted when it cannot be written.
    """

    def __init__(self, path: Path, origin: Origin, overwrite: bool = False) -> None:
        if not path.name:
            raise BadInput(f"the importance matrix is to go to {str(path)!r}, expected the name of a file")
        if exists(path) and not overwrite:
            raise OutputExists(path)
        self.path = path
        self._metadata = origin.metadata()
        self._tensors: list[StoredTensor] = []
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._data: BinaryIO = tempfile.TemporaryFile(dir=path.parent)  # noqa: SIM115 - closed on leaving
        except OSError as error:
            raise Interrupted(f"{path} cannot be written: {error.strerror}; choose another name") from None

    def add(self, sums: Mapping[str, Tensor], counts: Mapping[str, Tensor]) -> None:
        """Write down what is known of some weights by name: sums [matrices, columns], counts [matrices]."""
        try:
            for name, squares in sorted(sums.items()):
                alone, inputs = len(squares) == 1, counts[name]
                self._append(f"{name}.in_sum2", squares[0] if alone else squares)
                self._append(f"{name}.counts", inputs if alone else inputs[:, None])
            self._data.flush()
        except OSError as error:
            raise Interrupted(
                f"{self.path} cannot be written: {error.strerror}; free space and run the same command again"
            ) from None

    def __enter__(self) -> ImatrixWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self._write()
        finally:
            with suppress(OSError):  # what a full disk has refused it refuses once more
                self._data.close()

    def _append(self, name: str, values: Tensor) -> None:
        self._tensors.append(StoredTensor(name, tuple(values.shape), format_named("F32")))
        self._data.write(values.float().contiguous().numpy().data)

    def _write(self) -> None:
        self._data.seek(0)
        with GGUFWriter(self.path, self._metadata, self._tensors, overwrite=True) as writer:
            for tensor in self._tensors:
                data = bytearray(self._data.read(tensor.bytes))
                writer.write(tensor.name, 0, torch.frombuffer(data, dtype=torch.uint8))


def merge_imatrices(files: Sequence[str | Path], output: str | Path, overwrite: bool = False) -> None:
    """One importance matrix of several that were measured on one model: as if their texts had been one.

    Sums of squares are added up, and how many inputs they are of. Raises BadInput for files of llama.cpp's older form,
    which do not say from how many inputs their means are, and for those of different models or chunk sizes.
    """
    matrices = [read_imatrix(Path(file)) for file in files]
    first = matrices[0]
    for matrix in matrices:
        _check_alike(matrix, first)
    sums, counts = ({name: torch.zeros(1) for name in first.means} for _ in range(2))
    for name in first.means:
        inputs = [matrix.counts[name].double() for matrix in matrices]
        means = [matrix.means[name].double().view(len(first.counts[name]), -1) for matrix in matrices]
        sums[name] = torch.stack([mean * count[:, None] for mean, count in zip(means, inputs, strict=True)]).sum(dim=0)
        counts[name] = torch.stack(inputs).sum(dim=0)
    digests = [matrix.digests for matrix in matrices]
    origin = Origin(
        tuple(name for matrix in matrices for name in matrix.datasets),
        tuple(digest for each in digests for digest in each) if all(digests) else (),
        sum(matrix.chunks for matrix in matrices),
        first.chunk_size,
        first.source,
    )
    with ImatrixWriter(Path(output), origin, overwrite) as writer:
        writer.add(sums, counts)


def _check_alike(matrix: ImportanceMatrix, first: ImportanceMatrix) -> None:
    if not matrix.counts:
        raise BadInput(f"{matrix.file} is of llama.cpp's older form, which does not say what it counted: measure again")
    if matrix.chunk_size != first.chunk_size:
        raise BadInput(
            f"{matrix.file} has chunks of {matrix.chunk_size} tokens, {first.file} of {first.chunk_size}: merge those "
            "of one size"
        )
    if matrix.source and first.source and matrix.source != first.source:
        raise BadInput(f"{matrix.file} is of {matrix.source}, {first.file} of {first.source}: merge those of one model")
    shapes, expected = _shapes(matrix), _shapes(first)
    if differing := next((name for name in shapes | expected if shapes.get(name) != expected.get(name)), None):
        raise BadInput(f"{matrix.file} and {first.file} differ in {differing}: merge those of one model")


def _shapes(matrix: ImportanceMatrix) -> dict[str, tuple[int, int]]:
    return {name: (means.numel(), matrix.counts[name].numel()) for name, means in matrix.means.items()}
