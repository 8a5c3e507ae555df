"""Writes llama.cpp's importance matrices: for every weight the sum of squares of each input, and their number."""

from __future__ import annotations

import tempfile
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import torch
from torch import Tensor

from ...documents import exists
from ...errors import BadInput, Interrupted, OutputExists
from ...quant.formats.table import format_named
from ...quant.planning.plan import StoredTensor
from ...quant.rounding.statistics import Statistics
from .writer import GGUFWriter


class ImatrixWriter:
    """An importance matrix in llama.cpp's GGUF form. Use it as a context manager.

    Layers go to a temporary file as they come, because the header, which names all of them, stands before the data.
    Leaving the context normally completes the file; leaving it by an exception leaves nothing.

    Args:
        path: the file.
        dataset: the text that is used.
        tokens: its ids, [chunks, context].
        overwrite: replace an existing file.

    Raises OutputExists when the file exists, Interrupted when it cannot be written.
    """

    def __init__(self, path: Path, dataset: Path, tokens: Tensor, overwrite: bool = False) -> None:
        if not path.name:
            raise BadInput(f"the importance matrix is to go to {str(path)!r}, expected the name of a file")
        if exists(path) and not overwrite:
            raise OutputExists(path)
        self.path = path
        self._metadata = {
            "general.type": "imatrix",
            "imatrix.datasets": [dataset.name],
            "imatrix.chunk_count": tokens.shape[0],
            "imatrix.chunk_size": tokens.shape[1],
        }
        self._tensors: list[StoredTensor] = []
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._data: BinaryIO = tempfile.TemporaryFile(dir=path.parent)  # noqa: SIM115 - closed on leaving
        except OSError as error:
            raise Interrupted(f"{path} cannot be written: {error.strerror}; choose another name") from None

    def add(self, statistics: Statistics) -> None:
        """Write down what is known of one layer's weights."""
        try:
            for name, sums in sorted(statistics.sums.items()):
                counts = statistics.counts[name]
                self._append(f"{name}.in_sum2", sums[0] if len(sums) == 1 else sums)
                self._append(f"{name}.counts", counts if len(sums) == 1 else counts[:, None])
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
