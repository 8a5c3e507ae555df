"""ggml blocks into what ONNX Runtime multiplies with, number for number."""

from __future__ import annotations

import torch
from torch import Tensor

from ...quant import dequantize, format_named
from ...quant.packing import PACKINGS


def unpack_blocks(rows: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Blocks of a ggml type that has a packing: uint8 [rows, row bytes] -> numbers and scales.

    Numbers are uint8 [rows, columns * bits / 8], the first of a byte in its lowest bits; scales are float32 [rows,
    columns / block]. `(number - 2^(bits - 1)) * scale` in float32 is what `dequantize` gives.
    """
    packing, format = PACKINGS[name], format_named(name)
    blocks = rows.view(-1, format.block_bytes)
    columns = rows.shape[1] // format.block_bytes * format.block_size
    values = _decoded_with(blocks, packing.unit_scales, name).view(len(rows), columns)
    scales = _decoded_with(blocks, packing.unit_numbers, name).view(len(rows), columns)[:, :: packing.block]
    numbers = (values + packing.zero).to(torch.uint8).view(len(rows), -1, 8 // packing.bits)
    packed = numbers[..., 0]
    for place in range(1, numbers.shape[-1]):
        packed = packed | numbers[..., place] << (packing.bits * place)
    return packed, scales.contiguous()


def _decoded_with(blocks: Tensor, unit: tuple[int, bytes], name: str) -> Tensor:
    """The blocks' values, were some of their bytes others."""
    offset, replacement = unit
    changed = blocks.clone()
    changed[:, offset : offset + len(replacement)] = torch.frombuffer(bytearray(replacement), dtype=torch.uint8)
    return dequantize(changed, name)
