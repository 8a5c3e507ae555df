"""Expressions over stored tensors that encode numbers in fewer bits: codes, and the scales that belong to them."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from math import prod
from typing import ClassVar

from ..errors import BadInput
from .expressions import Derived, Expression, TensorInfo

MX_GROUP = 32  # columns that share a scale in microscaled formats (OCP MX)


@dataclass(frozen=True)
class _Codes(Derived):
    """Codes times scales of which there are few."""

    codes: TensorInfo
    scale: TensorInfo

    @property
    def shape(self) -> tuple[int, ...]:
        return self.codes.shape

    @property
    def parts(self) -> tuple[TensorInfo, ...]:
        return (self.codes, self.scale)

    @property
    def bits(self) -> float:
        return self.codes.bits


@dataclass(frozen=True)
class BlockScaled(_Codes):
    """`codes[i, j] * scale[i // block_rows, j // block_columns]`, the last blocks may be partial.

    MiniMax's `weight_scale_inv` and DeepSeek's `scale` are both multipliers, whatever their name says. Blocks of MXFP8
    (OCP MX) are 1x32, their scales E8M0.
    """

    block: tuple[int, int]

    def __post_init__(self) -> None:
        rows, columns = self.codes.shape
        expected = (-(-rows // self.block[0]), -(-columns // self.block[1]))
        if self.scale.shape != expected:
            raise BadInput(
                f"{self.scale.name} in {self.scale.file} has shape {list(self.scale.shape)}, expected "
                f"{list(expected)}: one scale for each {self.block[0]}x{self.block[1]} block of {self.codes.name}"
            )

    @property
    def exact(self) -> str | None:
        """E4M3 has 4 significant bits and E8M0 is a power of two: their product fits BF16, unlike one with float32."""
        return "BF16" if self.scale.dtype == "F8_E8M0" else None


@dataclass(frozen=True)
class Scaled(_Codes):
    """`codes * scale`: one scale for the whole weight, one for each row, or one for each expert of a stored stack."""

    def __post_init__(self) -> None:
        rows = self.codes.shape[0]
        if self.scale.shape not in ((), (1,), (1, 1), (rows,), (rows, 1)):
            raise BadInput(
                f"{self.scale.name} in {self.scale.file} has shape {list(self.scale.shape)}, expected one scale for "
                f"all of {self.codes.name} or [{rows}]"
            )


@dataclass(frozen=True)
class _Nibbles(Derived):
    """Two 4-bit codes in a byte, the even column in the low nibble, and one scale for each GROUP columns.

    A matrix, or a stack of them.
    """

    codes: TensorInfo
    scale: TensorInfo

    GROUP: ClassVar[int]

    def __post_init__(self) -> None:
        *rows, columns = self.shape
        if self.scale.shape != (*rows, columns // self.GROUP) or columns % self.GROUP:
            expected = ", ".join(f"{size:g}" for size in (*rows, columns / self.GROUP))
            raise BadInput(
                f"{self.scale.name} in {self.scale.file} has shape {list(self.scale.shape)}, expected "
                f"[{expected}]: one scale for each {self.GROUP} columns of {self.codes.name}"
            )

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.codes.shape[:-1], 2 * self.codes.shape[-1])

    @property
    def parts(self) -> tuple[TensorInfo, ...]:
        return (self.codes, self.scale)

    @property
    def bits(self) -> float:
        return 8 * (self.codes.length + self.scale.length) / prod(self.shape)


@dataclass(frozen=True)
class Nvfp4(_Nibbles):
    """NVIDIA's 4-bit floats: `e2m1(code) * scale[row, column // 16] * global scale`; `scale` is E4M3.

    The global scale is stored as its reciprocal by compressed-tensors. Without it the weight is that of a GGUF tensor
    before its `.scale`.
    """

    global_scale: TensorInfo | None
    reciprocal: bool = False

    GROUP: ClassVar[int] = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.global_scale and prod(self.global_scale.shape) != 1:
            raise BadInput(
                f"{self.global_scale.name} in {self.global_scale.file} has shape {list(self.global_scale.shape)}, "
                f"expected a single number"
            )

    @property
    def parts(self) -> tuple[TensorInfo, ...]:
        return (self.codes, self.scale, *((self.global_scale,) if self.global_scale else ()))


@dataclass(frozen=True)
class Mxfp4(_Nibbles):
    """Microscaled 4-bit floats (OCP MX): `e2m1(code) * scale[row, column // 32]`; `scale` is E8M0, a power of two."""

    GROUP: ClassVar[int] = MX_GROUP

    @property
    def exact(self) -> str:
        return "MXFP4"


@dataclass(frozen=True)
class GlobalScales(Derived):
    """The global scales of NVFP4 matrices as a vector: one, or one for each expert of a stack.

    `factors` are what the matrices are multiplied by besides.
    """

    matrices: tuple[Nvfp4, ...]
    factors: Expression | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.matrices),)

    @property
    def parts(self) -> tuple[Expression, ...]:
        return (*self.matrices, *((self.factors,) if self.factors else ()))

    @property
    def bits(self) -> float:
        return 32.0


class Packing(Enum):
    """Which tool packed a matrix of whole numbers of 4 bits, eight in a word, the first in the lowest bits."""

    COMPRESSED_TENSORS = "compressed-tensors"  # codes of one row in a word, zeros of one group of columns
    GPTQ = "gptq"  # codes of one row, all transposed; zeros of one group, words less 0x11111111
    GPTQ_V2 = "gptq_v2"  # the same, zeros as they are
    AWQ = "awq"  # codes of one column, all transposed; zeros of one group; in the order 0, 2, 4, 6, 1, 3, 5, 7


@dataclass(frozen=True)
class Int4(Derived):
    """Whole numbers of 4 bits: `(code - zero) * scale`, with one zero and one scale of a row for each group of columns.

    Groups of one size follow one another, unless `groups` says of each column which is its own. Without `zero` it is 8.
    `uniform` says that it is 8 and that groups follow one another, although there are tensors for either.
    """

    packing: Packing
    codes: TensorInfo
    scale: TensorInfo
    zero: TensorInfo | None = None
    groups: TensorInfo | None = None
    uniform: bool = False

    def __post_init__(self) -> None:
        rows, columns = self.shape
        count = self.scale.shape[1 if self.by_rows else 0]
        if columns % count and self.groups is None:
            raise self._unfit(self.scale, f"groups of one size of {columns} columns")
        self._expect(self.scale, (rows, count))
        if self.zero:
            self._expect(self.zero, (-(-rows // 8), count))
        if self.groups and self.groups.shape != (columns,):
            raise self._unfit(self.groups, f"[{columns}]")

    def _expect(self, tensor: TensorInfo, shape: tuple[int, int]) -> None:
        """Raises BadInput for another shape than this, or its transpose."""
        expected = shape if self.by_rows else shape[::-1]
        if tensor.shape != expected:
            raise self._unfit(tensor, str([*expected]))

    def _unfit(self, tensor: TensorInfo, expected: str) -> BadInput:
        return BadInput(
            f"{tensor.name} in {tensor.file} has shape {list(tensor.shape)}, expected {expected}: what belongs to "
            f"{self.codes.name} of {list(self.codes.shape)} words of eight numbers"
        )

    @property
    def by_rows(self) -> bool:
        """Whether tensors begin with the rows of the matrix, not with columns or groups of them."""
        return self.packing is Packing.COMPRESSED_TENSORS

    @property
    def shape(self) -> tuple[int, int]:
        first, last = self.codes.shape
        match self.packing:
            case Packing.COMPRESSED_TENSORS:
                return first, 8 * last
            case Packing.AWQ:
                return 8 * last, first
            case _:
                return last, 8 * first

    @property
    def parts(self) -> tuple[TensorInfo, ...]:
        return (self.codes, self.scale, *(tensor for tensor in (self.zero, self.groups) if tensor))

    @property
    def bits(self) -> float:
        """Without the order of the columns, which is none of the numbers."""
        lengths = (tensor.length for tensor in (self.codes, self.scale, self.zero) if tensor)
        return 8 * sum(lengths) / prod(self.shape)

    @property
    def exact(self) -> str | None:
        """Blocks of Q4_0 have one zero for all, and scales of 16 bits."""
        uniform = self.uniform or not (self.zero or self.groups)
        size = self.shape[1] // self.scale.shape[1 if self.by_rows else 0]
        return "Q4_0" if uniform and size % 32 == 0 and self.scale.dtype != "F32" else None
