"""Weights of the graph: a name, a role, a shape, and the expression that says where the numbers come from."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from math import prod

from ..errors import BadInput
from .expressions import Expression, first_tensor


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
