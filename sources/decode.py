"""Evaluates weight expressions: stored bytes in, float32 out, one expert or some rows at a time.

Numbers are made where the bytes lie.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..archs.encodings import BlockScaled, GlobalScales, Int4, Mxfp4, Nvfp4, Scaled
from ..archs.expressions import (
    Below,
    Columns,
    Expression,
    Given,
    NegativeExponential,
    OnePlus,
    Padded,
    Read,
    Reshape,
    Rows,
    SideBySide,
    Stack,
    TensorInfo,
    Transposed,
    Zeros,
)
from ..archs.rearranged import ColumnRuns, RowRuns
from ..errors import BadInput
from ..quant import dequantize
from .fp4 import decode_nvfp4, repack_mxfp4
from .int4 import decode_int4, read_int4
from .storage import Reader

RowRange = tuple[int, int] | None  # (start, stop) within a matrix, None for all of it

_TORCH_DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I32": torch.int32,  # whole numbers below 2^24 are exact in float32
    "I64": torch.int64,
}


def evaluate(expression: Expression, storage: Reader, expert: int | None = None, rows: RowRange = None) -> Tensor:
    """One matrix of a weight, or `rows` (start, stop) of it, as float32 [rows, columns]; vectors come as [n].

    Args:
        expert: which matrix of a stack [experts, rows, columns]; None for a weight that is not a stack.
        rows: rows within that matrix, all by default.
    """
    return _EVALUATIONS[type(expression)](expression, storage, expert, rows)


def evaluate_directly(expression: Expression, storage: Reader, expert: int | None, dtype: torch.dtype) -> Tensor | None:
    """The same matrix in `dtype`, where it is stored so or in blocks that decode to it; None where float32 is between.

    Every number is the one of `dtype` that is nearest to what `evaluate` gives.
    """
    if not isinstance(expression, Read) or len(expression.tensor.shape) < 2:
        return None
    tensor = expression.tensor
    stored = _TORCH_DTYPES.get(tensor.dtype)
    if stored not in (None, dtype):
        return None
    data = _stored(tensor, storage, expert, None)
    return data.view(dtype) if stored else dequantize(data, tensor.dtype, type=dtype)


def _whole(tensor: TensorInfo, storage: Reader) -> Tensor:
    """All numbers of a small tensor, as [n]."""
    return _decode(storage.read(tensor), tensor.dtype).flatten()


def _read(tensor: TensorInfo, storage: Reader, expert: int | None, rows: RowRange) -> Tensor:
    return _decode(_stored(tensor, storage, expert, rows), tensor.dtype)


def _stored(tensor: TensorInfo, storage: Reader, expert: int | None, rows: RowRange) -> Tensor:
    """The bytes of a matrix of a tensor or a stack, or of some rows of it, uint8 [rows, row bytes]."""
    start, stop = rows or (0, tensor.shape[-2])
    first = (expert or 0) * tensor.shape[-2]
    return storage.read(tensor, first + start, first + stop)


def _decode(data: Tensor, dtype: str) -> Tensor:
    """Stored bytes [rows, row bytes] to float32 [rows, columns]."""
    if dtype == "F8_E4M3":
        return _from_float8(data)
    if dtype in _TORCH_DTYPES:
        return data.view(_TORCH_DTYPES[dtype]).float()
    values: Tensor = dequantize(data, dtype)
    return values


def _from_float8(data: Tensor) -> Tensor:
    """E4M3, uint8 of any shape, to float32; what torch's own conversion gives, in half its time.

    Shifted by 7 bits, sign apart, a code is a float16 whose exponent is 8 too small (its bias is 15, not 7).
    """
    codes = data.view(torch.int8)
    if data.device.type == "cuda":  # which converts as fast as it reads, and would have to wait for an answer
        return data.view(torch.float8_e4m3fn).float()
    if codes.numel() and (codes.max() == 0x7F or data.max() == 0xFF):  # the two codes of NaN, a number in float16
        return data.view(torch.float8_e4m3fn).float()
    halves = codes.to(torch.int16).bitwise_left_shift_(7).bitwise_and_(-0x4080)  # 0xBF80: all but the second sign
    return halves.view(torch.float16).float().mul_(2.0**8)


def _evaluate_read(source: Read, storage: Reader, expert: int | None, rows: RowRange) -> Tensor:
    return _whole(source.tensor, storage) if len(source.shape) < 2 else _read(source.tensor, storage, expert, rows)


def _evaluate_block_scaled(source: BlockScaled, storage: Reader, expert: int | None, rows: RowRange) -> Tensor:
    """float32(code) * float32(scale), one scale for every block of codes."""
    start, stop = rows or (0, source.shape[0])
    block_rows, block_columns = source.block
    first_block, last_block = start // block_rows, -(-stop // block_rows)
    values = _decode(storage.read(source.codes, start, stop), source.codes.dtype)
    scales = _decode(storage.read(source.scale, first_block, last_block), source.scale.dtype)
    scales = scales.repeat_interleave(block_columns, dim=1)[:, : values.shape[1]]
    if block_rows == 1:
        return values.mul_(scales)
    for block in range(first_block, last_block):
        part = slice(max(block * block_rows - start, 0), (block + 1) * block_rows - start)
        values[part] *= scales[block - first_block]
    return values


def _evaluate_scaled(source: Scaled, storage: Reader, expert: int | None, rows: RowRange) -> Tensor:
    values, factors = _read(source.codes, storage, expert, rows), _whole(source.scale, storage)
    if factors.numel() == 1:
        return values * factors
    if expert is not None:
        return values * factors[expert]
    return values * factors[slice(*rows) if rows else slice(None), None]


def _evaluate_nvfp4(source: Nvfp4, storage: Reader, expert: int | None, rows: RowRange) -> Tensor:
    codes, scales = (_stored(tensor, storage, expert, rows) for tensor in (source.codes, source.scale))
    values = decode_nvfp4(codes, scales)
    return values * _global_scale(source, storage) if source.global_scale else values


def _evaluate_mxfp4(source: Mxfp4, storage: Reader, expert: int | None, rows: RowRange) -> Tensor:
    codes, scales = (_stored(tensor, storage, expert, rows) for tensor in (source.codes, source.scale))
    return _decode(repack_mxfp4(codes, scales), "MXFP4")


def _evaluate_int4(source: Int4, storage: Reader, expert: int | None, rows: RowRange) -> Tensor:
    return decode_int4(read_int4(source, storage, rows))


def _evaluate_global_scales(source: GlobalScales, storage: Reader, expert: int | None, rows: RowRange) -> Tensor:
    scales = torch.stack([_global_scale(matrix, storage) for matrix in source.matrices])
    return scales * evaluate(source.factors, storage) if source.factors else scales


def _global_scale(matrix: Nvfp4, storage: Reader) -> Tensor:
    """The factor of a whole NVFP4 matrix, as float32 []."""
    assert matrix.global_scale
    stored = _whole(matrix.global_scale, storage)[0]
    value = 1 / stored if matrix.reciprocal else stored
    if not (value.isfinite() and stored.isfinite()):
        raise BadInput(
            f"{matrix.global_scale.name} in {matrix.global_scale.file} is {stored.item():g}, expected a finite factor: "
            "fetch the file again"
        )
    return value


def _evaluate_reshape(source: Reshape, storage: Reader, expert: int | None, rows: RowRange) -> Tensor:
    values = _whole(source.tensor, storage).reshape(source.shape)
    return values[slice(*rows)] if rows else values


def _evaluate_negative_exponential(
    source: NegativeExponential, storage: Reader, expert: int | None, rows: RowRange
) -> Tensor:
    values = evaluate(source.source, storage, expert, rows)
    return -values.cpu().exp().to(values.device)  # a GPU's differs in the last bit, and files are the same everywhere


def _evaluate_one_plus(source: OnePlus, storage: Reader, expert: int | None, rows: RowRange) -> Tensor:
    return 1 + evaluate(source.source, storage, expert, rows)


def _evaluate_zeros(source: Zeros, storage: Reader, expert: int | None, rows: RowRange) -> Tensor:
    return torch.zeros(source.shape, device=storage.device)


def _evaluate_given(source: Given, storage: Reader, expert: int | None, rows: RowRange) -> Tensor:
    return torch.tensor(source.values, device=storage.device)


def _evaluate_below(source: Below, storage: Reader, expert: int | None, rows: RowRange) -> Tensor:
    tensor = source.source.tensor
    values = _stored(tensor, storage, None, rows).view(_TORCH_DTYPES[tensor.dtype])
    outside = ((values < 0) | (values >= source.limit)).nonzero()
    if len(outside):
        row, column = outside[0].tolist()
        raise _damaged_table(source, (rows or (0,))[0] + row, f"holds {values[row, column]}")
    ordered = values.sort(dim=1).values
    repeated = (ordered[:, 1:] == ordered[:, :-1]).nonzero()
    if len(repeated):
        row, column = repeated[0].tolist()
        raise _damaged_table(source, (rows or (0,))[0] + row, f"holds {ordered[row, column]} twice")
    return values.float()


def _damaged_table(source: Below, row: int, what: str) -> BadInput:
    tensor = source.source.tensor
    return BadInput(
        f"{tensor.name} in {tensor.file} {what} in row {row}, expected different whole numbers from 0 to "
        f"{source.limit - 1}: the checkpoint is damaged, fetch it again"
    )


def pad(source: Padded, rows: RowRange, inner: Callable[[RowRange], Tensor], device: torch.device | str) -> Tensor:
    """Rows of a padded matrix, or a padded vector, made of those rows of what is in it."""
    shape = source.source.shape
    if len(source.shape) == 1:
        values = torch.zeros(source.shape, device=device)
        values[: shape[0]] = inner(None) * source.factor
        return values
    start, stop = rows or (0, source.shape[-2])
    values = torch.zeros(stop - start, source.shape[-1], device=device)
    filled = min(stop, shape[-2]) - start
    if filled > 0:
        part = inner(None if filled == shape[-2] else (start, start + filled))
        values[:filled, : shape[-1]] = part * source.factor
    return values


def _evaluate_padded(source: Padded, storage: Reader, expert: int | None, rows: RowRange) -> Tensor:
    return pad(source, rows, lambda own: evaluate(source.source, storage, expert, own), storage.device)


def _evaluate_side_by_side(source: SideBySide, storage: Reader, expert: int | None, rows: RowRange) -> Tensor:
    return torch.cat([evaluate(part, storage, expert, rows) for part in source.parts], dim=1)


def _evaluate_rows(source: Rows, storage: Reader, expert: int | None, rows: RowRange) -> Tensor:
    return evaluate(source.source, storage, expert, source.span(rows))[:: source.step].contiguous()


def _evaluate_columns(source: Columns, storage: Reader, expert: int | None, rows: RowRange) -> Tensor:
    return evaluate(source.source, storage, expert, rows)[..., source.start :: source.step].contiguous()


def _evaluate_transposed(source: Transposed, storage: Reader, expert: int | None, rows: RowRange) -> Tensor:
    values = evaluate(source.source, storage, expert).T
    return (values[slice(*rows)] if rows else values).contiguous()


def _evaluate_row_runs(source: RowRuns, storage: Reader, expert: int | None, rows: RowRange) -> Tensor:
    if len(source.shape) == 1:
        values = evaluate(source.source, storage)
        return torch.cat([values[slice(*run)] for run in source.runs])
    return torch.cat([evaluate(source.source, storage, expert, run) for run in source.within(rows)])


def _evaluate_column_runs(source: ColumnRuns, storage: Reader, expert: int | None, rows: RowRange) -> Tensor:
    values = evaluate(source.source, storage, expert, rows)
    return torch.cat([values[:, slice(*run)] for run in source.runs], dim=1)


def _evaluate_stack(source: Stack, storage: Reader, expert: int | None, rows: RowRange) -> Tensor:
    assert expert is not None
    return evaluate(source.experts[expert], storage, None, rows)


_EVALUATIONS: dict[type, Callable[[Any, Reader, int | None, RowRange], Tensor]] = {
    Read: _evaluate_read,
    BlockScaled: _evaluate_block_scaled,
    Scaled: _evaluate_scaled,
    Nvfp4: _evaluate_nvfp4,
    Mxfp4: _evaluate_mxfp4,
    Int4: _evaluate_int4,
    GlobalScales: _evaluate_global_scales,
    Reshape: _evaluate_reshape,
    NegativeExponential: _evaluate_negative_exponential,
    OnePlus: _evaluate_one_plus,
    Below: _evaluate_below,
    Zeros: _evaluate_zeros,
    Given: _evaluate_given,
    Padded: _evaluate_padded,
    SideBySide: _evaluate_side_by_side,
    Rows: _evaluate_rows,
    Columns: _evaluate_columns,
    Transposed: _evaluate_transposed,
    RowRuns: _evaluate_row_runs,
    ColumnRuns: _evaluate_column_runs,
    Stack: _evaluate_stack,
}
