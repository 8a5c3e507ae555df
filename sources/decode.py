"""Evaluates weight expressions: stored bytes in, float32 out, one expert or some rows at a time."""

from __future__ import annotations

import torch

from ..archs.weights import BlockScaled, Expression, Read, Rows, Stack
from ..quant import dequantize
from .storage import Storage

_TORCH_DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
}


def evaluate(
    expression: Expression, storage: Storage, expert: int | None = None, rows: tuple[int, int] | None = None
) -> torch.Tensor:
    """One matrix of a weight, or `rows` (start, stop) of it, as float32 [rows, columns]; vectors come as [n].

    Args:
        expert: which matrix of a stack [experts, rows, columns]; None for a weight that is not a stack.
        rows: rows within that matrix, all by default.
    """
    match expression:
        case Stack(experts):
            assert expert is not None
            return evaluate(experts[expert], storage, None, rows)
        case Rows(source, first, last):
            start, stop = rows or (0, last - first)
            return evaluate(source, storage, expert, (first + start, first + stop))
        case BlockScaled():
            return _evaluate_block_scaled(expression, storage, rows or (0, expression.shape[0]))
        case Read(tensor):
            if len(tensor.shape) == 1:
                return _decode(storage.read(tensor), tensor.dtype).flatten()
            start, stop = rows or (0, tensor.shape[-2])
            first = (expert or 0) * tensor.shape[-2]
            return _decode(storage.read(tensor, first + start, first + stop), tensor.dtype)


def _decode(data: torch.Tensor, dtype: str) -> torch.Tensor:
    """Stored bytes [rows, row bytes] to float32 [rows, columns]."""
    if dtype in _TORCH_DTYPES:
        return data.view(_TORCH_DTYPES[dtype]).float()
    values: torch.Tensor = dequantize(data, dtype)
    return values


def _evaluate_block_scaled(source: BlockScaled, storage: Storage, rows: tuple[int, int]) -> torch.Tensor:
    """float32(code) * float32(scale), one scale for every block of codes."""
    start, stop = rows
    block_rows, block_columns = source.block
    first_block, last_block = start // block_rows, -(-stop // block_rows)
    values = _decode(storage.read(source.codes, start, stop), source.codes.dtype)
    scales = _decode(storage.read(source.scale, first_block, last_block), source.scale.dtype)
    scales = scales.repeat_interleave(block_columns, dim=1)[:, : values.shape[1]]
    for block in range(first_block, last_block):
        part = slice(max(block * block_rows - start, 0), (block + 1) * block_rows - start)
        values[part] *= scales[block - first_block]
    return values
