"""Expressions over stored tensors: where the numbers of a weight come from, never the numbers themselves.

A new kind of expression is a class here and a line in `sources.decode`, which evaluates expressions for one expert or
some rows at a time; so nothing here needs an array library.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Protocol

from ..errors import BadInput

PLAIN_DTYPES = ("F32", "F16", "BF16")


@dataclass(frozen=True)
class TensorInfo:
    """One stored tensor: `shape` in elements, slowest dimension first; `length` bytes at `offset` of `file`.

    `dtype` is a safetensors name (``BF16``, ``F8_E4M3``) or a ggml type (``Q4_K``).
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    offset: int
    length: int

    @property
    def rows(self) -> int:
        """Number of contiguous rows: the product of all dimensions but the last."""
        return prod(self.shape[:-1]) if self.shape else 1

    @property
    def bits(self) -> float:
        """Bits that it takes for each element."""
        return 8 * self.length / max(prod(self.shape), 1)

    @property
    def exact(self) -> str | None:
        """The ggml type that holds its elements without loss."""
        return "I32" if self.dtype == "I64" else self.dtype


class Expression(Protocol):
    """Numbers made of stored tensors."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the numbers, slowest dimension first."""

    @property
    def parts(self) -> tuple[TensorInfo | Expression, ...]:
        """What it is made of, in the order of reading."""

    @property
    def bits(self) -> float:
        """What the stored form takes for each number, coarse scales of FP8 left out; the most of its parts."""

    @property
    def exact(self) -> str | None:
        """The ggml type that loses nothing; None where that would take 32 bits for numbers stored in fewer."""

    def of_expert(self, expert: int | None) -> Expression:
        """The part that one expert depends on."""


class Derived:
    """An expression's members as they follow from its parts, where its class says nothing else."""

    @property
    def bits(self: Expression) -> float:
        return max(part.bits for part in self.parts)

    @property
    def exact(self) -> str | None:
        return None

    def of_expert(self: Expression, expert: int | None) -> Expression:
        return self


class _Moved(Derived):
    """An expression whose numbers are those of its parts, none of them changed."""

    @cached_property  # a stack of experts has thousands of parts
    def exact(self: Expression) -> str | None:
        types = {part.exact for part in self.parts}
        return types.pop() if len(types) == 1 else None


@dataclass(frozen=True)
class Read(_Moved):
    """A tensor whose stored values are the weight."""

    tensor: TensorInfo

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tensor.shape

    @property
    def parts(self) -> tuple[TensorInfo]:
        return (self.tensor,)


@dataclass(frozen=True)
class Reshape(Derived):
    """All numbers of a small tensor in another shape."""

    tensor: TensorInfo
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        if prod(self.tensor.shape) != prod(self.shape):
            raise BadInput(
                f"{self.tensor.name} in {self.tensor.file} has shape {list(self.tensor.shape)}, expected as many "
                f"numbers as {list(self.shape)} holds"
            )

    @property
    def parts(self) -> tuple[TensorInfo]:
        return (self.tensor,)


@dataclass(frozen=True)
class _Wrapped(Derived):
    """An expression made of another one."""

    source: Expression

    @property
    def parts(self) -> tuple[Expression]:
        return (self.source,)


@dataclass(frozen=True)
class _Mapped(_Wrapped):
    """A function of each number, in the shape of the source."""

    @property
    def shape(self) -> tuple[int, ...]:
        return self.source.shape


@dataclass(frozen=True)
class NegativeExponential(_Mapped):
    """`-exp(source)` in float32."""


@dataclass(frozen=True)
class OnePlus(_Mapped):
    """`1 + source` in float32: norms that are stored as their distance from one, as files and engines want them."""


@dataclass(frozen=True)
class Below(_Mapped, _Moved):
    """A stored table whose rows hold different whole numbers from 0 to `limit` - 1: they index something."""

    source: Read
    limit: int


@dataclass(frozen=True)
class Zeros(Derived):
    """A weight that a file format demands and the model does not have."""

    shape: tuple[int, ...]

    @property
    def parts(self) -> tuple[Expression, ...]:
        return ()

    @property
    def bits(self) -> float:
        return 32.0


@dataclass(frozen=True)
class Padded(_Wrapped):
    """`factor * source` in the first rows and columns of a larger matrix, zeros in the others."""

    shape: tuple[int, ...]
    factor: float = 1.0

    def of_expert(self, expert: int | None) -> Expression:
        return self.source.of_expert(expert)


@dataclass(frozen=True)
class SideBySide(_Moved):
    """Matrices of equally many rows, one after another along the columns."""

    parts: tuple[Expression, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.parts[0].shape[0], sum(part.shape[1] for part in self.parts))


@dataclass(frozen=True)
class Rows(_Wrapped, _Moved):
    """Rows `start` to before `stop`, every `step`-th, of all matrices of `source`: fused projections hold several."""

    start: int
    stop: int
    step: int = 1

    @property
    def shape(self) -> tuple[int, ...]:
        *leading, _, columns = self.source.shape
        return (*leading, len(range(self.start, self.stop, self.step)), columns)

    def span(self, rows: tuple[int, int] | None) -> tuple[int, int]:
        """From which row of the source to before which some of these, or all of them, lie."""
        start, stop = rows or (0, self.shape[-2])
        return self.start + start * self.step, self.start + (stop - 1) * self.step + 1

    def of_expert(self, expert: int | None) -> Expression:
        return self.source.of_expert(expert)


@dataclass(frozen=True)
class Columns(_Wrapped, _Moved):
    """Every `step`-th column of `source` from `start` on: what is stored by turns with something else."""

    start: int
    step: int

    @property
    def shape(self) -> tuple[int, ...]:
        *leading, columns = self.source.shape
        return (*leading, len(range(self.start, columns, self.step)))

    def of_expert(self, expert: int | None) -> Expression:
        return self.source.of_expert(expert)


@dataclass(frozen=True)
class Transposed(_Wrapped, _Moved):
    """Every matrix of `source` with rows and columns exchanged."""

    @property
    def exact(self) -> str | None:
        """Blocks run along rows, so that only single numbers stay what they are."""
        found = self.source.exact
        return found if found in PLAIN_DTYPES else None

    @property
    def shape(self) -> tuple[int, ...]:
        *leading, rows, columns = self.source.shape
        return (*leading, columns, rows)

    def of_expert(self, expert: int | None) -> Expression:
        return self.source.of_expert(expert)


@dataclass(frozen=True)
class Stack(_Moved):
    """One matrix per expert, stacked along a new first dimension."""

    experts: tuple[Expression, ...]

    def __post_init__(self) -> None:
        for expert in self.experts:
            if expert.shape != self.experts[0].shape:
                raise BadInput(
                    f"{first_tensor(expert).name} in {first_tensor(expert).file} has shape {list(expert.shape)}, "
                    f"expected {list(self.experts[0].shape)} like expert 0"
                )

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.experts), *self.experts[0].shape)

    @property
    def parts(self) -> tuple[Expression, ...]:
        return self.experts

    def of_expert(self, expert: int | None) -> Expression:
        return self if expert is None else self.experts[expert]


def stored_tensors(expression: Expression) -> Iterator[TensorInfo]:
    """Every stored tensor that an expression reads."""
    for part in expression.parts:
        if isinstance(part, TensorInfo):
            yield part
        else:
            yield from stored_tensors(part)


def first_tensor(expression: Expression) -> TensorInfo:
    """The tensor to name when an expression is at fault."""
    return next(stored_tensors(expression))
