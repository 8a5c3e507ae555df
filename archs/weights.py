"""Weights of a graph: names, roles, shapes, and where the numbers come from, never the numbers themselves.

A `Weight` carries an expression over stored tensors. `sources.decode` evaluates it for one expert or some rows
at a time, so nothing here needs an array library.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from math import prod
from typing import ClassVar

from ..errors import BadInput


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
class Scaled:
    """`codes * scale`: one scale for the whole weight, one for each row, or one for each expert of a stored stack."""

    codes: TensorInfo
    scale: TensorInfo

    def __post_init__(self) -> None:
        rows = self.codes.shape[0]
        if self.scale.shape not in ((), (1,), (1, 1), (rows,), (rows, 1)):
            raise BadInput(
                f"{self.scale.name} in {self.scale.file} has shape {list(self.scale.shape)}, expected one scale for "
                f"all of {self.codes.name} or [{rows}]"
            )

    @property
    def shape(self) -> tuple[int, ...]:
        return self.codes.shape


def _check_group_scales(codes: TensorInfo, scale: TensorInfo, shape: tuple[int, ...], group: int) -> None:
    """Every `group` columns of a matrix of that shape have a scale. Raises BadInput where they do not."""
    rows, columns = shape
    if scale.shape != (rows, columns // group) or columns % group:
        raise BadInput(
            f"{scale.name} in {scale.file} has shape {list(scale.shape)}, expected "
            f"[{rows}, {columns / group:g}]: one scale for each {group} columns of {codes.name}"
        )


@dataclass(frozen=True)
class Nvfp4:
    """NVIDIA's 4-bit floats: `e2m1(code) * scale[row, column // 16] * global scale`.

    `codes` holds two columns in a byte, the even one in the low nibble; `scale` is E4M3. The global scale is stored
    as its reciprocal by compressed-tensors. Without it the weight is that of a GGUF tensor before its `.scale`.
    """

    codes: TensorInfo
    scale: TensorInfo
    global_scale: TensorInfo | None
    reciprocal: bool = False

    GROUP: ClassVar[int] = 16

    def __post_init__(self) -> None:
        _check_group_scales(self.codes, self.scale, self.shape, self.GROUP)
        if self.global_scale and prod(self.global_scale.shape) != 1:
            raise BadInput(
                f"{self.global_scale.name} in {self.global_scale.file} has shape {list(self.global_scale.shape)}, "
                f"expected a single number"
            )

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.codes.shape[0], 2 * self.codes.shape[1])


@dataclass(frozen=True)
class GlobalScales:
    """The global scales of NVFP4 matrices as a vector: one, or one for each expert of a stack."""

    matrices: tuple[Nvfp4, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.matrices),)


@dataclass(frozen=True)
class Reshape:
    """All numbers of a small tensor in another shape."""

    tensor: TensorInfo
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        if prod(self.tensor.shape) != prod(self.shape):
            raise BadInput(
                f"{self.tensor.name} in {self.tensor.file} has shape {list(self.tensor.shape)}, expected as many "
                f"numbers as {list(self.shape)} holds"
            )


@dataclass(frozen=True)
class NegativeExponential:
    """`-exp(source)` in float32."""

    source: Expression

    @property
    def shape(self) -> tuple[int, ...]:
        return self.source.shape


@dataclass(frozen=True)
class Zeros:
    """A weight that a file format demands and the model does not have."""

    shape: tuple[int, ...]


@dataclass(frozen=True)
class Padded:
    """`factor * source` in the first rows and columns of a larger matrix, zeros in the others."""

    source: Expression
    shape: tuple[int, ...]
    factor: float = 1.0


@dataclass(frozen=True)
class Mxfp4:
    """Microscaled 4-bit floats (OCP MX): `e2m1(code) * scale[row, column // 32]`.

    `codes` holds two columns in a byte, the even one in the low nibble; `scale` is E8M0, a power of two.
    """

    codes: TensorInfo
    scale: TensorInfo

    GROUP: ClassVar[int] = 32

    def __post_init__(self) -> None:
        _check_group_scales(self.codes, self.scale, self.shape, self.GROUP)

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.codes.shape[0], 2 * self.codes.shape[1])


@dataclass(frozen=True)
class SideBySide:
    """Matrices of equally many rows, one after another along the columns."""

    parts: tuple[Expression, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.parts[0].shape[0], sum(part.shape[1] for part in self.parts))


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


Expression = (
    Read
    | BlockScaled
    | Scaled
    | Nvfp4
    | GlobalScales
    | Mxfp4
    | Reshape
    | NegativeExponential
    | Zeros
    | Padded
    | SideBySide
    | Rows
    | Stack
)


def stored_tensors(expression: Expression) -> Iterator[TensorInfo]:
    """Every stored tensor that an expression reads."""
    match expression:
        case Read(tensor) | Reshape(tensor):
            yield tensor
        case BlockScaled(codes, scale) | Scaled(codes, scale) | Mxfp4(codes, scale):
            yield codes
            yield scale
        case Nvfp4(codes, scale, global_scale):
            yield from (codes, scale)
            if global_scale:
                yield global_scale
        case Rows(source) | Padded(source) | NegativeExponential(source):
            yield from stored_tensors(source)
        case Stack(parts) | GlobalScales(parts) | SideBySide(parts):
            for part in parts:
                yield from stored_tensors(part)


def of_expert(expression: Expression, expert: int | None) -> Expression:
    """The part of an expression that one expert depends on."""
    match expression:
        case Stack(experts) if expert is not None:
            return experts[expert]
        case Padded(source) | Rows(source):
            return of_expert(source, expert)
    return expression


def first_tensor(expression: Expression) -> TensorInfo:
    """The tensor to name when an expression is at fault."""
    return next(stored_tensors(expression))


class Role(Enum):
    """What a weight does; decides whether it may be quantized and how recipes treat it."""

    EMBEDDING = "embedding"
    HEAD = "head"
    NORM = "norm"
    ATTENTION_Q = "attention_q"
    ATTENTION_K = "attention_k"
    ATTENTION_V = "attention_v"
    ATTENTION_OUTPUT = "attention_output"
    ATTENTION_Q_DOWN = "attention_q_down"  # low-rank factors: down to the latent width and up from it
    ATTENTION_Q_UP = "attention_q_up"
    ATTENTION_KV = "attention_kv"  # one head that is key and value at once
    ATTENTION_OUTPUT_DOWN = "attention_output_down"
    ATTENTION_OUTPUT_UP = "attention_output_up"
    ATTENTION_SINK = "attention_sink"
    COMPRESSOR = "compressor"
    COMPRESSOR_POSITION = "compressor_position"
    INDEXER = "indexer"
    INDEXER_HEADS = "indexer_heads"
    HYPER_CONNECTION = "hyper_connection"
    ROUTER = "router"
    ROUTER_BIAS = "router_bias"
    HASH_TABLE = "hash_table"
    EXPERT_GATE = "expert_gate"
    EXPERT_UP = "expert_up"
    EXPERT_DOWN = "expert_down"
    SHARED_GATE = "shared_gate"
    SHARED_UP = "shared_up"
    SHARED_DOWN = "shared_down"
    LATENT_DOWN = "latent_down"
    LATENT_UP = "latent_up"
    DENSE_UP = "dense_up"
    DENSE_DOWN = "dense_down"
    MAMBA_INPUT = "mamba_input"
    MAMBA_OUTPUT = "mamba_output"
    MAMBA_CONVOLUTION = "mamba_convolution"
    MAMBA_SCALAR = "mamba_scalar"
    PREDICTION_INPUT = "prediction_input"
    SCALE = "scale"

    @property
    def keep_f32(self) -> bool:
        """True for weights that are kept in float32: tiny, and every other number depends on them."""
        return self in _KEPT_F32


_KEPT_F32 = (
    Role.NORM,
    Role.ROUTER,
    Role.ROUTER_BIAS,
    Role.ATTENTION_SINK,
    Role.COMPRESSOR_POSITION,
    Role.INDEXER_HEADS,
    Role.HYPER_CONNECTION,
    Role.MAMBA_CONVOLUTION,
    Role.MAMBA_SCALAR,
    Role.SCALE,
)


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
