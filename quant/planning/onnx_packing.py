"""Which ggml types ONNX Runtime can hold number for number, as data.

Its kernels know whole numbers of 2, 4 or 8 bits in blocks along a row, each block with a float32 scale:
`(number - 2^(bits - 1)) * scale`. A ggml type has such a form when its blocks are whole numbers times scales, nothing
added.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from ..formats.table import Format


@dataclass(frozen=True)
class Packing:
    """The form of one ggml type: `bits` per number, `block` numbers to a scale.

    A ggml block keeps scales and numbers in two runs of bytes. `unit_scales` (offset, bytes) in place of the one makes
    it decode to its numbers, `unit_numbers` in place of the other to its scales. So one decoder serves both.
    """

    bits: int
    block: int
    unit_scales: tuple[int, bytes]
    unit_numbers: tuple[int, bytes]

    @property
    def zero(self) -> int:
        """The stored number that stands for 0."""
        return 1 << (self.bits - 1)

    def number_bytes(self, columns: int) -> int:
        return columns * self.bits // 8

    def scales(self, columns: int) -> int:
        """How many scales a row has."""
        return columns // self.block


_ONE, _MINUS_ONE = b"\x00\x3c", b"\x00\xbc"  # as float16

PACKINGS: Final = {
    "Q8_0": Packing(8, 32, (0, _ONE), (2, b"\x01" * 32)),
    "Q6_K": Packing(8, 16, (192, b"\x01" * 16 + _ONE), (0, b"\x11" * 128 + b"\xaa" * 64)),
    "Q5_0": Packing(8, 32, (0, _ONE), (2, b"\xff" * 4 + b"\x11" * 16)),
    "Q4_0": Packing(4, 32, (0, _ONE), (2, b"\x99" * 16)),
    "Q3_K": Packing(4, 16, (96, b"\x11" * 8 + b"\xaa" * 4 + _ONE), (0, b"\xff" * 32 + b"\x55" * 64)),
    # Its levels are -1, 0, 1 and 2, those of ONNX Runtime -2 to 1, so numbers and scales change sign.
    "Q2_0": Packing(2, 64, (0, _MINUS_ONE), (2, b"\x00" * 16)),
    "IQ4_NL": Packing(8, 32, (0, _ONE), (2, b"\x88" * 16)),
    "MXFP4": Packing(8, 32, (0, b"\x80"), (1, b"\x11" * 16)),
}

PLAIN: Final = {"F32": "float32", "I32": "int32"}
"""Types that are stored as they are, and what ONNX calls them."""


def storable(format: Format) -> bool:
    return format.name in PACKINGS or format.name in PLAIN


def row_bytes(format: Format, columns: int) -> int:
    """Bytes of a row of `columns` values: numbers and scales."""
    packing = PACKINGS.get(format.name)
    return packing.number_bytes(columns) + 4 * packing.scales(columns) if packing else format.row_bytes(columns)
