"""The unified graph: frozen, printable, comparable blocks that every reader executes, writes or prices.

No reader asks which architecture a graph came from; everything it needs to know is a field here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from enum import Enum
from typing import Any

from .weights import Weight


class Activation(Enum):
    """How an expert combines its gate and up projections."""

    SWIGLU = "swiglu"  # silu(gate) * up


class Score(Enum):
    """What turns router logits into scores."""

    SIGMOID = "sigmoid"


@dataclass(frozen=True)
class Norm:
    """RMSNorm: `x / sqrt(mean(x^2) + epsilon) * weight`, in float32 (Zhang & Sennrich 2019)."""

    weight: Weight
    epsilon: float


@dataclass(frozen=True)
class Rope:
    """Rotary embedding (Su et al. 2021) on the first `size` dimensions of a head, pairing i with i + size/2."""

    size: int
    base: float


@dataclass(frozen=True)
class Attention:
    """Causal grouped-query attention; query and key norms span all heads at once, before the heads are split."""

    heads: int
    key_value_heads: int
    head_size: int
    query: Weight
    key: Weight
    value: Weight
    output: Weight
    query_norm: Norm
    key_norm: Norm
    rope: Rope


@dataclass(frozen=True)
class Router:
    """Scores every expert, adds `bias` for the choice only, keeps `top_k` and renormalises their scores."""

    weight: Weight
    bias: Weight
    score: Score
    top_k: int


@dataclass(frozen=True)
class MoE:
    """Routed experts `down(activation(gate x, up x))`, weighted by the router and summed."""

    router: Router
    gate: Weight
    up: Weight
    down: Weight
    activation: Activation

    @property
    def experts(self) -> int:
        return self.gate.shape[0]

    @property
    def expert_size(self) -> int:
        """Width of one expert's hidden layer."""
        return self.gate.shape[1]


Operation = Attention | MoE


@dataclass(frozen=True)
class SubLayer:
    """`x + operation(norm(x))`."""

    norm: Norm
    operation: Operation


@dataclass(frozen=True)
class Layer:
    index: int
    sublayers: tuple[SubLayer, ...]


@dataclass(frozen=True)
class Graph:
    """A whole model. Widths are in elements, `context_length` in tokens."""

    architecture: str
    vocabulary_size: int
    hidden_size: int
    context_length: int
    embedding: Weight
    layers: tuple[Layer, ...]
    final_norm: Norm
    head: Weight

    def weights(self) -> Iterator[Weight]:
        """Every weight once, in file order."""
        return _weights(self)

    def parameters(self) -> int:
        """Number of weights' elements, the stored head of tied models counted."""
        return sum(weight.elements for weight in self.weights())

    def active_parameters(self) -> int:
        """Elements that one token touches: `top_k` experts of each stack, one row of the embedding."""
        active = self.parameters() - self.embedding.elements + self.hidden_size
        for operation in self.operations():
            if isinstance(operation, MoE):
                unused = operation.experts - operation.router.top_k
                stacks = (operation.gate, operation.up, operation.down)
                active -= unused * sum(stack.elements // operation.experts for stack in stacks)
        return active

    def state_bytes_per_token(self, bytes_per_value: int = 2) -> int:
        """Bytes that each further token adds to the KV cache."""
        attentions = (operation for operation in self.operations() if isinstance(operation, Attention))
        return sum(2 * a.key_value_heads * a.head_size * bytes_per_value for a in attentions)

    def operations(self) -> Iterator[Operation]:
        return (sublayer.operation for layer in self.layers for sublayer in layer.sublayers)


def _weights(node: Any) -> Iterator[Weight]:
    if isinstance(node, Weight):
        yield node
    elif isinstance(node, tuple):
        for item in node:
            yield from _weights(item)
    elif is_dataclass(node):
        for field in fields(node):
            yield from _weights(getattr(node, field.name))


def describe(node: Any) -> Any:
    """A JSON-able picture of a graph or any part of it; weights appear as name, role and shape."""
    if isinstance(node, Weight):
        return {"name": node.name, "role": node.role.value, "shape": list(node.shape)}
    if isinstance(node, Enum):
        return node.value
    if isinstance(node, tuple):
        return [describe(item) for item in node]
    if is_dataclass(node):
        values = {field.name: describe(getattr(node, field.name)) for field in fields(node)}
        return {"kind": type(node).__name__} | values
    return node
