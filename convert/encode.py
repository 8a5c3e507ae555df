"""Weights into their stored form, a piece at a time: the loop that every conversion to GGUF runs."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Protocol

import torch
from torch import Tensor

from ..archs.errors import BadInput
from ..archs.weights import Weight, first_tensor, of_expert
from ..quant import native, quantize
from ..quant.plan import Plan, PlannedTensor
from ..sources.imatrix import ImportanceMatrix
from ..sources.model import Model, Piece, pieces
from ..sources.progress import Progress


class Writer(Protocol):
    """Files in the making, as a context manager: leaving it normally completes them.

    Leaving it by an exception removes them, or keeps them for the same command to go on with.
    """

    paths: list[Path]

    def has(self, name: str, first_row: int) -> bool:
        """Whether the piece of a tensor that begins with this row is written, by this run or an earlier one."""

    def write(self, name: str, first_row: int, rows: Tensor) -> None:
        """Put rows of a tensor's planned type, uint8 [rows, row bytes], in their place; rows count over all leading
        dimensions."""

    def __enter__(self) -> Writer: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def write_tensors(
    writer: Writer,
    model: Model,
    plan: Plan,
    progress: Progress,
    importance: ImportanceMatrix | None = None,
    threads: int | None = None,
) -> None:
    """Read, decode, quantise and write every tensor of a plan, what an earlier run has written left out.

    Raises BadInput naming a tensor that is not finite.
    """
    if not native.available():
        progress.note(f"Quantising with {native.describe()}")
    progress.begin("Converting", sum(tensor.weight.elements for tensor in plan.tensors), "weights")
    for tensor in plan.tensors:
        weight = tensor.weight
        columns = importance.of(weight.name, weight.columns, weight.experts or 1) if importance else None
        for expert, rows in pieces(weight):
            first_row = _first_row(weight, (expert, rows))
            if writer.has(weight.name, first_row):
                continue
            part = columns[expert or 0] if columns is not None else None
            data = _encode(model, tensor, expert, rows, part, threads)
            writer.write(weight.name, first_row, data)
            progress.advance(len(data) * weight.columns, f"{weight.name} {tensor.type.name}")


def _first_row(weight: Weight, piece: Piece) -> int:
    """Where a piece begins within the whole tensor."""
    expert, rows = piece
    return expert * weight.shape[-2] if expert is not None else (rows[0] if rows else 0)


def _encode(
    model: Model,
    tensor: PlannedTensor,
    expert: int | None,
    rows: tuple[int, int] | None,
    importance: Tensor | None,
    threads: int | None,
) -> Tensor:
    """One piece in its stored form, uint8 [rows, row bytes]."""
    weight = tensor.weight
    data = model.repacked(weight, tensor.type.name, expert, rows)
    if data is not None:
        return data
    try:
        values = model.load(weight, expert, rows).view(-1, weight.columns)
        if tensor.type.name == "I32":
            return values.to(torch.int32).view(torch.uint8)  # decoded whole numbers are exact up to 2^24
        return quantize(values, tensor.type.name, importance, threads)
    except BadInput as error:
        stored = first_tensor(of_expert(weight.source, expert))
        raise BadInput(f"{stored.name} in {stored.file}: {error}; the checkpoint is damaged, fetch it again") from None
