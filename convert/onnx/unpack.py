"""Unpacks ggml blocks into the codes, scales and zero points of ONNX Runtime, number for number."""

from __future__ import annotations

import torch
from torch import Tensor

from ...quant import dequantize, format_named
from ...quant.planning.onnx_packing import PACKINGS

_CHUNK = 1 << 18  # values at a time: what a core's cache holds


def unpack_blocks(rows: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Blocks of a ggml type that has a packing: uint8 [rows, row bytes] -> numbers and scales.

    Numbers are uint8 [rows, columns * bits / 8], the first of a byte in its lowest bits; scales are float32 [rows,
    columns / block]. `(number - 2^(bits - 1)) * scale` in float32 is what `dequantize` gives.
    """
    packing, format = PACKINGS[name], format_named(name)
    columns = rows.shape[1] // format.block_bytes * format.block_size
    numbers = torch.empty((len(rows), packing.number_bytes(columns)), dtype=torch.uint8)
    scales = torch.empty((len(rows), packing.scales(columns)))
    step = max(1, _CHUNK // columns)
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        values = _decoded_with(rows[part], packing.unit_scales, name)
        numbers[part] = _pack(values.to(torch.int8).view(torch.uint8) + packing.zero, packing.bits)  # both wrap around
        scales[part] = _decoded_with(rows[part], packing.unit_numbers, name)[:, :: packing.block]
    return numbers, scales


def _pack(numbers: Tensor, bits: int) -> Tensor:
    """uint8 [rows, columns] below 2^bits -> [rows, columns * bits / 8], the first of a byte in its lowest bits.

    Numbers that go into one byte are a word of so many bytes; shifted copies of it bring them side by side.
    """
    together = 8 // bits
    words = numbers.view(_WORDS[together])
    packed = words
    for place in range(1, together):
        packed = packed | words >> (8 - bits) * place
    return packed.to(torch.uint8)


_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


def _decoded_with(rows: Tensor, unit: tuple[int, bytes], name: str) -> Tensor:
    """The rows' values, were some bytes of every block others."""
    offset, replacement = unit
    blocks = rows.reshape(-1, format_named(name).block_bytes).clone()
    blocks[:, offset : offset + len(replacement)] = torch.frombuffer(bytearray(replacement), dtype=torch.uint8)
    return dequantize(blocks.view_as(rows), name)
