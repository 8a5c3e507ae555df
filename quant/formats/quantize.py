"""Rows in, blocks out, and back: `quantize` and `dequantize` for every format.

The device's kernels do the work where there are any, and torch otherwise; all give the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import groupby
from typing import Final, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...errors import BadInput
from . import affine, codebook, lattice, symmetric, ternary
from .devices import kernels_for
from .lanes import Codec, unit_of
from .table import Format, format_named

Array = TypeVar("Array", Tensor, NDArray[np.generic])

CODECS: Final[dict[str, Codec]] = {
    **affine.CODECS,
    **symmetric.CODECS,
    **codebook.CODECS,
    **lattice.CODECS,
    **ternary.CODECS,
}
FLOATS: Final = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

LEAST_SQUARE: Final = 1e-3  # of the mean: no channel is worthless, however rarely the calibration text stirred it
CHUNK: Final = {"cpu": 1 << 18}  # values worked on at once: what a core's cache holds
LARGE_CHUNK: Final = 1 << 24  # on an accelerator, to keep it busy


def quantize(x: Array, name: str, importance: Array | None = None, threads: int | None = None) -> Array:
    """Quantize rows to a ggml format, minimizing the squared error weighted by importance.

    x: [rows, columns], any float type, tensor or numpy array. importance: [columns], not negative, the mean square
    of what each column is multiplied with, or [experts, columns], each for its equal share of consecutive rows; None
    weights all alike. threads: how many CPU threads to use, as many as torch does by default.
    Returns uint8 [rows, row bytes], of x's kind, on x's device. What no float16 scale can reach saturates.
    Raises BadInput for a format that is unknown or holds no weights, a row length that does not divide into blocks,
    values that are not finite (naming the first such row), and an importance of the wrong shape or with values below 0
    or not finite.
    """
    format = format_named(name)
    encode = _encoder(format)
    rows = _matrix(x)
    result = torch.empty((len(rows), format.row_bytes(rows.shape[1])), dtype=torch.uint8, device=rows.device)
    for part, weights in _experts(importance, rows):
        bad_row = _quantize(rows[part], format, encode, weights, result[part], threads or torch.get_num_threads())
        if bad_row is not None:
            raise not_finite(part.start + bad_row)
    return _like(x, result)


def dequantize(data: Array, name: str, threads: int | None = None, type: torch.dtype = torch.float32) -> Array:
    """Read rows of a ggml format: uint8 [rows, row bytes] -> [rows, columns], of data's kind, on its device.

    type: float32, or bfloat16 for tensors alone, which holds the nearest of its numbers.
    Raises BadInput for an unknown format, one that holds no weights (whole numbers), and rows of broken blocks.
    """
    format = format_named(name)
    if name not in FLOATS and name not in CODECS:
        raise BadInput(f"{name} holds no weights to dequantize")
    rows = _matrix(data)
    if rows.dtype != torch.uint8 or rows.shape[1] % format.block_bytes:
        raise BadInput(
            f"{name} rows are uint8 in multiples of {format.block_bytes} bytes, not {rows.shape[1]} of {rows.dtype}"
        )
    columns = rows.shape[1] // format.block_bytes * format.block_size
    result = torch.empty((len(rows), columns), dtype=type, device=rows.device)
    if kernels := kernels_for("decode", format, rows.device):
        kernels.dequantize(rows, format, result, threads or torch.get_num_threads())
        return _like(data, result)
    with _threads(threads):
        for start, chunk in _chunks(rows, columns):
            if name in FLOATS:
                result[start : start + len(chunk)] = chunk.contiguous().view(FLOATS[name])
            else:
                lanes = _to_lanes(chunk, format.block_bytes)
                result[start : start + len(chunk)] = CODECS[name].decode(lanes).T.reshape(len(chunk), columns)
    return _like(data, result)


def not_finite(row: int) -> BadInput:
    """What is wrong with rows of which this one cannot be quantized."""
    return BadInput(f"row {row} holds a value that is not finite")


def _quantize(
    rows: Tensor,
    format: Format,
    encode: Callable[[Tensor, Tensor | None], Tensor],
    weights: Tensor | None,
    result: Tensor,
    threads: int,
) -> int | None:
    """Fill uint8 `result` [rows, row bytes]; the first row that holds a value that is not finite, if any.

    weights: [experts, columns], of so many rows each, or none.
    """
    if kernels := kernels_for("encode", format, rows.device):
        return kernels.quantize(rows, format, weights, result, threads)
    share = len(rows) // (1 if weights is None else len(weights))
    with _threads(threads):
        for start, chunk in _chunks(rows, rows.shape[1]):
            expert = torch.arange(start, start + len(chunk), device=rows.device) // share
            values = chunk.to(torch.float32)
            finite = torch.isfinite(values).all(dim=1)
            if not finite.all():
                return start + int(finite.long().argmin())
            result[start : start + len(chunk)] = encode(values, None if weights is None else weights[expert])
    return None


def _encoder(format: Format) -> Callable[[Tensor, Tensor | None], Tensor]:
    """What turns float32 [rows, columns] with their weights, or none, into bytes [rows, row bytes]."""
    if format.name in FLOATS:
        return lambda values, _: _to_float(values, FLOATS[format.name])
    codec = CODECS.get(format.name)
    if codec is None:
        writable = ", ".join((*FLOATS, *CODECS))
        raise BadInput(f"cannot quantize to {format.name}; choose one of {writable}")
    return partial(_encode, codec, format)


def _encode(codec: Codec, format: Format, values: Tensor, weights: Tensor | None) -> Tensor:
    lanes = _to_lanes(values, format.block_size)
    unit = unit_of(lanes)
    if weights is None:
        data = (codec.encode_unweighted or codec.encode)(lanes * (1 / unit), unit, torch.ones_like(lanes))
    else:
        data = codec.encode(lanes * (1 / unit), unit, _to_lanes(weights, format.block_size))
    return data.T.reshape(len(values), format.row_bytes(values.shape[1]))


def _to_lanes(rows: Tensor, block_size: int) -> Tensor:
    return rows.reshape(-1, block_size).T.contiguous()


def _to_float(values: Tensor, type: torch.dtype) -> Tensor:
    largest = torch.finfo(type).max
    return values.clamp(-largest, largest).to(type).view(torch.uint8)


def _matrix(x: Array) -> Tensor:
    rows = x if isinstance(x, Tensor) else torch.from_numpy(np.ascontiguousarray(x))
    if rows.ndim != 2:
        raise BadInput(f"expected rows and columns, got an array of shape {tuple(rows.shape)}; reshape it")
    return rows


def _like(x: Array, result: Tensor) -> Array:
    return result if isinstance(x, Tensor) else result.numpy()


def _chunks(rows: Tensor, columns: int) -> Iterator[tuple[int, Tensor]]:
    count = max(1, CHUNK.get(rows.device.type, LARGE_CHUNK) // max(columns, 1))
    for start in range(0, len(rows), count):
        yield start, rows[start : start + count]


def _experts(importance: Array | None, rows: Tensor) -> Iterator[tuple[slice, Tensor | None]]:
    """Consecutive rows, with the weights of each of their experts' columns, [experts, columns], or none."""
    if importance is None:
        yield slice(0, len(rows)), None
        return
    weights = torch.as_tensor(importance, dtype=torch.float64)
    experts = len(weights) if weights.ndim == 2 else 1
    if weights.ndim not in (1, 2) or weights.shape[-1] != rows.shape[1] or not experts or len(rows) % experts:
        raise BadInput(
            f"importance has shape {tuple(weights.shape)}, expected one value for each of {rows.shape[1]} columns, "
            f"once or for each expert of {len(rows)} rows"
        )
    if not torch.isfinite(weights).all() or (weights < 0).any():
        raise BadInput("importance has a value that is negative or not finite")
    share, start = len(rows) // experts, 0
    for plain, group in groupby(map(relative_weights, weights.view(experts, -1)), key=lambda weights: weights is None):
        alike = list(group)
        part = slice(start, start + share * len(alike))
        yield (
            part,
            None if plain else torch.stack([weights for weights in alike if weights is not None]).to(rows.device),
        )
        start = part.stop


def relative_weights(importance: Tensor) -> Tensor | None:
    """Importance [..., columns] relative to its mean, floored: float32. None if it says nothing."""
    return relative_weights_of([importance])[0]


def relative_weights_of(importances: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    """`relative_weights` of each; all are looked at together, because asking stops a GPU."""
    plain = torch.stack([(importance == importance[..., :1]).all() for importance in importances]).tolist()
    return tuple(None if one else _relative(importance) for one, importance in zip(plain, importances, strict=True))


def _relative(importance: Tensor) -> Tensor:
    wide = importance.double()
    return (wide / wide.mean(dim=-1, keepdim=True)).clamp(min=LEAST_SQUARE).to(torch.float32)


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """torch with so many threads for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
