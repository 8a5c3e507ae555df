"""Moves stored codes and scales into ggml's blocks without rounding, where they have the form of those."""

from __future__ import annotations

import torch
from torch import Tensor

from ..archs.encodings import Int4, Mxfp4, Nvfp4
from ..archs.expressions import Expression, Read, Rows, Stack, TensorInfo
from ..archs.rearranged import ColumnRuns, RowRuns
from ..errors import BadInput
from ..quant import dequantize
from ..quant.formats.table import format_named
from .fp4 import repack_mxfp4, repack_nvfp4
from .int4 import pack_q4_0, read_int4
from .storage import Reader

_E4M3_NAN = 0x7F  # the bits above it have the sign set
_E8M0_NAN = 0xFF
_E8M0_LARGE = 0xFD  # 2^126: times a code of 4 it is more than float32 holds


def repack(
    expression: Expression, type_name: str, storage: Reader, expert: int | None, rows: tuple[int, int] | None
) -> Tensor | None:
    """Rows of a weight in blocks of a ggml type, where its stored codes and scales can be moved there unchanged.

    Arguments are those of `decode.evaluate`.

    Returns:
        uint8 [rows, row bytes]; None where the numbers must be quantized.
    """
    if isinstance(expression, Stack):
        assert expert is not None
        return repack(expression.experts[expert], type_name, storage, None, rows)
    if isinstance(expression, Rows):
        blocks = repack(expression.source, type_name, storage, expert, expression.span(rows))
        return None if blocks is None else blocks[:: expression.step].contiguous()
    if isinstance(expression, RowRuns) and len(expression.shape) > 1:
        parts = [repack(expression.source, type_name, storage, expert, run) for run in expression.within(rows)]
        found = [part for part in parts if part is not None]
        return torch.cat(found) if len(found) == len(parts) else None
    if isinstance(expression, ColumnRuns):
        return _block_runs(expression, type_name, repack(expression.source, type_name, storage, expert, rows))
    height = expression.shape[-2] if len(expression.shape) > 1 else 1
    start, stop = ((expert or 0) * height + row for row in rows or (0, height))
    if isinstance(expression, Read):
        tensor = expression.tensor
        if tensor.dtype != type_name or format_named(type_name).block_size == 1:
            return None
        return _finite(storage.read(tensor, start, stop), type_name, tensor, expert)
    if isinstance(expression, Nvfp4) and type_name == "NVFP4" and not expression.global_scale:
        codes, scales = (storage.read(tensor, start, stop) for tensor in (expression.codes, expression.scale))
        _check_scales(expression.scale, scales, _E4M3_NAN)
        return repack_nvfp4(codes, scales)
    if isinstance(expression, Mxfp4) and type_name == "MXFP4":
        codes, scales = (storage.read(tensor, start, stop) for tensor in (expression.codes, expression.scale))
        _check_scales(expression.scale, scales, _E8M0_NAN)
        blocks = repack_mxfp4(codes, scales)
        return _finite(blocks, type_name, expression.scale, expert) if (scales >= _E8M0_LARGE).any() else blocks
    if isinstance(expression, Int4) and type_name == "Q4_0":
        blocks = pack_q4_0(read_int4(expression, storage, rows))
        return None if blocks is None else _finite(blocks, type_name, expression.scale, expert)
    return None


def _block_runs(expression: ColumnRuns, type_name: str, rows: Tensor | None) -> Tensor | None:
    """The blocks that hold runs of columns; None where a run cuts one."""
    size = format_named(type_name).block_size
    if rows is None or any(column % size for run in expression.runs for column in run):
        return None
    blocks = rows.unflatten(1, (expression.source.shape[-1] // size, -1))
    return torch.cat([blocks[:, start // size : stop // size] for start, stop in expression.runs], dim=1).flatten(1)


def _finite(blocks: Tensor, type_name: str, tensor: TensorInfo, expert: int | None) -> Tensor:
    """Blocks that are copied as they are. Raises BadInput where one decodes to NaN or infinity."""
    finite = torch.isfinite(dequantize(blocks, type_name)).all(dim=1)
    if not finite.all():
        where = "" if expert is None else f" of expert {expert}"
        raise BadInput(
            f"{tensor.name} in {tensor.file} gives NaN or infinity in row {int((~finite).nonzero()[0])}{where}: fetch "
            "the file again"
        )
    return blocks


def _check_scales(tensor: TensorInfo, scales: Tensor, least_bad: int) -> None:
    if (scales >= least_bad).any():
        raise BadInput(f"{tensor.name} in {tensor.file} holds NaN or a negative scale: fetch the file again")
