"""Weights as promises: where the numbers come from, never the numbers themselves.

A `Weight` carries an expression over stored tensors. `sources.decode` evaluates it for one expert or some rows
at a time, so nothing here needs an array library.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from math import prod

from .errors import BadInput


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


@dataclass(frozen=True)
class Read:
    """A tensor whose stored values are the weight."""

    tensor: TensorInfo

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tensor.shape


@dataclass(frozen=True)
class BlockScaled:
    """`codes[i, j] * scale[i // block_rows, j // block_columns]`, the last blocks may be partial.

    MiniMax's `weight_scale_inv` and DeepSeek's `scale` are both multipliers, whatever their name says.
    """

    codes: TensorInfo
    scale: TensorInfo
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
    def shape(self) -> tuple[int, ...]:
        return self.codes.shape


@dataclass(frozen=True)
class Rows:
    """Rows `start` to `stop` of every matrix of `source` (fused projections hold several weights)."""

    source: Expression
    start: int
    stop: int

    @property
    def shape(self) -> tuple[int, ...]:
        *leading, _, columns = self.source.shape
        return (*leading, self.stop - self.start, columns)


@dataclass(frozen=True)
class Stack:
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


Expression = Read | BlockScaled | Rows | Stack


def stored_tensors(expression: Expression) -> Iterator[TensorInfo]:
    """Every stored tensor that an expression reads."""
    match expression:
        case Read(tensor):
            yield tensor
        case BlockScaled(codes, scale):
            yield codes
            yield scale
        case Rows(source):
            yield from stored_tensors(source)
        case Stack(experts):
            for expert in experts:
                yield from stored_tensors(expert)


def first_tensor(expression: Expression) -> TensorInfo:
    """The tensor to name when an expression is at fault."""
    return next(stored_tensors(expression))


class Role(Enum):
    """What a weight does; decides whether it may be quantised and how recipes treat it."""

    EMBEDDING = "embedding"
    HEAD = "head"
    NORM = "norm"
    ATTENTION_Q = "attention_q"
    ATTENTION_K = "attention_k"
    ATTENTION_V = "attention_v"
    ATTENTION_OUTPUT = "attention_output"
    ROUTER = "router"
    ROUTER_BIAS = "router_bias"
    EXPERT_GATE = "expert_gate"
    EXPERT_UP = "expert_up"
    EXPERT_DOWN = "expert_down"

    @property
    def protected(self) -> bool:
        """True for weights that are kept in float32: tiny, and every other number depends on them."""
        return self in (Role.NORM, Role.ROUTER, Role.ROUTER_BIAS)


@dataclass(frozen=True)
class Weight:
    """A named weight of the graph: `shape` is [n], [rows, columns] or [experts, rows, columns].

    `name` is the GGUF name. Raises BadInput when the stored tensors do not have the shape that the graph needs.
    """

    name: str
    role: Role
    shape: tuple[int, ...]
    source: Expression

    def __post_init__(self) -> None:
        if self.source.shape != self.shape:
            tensor = first_tensor(self.source)
            raise BadInput(
                f"{tensor.name} in {tensor.file} gives shape {list(self.source.shape)}, "
                f"expected {list(self.shape)} from the configuration"
            )

    @property
    def experts(self) -> int | None:
        """Number of experts in a stack of experts, None for any other weight."""
        return self.shape[0] if len(self.shape) == 3 else None

    @property
    def layer(self) -> int | None:
        """Index of the layer it belongs to, None for embedding, final norm and head."""
        return int(self.name.split(".")[1]) if self.name.startswith("blk.") else None

    @property
    def columns(self) -> int:
        return self.shape[-1]

    @property
    def elements(self) -> int:
        return prod(self.shape)
