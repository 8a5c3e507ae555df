"""Weights of a graph: a name, a role, a shape, and the expression that says where the numbers come from."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from enum import Enum
from math import prod

from ..errors import BadInput
from .expressions import Expression, Padded, first_tensor


class StackKind(Enum):
    """What a stack of matrices has one each for."""

    EXPERTS = "experts"
    HEADS = "heads"


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
    ATTENTION_KEY_UP = "attention_key_up"  # from a latent to each head's keys and values
    ATTENTION_VALUE_UP = "attention_value_up"
    ATTENTION_SINK = "attention_sink"
    COMPRESSOR = "compressor"
    COMPRESSOR_POSITION = "compressor_position"
    INDEXER = "indexer"
    INDEXER_HEADS = "indexer_heads"
    BLOCK_INDEX = "block_index"  # which blocks of tokens another one sees
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
    SHARED_ROUTER = "shared_router"  # how much of the shared expert a token takes
    DENSE_GATE = "dense_gate"
    DENSE_UP = "dense_up"
    DENSE_DOWN = "dense_down"
    MAMBA_INPUT = "mamba_input"
    MAMBA_OUTPUT = "mamba_output"
    MAMBA_CONVOLUTION = "mamba_convolution"
    MAMBA_SCALAR = "mamba_scalar"
    DELTA_INPUT = "delta_input"  # query, key and value of linear attention
    DELTA_GATE = "delta_gate"
    DELTA_OUTPUT = "delta_output"
    DELTA_RATE = "delta_rate"  # how much of a token is written, and how much is kept of all before
    DELTA_CONVOLUTION = "delta_convolution"
    DELTA_SCALAR = "delta_scalar"
    PER_LAYER_TABLE = "per_layer_table"  # a vector of each token for each layer
    PER_LAYER_PROJECTION = "per_layer_projection"
    PER_LAYER_GATE = "per_layer_gate"
    PER_LAYER_OUTPUT = "per_layer_output"
    PREDICTION_INPUT = "prediction_input"
    SUCCESSOR = "successor"  # low-rank factors of which token follows which
    CONFIDENCE = "confidence"
    SCALE = "scale"
    BIAS = "bias"

    @property
    def keep_f32(self) -> bool:
        """True for weights that are kept in float32: tiny, and every other number depends on them."""
        return self in _KEPT_F32

    @property
    def stack(self) -> StackKind | None:
        """What such weights have a matrix each for; None for a single matrix or vector."""
        return _STACKS.get(self)


_KEPT_F32 = (
    Role.NORM,
    Role.ROUTER,
    Role.ROUTER_BIAS,
    Role.SHARED_ROUTER,
    Role.ATTENTION_SINK,
    Role.COMPRESSOR_POSITION,
    Role.INDEXER_HEADS,
    Role.BLOCK_INDEX,
    Role.HYPER_CONNECTION,
    Role.MAMBA_CONVOLUTION,
    Role.MAMBA_SCALAR,
    Role.DELTA_RATE,
    Role.DELTA_CONVOLUTION,
    Role.DELTA_SCALAR,
    Role.CONFIDENCE,
    Role.SCALE,
    Role.BIAS,
)
_STACKS = {
    Role.EXPERT_GATE: StackKind.EXPERTS,
    Role.EXPERT_UP: StackKind.EXPERTS,
    Role.EXPERT_DOWN: StackKind.EXPERTS,
    Role.ATTENTION_KEY_UP: StackKind.HEADS,
    Role.ATTENTION_VALUE_UP: StackKind.HEADS,
}


def check_shape(source: Expression, shape: tuple[int, ...]) -> None:
    """Raises BadInput for numbers of another shape than a configuration demands."""
    if source.shape != shape:
        tensor = first_tensor(source)
        raise BadInput(
            f"{tensor.name} in {tensor.file} gives shape {list(source.shape)}, expected {list(shape)} from the "
            "configuration"
        )


@dataclass(frozen=True)
class Weight:
    """A named weight of the graph: `shape` is [n], [rows, columns], or of a stack [experts or heads, rows, columns].

    `name` is the GGUF name. Raises BadInput when the stored tensors do not have the shape that the graph needs.
    """

    name: str
    role: Role
    shape: tuple[int, ...]
    source: Expression

    def __post_init__(self) -> None:
        check_shape(self.source, self.shape)
        assert (len(self.shape) == 3) == (self.stack is not None), f"{self.name}: {self.role} of {self.shape}"

    @property
    def origin(self) -> Hashable:
        """Equal for the weights of a graph and of its other forms that hold the same numbers; cheap to compare."""
        source = self.source
        return (
            (id(source.source), self.shape, source.factor) if isinstance(source, Padded) else (id(source), self.shape)
        )

    @property
    def stack(self) -> StackKind | None:
        """What the weight has a matrix each for; None for a single matrix or vector."""
        return self.role.stack

    @property
    def experts(self) -> int | None:
        """Number of experts in a stack of experts, None for any other weight."""
        return self.shape[0] if self.stack is StackKind.EXPERTS else None

    @property
    def matrices(self) -> int:
        """Number of matrices in a stack, 1 for any other weight."""
        return self.shape[0] if self.stack else 1

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

    @property
    def may_be_quantized(self) -> bool:
        """Whether it may have another type than the one it always has."""
        return not self.role.keep_f32 and len(self.shape) > 1 and self.role is not Role.HASH_TABLE


def scale_name(name: str) -> str:
    """The name of the tensor that llama.cpp multiplies the one of that name by."""
    return f"{name.removesuffix('.weight')}.scale"
