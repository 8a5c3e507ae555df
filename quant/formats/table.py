"""Every tensor type a GGUF file can hold, as data: its number in the file and the size of its blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from ...errors import BadInput

Work = Literal["decode", "encode", "choose"]  # what kernels do with a format: see devices.Kernels


@dataclass(frozen=True)
class Format:
    """A ggml tensor type: rows are cut into blocks of `block_size` values, each stored in `block_bytes` bytes."""

    name: str
    id: int
    block_size: int
    block_bytes: int

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.block_bytes / self.block_size

    def fits(self, columns: int) -> bool:
        """Whether a row of `columns` values divides into whole blocks."""
        return columns % self.block_size == 0

    def row_bytes(self, columns: int) -> int:
        """Bytes of a row of `columns` values; BadInput if the row does not divide into whole blocks."""
        if not self.fits(columns):
            raise BadInput(
                f"{self.name} stores rows in blocks of {self.block_size} values, which {columns} columns do not "
                f"divide into; choose a type with a smaller block"
            )
        return columns // self.block_size * self.block_bytes


# name, id, values in a block, bytes of a block. Q8_1 and Q8_K are what ggml computes with and never stores.
_TYPES: Final = (
    ("F32", 0, 1, 4),
    ("F16", 1, 1, 2),
    ("Q4_0", 2, 32, 18),
    ("Q4_1", 3, 32, 20),
    ("Q5_0", 6, 32, 22),
    ("Q5_1", 7, 32, 24),
    ("Q8_0", 8, 32, 34),
    ("Q2_K", 10, 256, 84),
    ("Q3_K", 11, 256, 110),
    ("Q4_K", 12, 256, 144),
    ("Q5_K", 13, 256, 176),
    ("Q6_K", 14, 256, 210),
    ("IQ2_XXS", 16, 256, 66),
    ("IQ2_XS", 17, 256, 74),
    ("IQ3_XXS", 18, 256, 98),
    ("IQ1_S", 19, 256, 50),
    ("IQ4_NL", 20, 32, 18),
    ("IQ3_S", 21, 256, 110),
    ("IQ2_S", 22, 256, 82),
    ("IQ4_XS", 23, 256, 136),
    ("I8", 24, 1, 1),
    ("I16", 25, 1, 2),
    ("I32", 26, 1, 4),
    ("I64", 27, 1, 8),
    ("F64", 28, 1, 8),
    ("IQ1_M", 29, 256, 56),
    ("BF16", 30, 1, 2),
    ("TQ1_0", 34, 256, 54),
    ("TQ2_0", 35, 256, 66),
    ("MXFP4", 39, 32, 17),
    ("NVFP4", 40, 64, 36),
    ("Q1_0", 41, 128, 18),
    ("Q2_0", 42, 64, 18),
)

NO_WEIGHTS: Final = ("I8", "I16", "I32", "I64", "F64")

FORMATS: Final[dict[str, Format]] = {fields[0]: Format(*fields) for fields in _TYPES}
LARGEST_BLOCK: Final = max(format.block_size for format in FORMATS.values())  # every row of a multiple fits all types
_BY_ID: Final = {format.id: format for format in FORMATS.values()}


def format_named(name: str) -> Format:
    """The type called `name` ("Q4_K"); BadInput if there is none."""
    if name not in FORMATS:
        raise BadInput(f"unknown tensor type {name!r}; known types: {', '.join(FORMATS)}")
    return FORMATS[name]


def format_with_id(id: int) -> Format:
    """The type that a GGUF file calls `id`; BadInput if there is none."""
    if id not in _BY_ID:
        raise BadInput(f"unknown tensor type number {id}; the file is damaged or from a newer llama.cpp")
    return _BY_ID[id]
