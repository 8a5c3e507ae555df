"""Weights into their stored form, a piece at a time: the loop that every conversion to GGUF runs."""

from __future__ import annotations

import torch
from torch import Tensor

from ..archs.errors import BadInput
from ..archs.weights import first_tensor, of_expert
from ..quant import native, quantize
from ..quant.plan import Plan, PlannedTensor
from ..sources.imatrix import ImportanceMatrix
from ..sources.model import Model, pieces
from ..sources.progress import Progress
from .gguf_writer import GGUFWriter


def write_tensors(
    writer: GGUFWriter,
    model: Model,
    plan: Plan,
    progress: Progress,
    importance: ImportanceMatrix | None = None,
    threads: int | None = None,
) -> None:
    """Read, decode, quantise and write every tensor of a plan. Raises BadInput naming a tensor that is not finite."""
    if not native.available():
        progress.note(f"Quantising with {native.describe()}")
    progress.begin("Converting", sum(tensor.weight.elements for tensor in plan.tensors), "weights")
    for tensor in plan.tensors:
        weight = tensor.weight
        columns = importance.of(weight.name, weight.columns, weight.experts or 1) if importance else None
        for expert, rows in pieces(weight):
            part = columns[expert or 0] if columns is not None else None
            first_row, data = _encode(model, tensor, expert, rows, part, threads)
            writer.write(weight.name, first_row, data)
            progress.advance(len(data) * weight.columns, f"{weight.name} {tensor.type.name}")


def _encode(
    model: Model,
    tensor: PlannedTensor,
    expert: int | None,
    rows: tuple[int, int] | None,
    importance: Tensor | None,
    threads: int | None,
) -> tuple[int, Tensor]:
    """One piece in its stored form: its first row within the whole tensor, and uint8 [rows, row bytes]."""
    weight = tensor.weight
    first_row = expert * weight.shape[-2] if expert is not None else (rows[0] if rows else 0)
    data = model.repacked(weight, tensor.type.name, expert, rows)
    if data is not None:
        return first_row, data
    try:
        values = model.load(weight, expert, rows).view(-1, weight.columns)
        if tensor.type.name == "I32":
            return first_row, values.to(torch.int32).view(torch.uint8)  # decoded whole numbers are exact up to 2^24
        return first_row, quantize(values, tensor.type.name, importance, threads)
    except BadInput as error:
        stored = first_tensor(of_expert(weight.source, expert))
        raise BadInput(f"{stored.name} in {stored.file}: {error}; the checkpoint is damaged, fetch it again") from None
