"""The unified graph: frozen, printable, comparable blocks that every reader executes, writes or prices.

No reader asks which architecture a graph came from; everything it needs to know is a field here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from enum import Enum
from typing import Any

from .weights import Role, Weight


class Activation(Enum):
    """What lies between the projections of an expert or a multi-layer perceptron."""

    SWIGLU = "swiglu"  # silu(gate) * up
    RELU_SQUARED = "relu_squared"  # max(up, 0)^2, there is no gate (So et al. 2021)


class Score(Enum):
    """What turns router logits into scores."""

    SIGMOID = "sigmoid"


@dataclass(frozen=True)
class Norm:
    """RMSNorm: `x / sqrt(mean(x^2) + epsilon) * weight`, in float32 (Zhang & Sennrich 2019).

    A weight of shape [groups, size] normalises every group of `size` elements by itself.
    """

    weight: Weight
    epsilon: float


@dataclass(frozen=True)
class Rope:
    """Rotary embedding (Su et al. 2021) on the first `size` dimensions of a head, pairing i with i + size/2."""

    size: int
    base: float


@dataclass(frozen=True)
class Attention:
    """Causal grouped-query attention; query and key norms span all heads at once, before the heads are split.

    Without `rope` the attention knows no positions.
    """

    heads: int
    key_value_heads: int
    head_size: int
    query: Weight
    key: Weight
    value: Weight
    output: Weight
    query_norm: Norm | None = None
    key_norm: Norm | None = None
    rope: Rope | None = None


@dataclass(frozen=True)
class Mamba2:
    """A selective state space in its Mamba-2 form (Dao & Gu 2024), with inner size = heads * head size.

    `input` gives, in this order: gate [inner], x [inner], B and C [groups * state size] each, step [heads]. A causal
    depthwise convolution (taps oldest first) and SiLU act on x, B and C. With D_t = softplus(step + step_bias), each
    head keeps S_t = exp(D_t * decay) * S_(t-1) + D_t * x_t (outer) B_t and gives y_t = S_t C_t + skip * x_t. The gate
    comes before the norm: output(norm(y * silu(gate))).
    """

    heads: int
    head_size: int
    groups: int
    state_size: int
    input: Weight
    convolution: Weight
    convolution_bias: Weight
    step_bias: Weight
    decay: Weight
    skip: Weight
    norm: Norm
    output: Weight

    @property
    def inner_size(self) -> int:
        return self.heads * self.head_size


@dataclass(frozen=True)
class MLP:
    """`down(activation(up x))`: a dense layer, or the shared expert beside routed ones."""

    up: Weight
    down: Weight
    activation: Activation


@dataclass(frozen=True)
class Router:
    """Scores every expert, adds `bias` for the choice only, keeps `top_k` and renormalises their scores.

    With g = `groups` > 1 the experts form g equal groups, of which only the `groups_used` with the largest sum of
    two biased scores take part. The scores are divided by their sum + `epsilon` and multiplied by `scale`.
    """

    weight: Weight
    bias: Weight
    score: Score
    top_k: int
    groups: int = 1
    groups_used: int = 1
    epsilon: float = 0.0
    scale: float = 1.0


@dataclass(frozen=True)
class MoE:
    """Routed experts `down(activation(gate x, up x))`, weighted by the router and summed.

    With latent projections the experts live in a smaller space: `latent_up(sum of experts(latent_down x))`; the
    router and the shared expert, whose answer is added, see x itself.
    """

    router: Router
    up: Weight
    down: Weight
    activation: Activation
    gate: Weight | None = None
    latent_down: Weight | None = None
    latent_up: Weight | None = None
    shared: MLP | None = None

    @property
    def experts(self) -> int:
        return self.up.shape[0]

    @property
    def expert_size(self) -> int:
        """Width of one expert's hidden layer."""
        return self.up.shape[1]


Operation = Attention | Mamba2 | MLP | MoE


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
class Prediction:
    """A block that drafts the token after next (multi-token prediction) for speculative decoding.

    Its input is `projection([embedding_norm(embedding of the next token), hidden_norm(hidden)])`; its output goes
    through a LayerNorm (mean removed) and the model's head. The model itself never runs it.
    """

    embedding_norm: Norm
    hidden_norm: Norm
    projection: Weight
    layer: Layer
    final_layer_norm: Weight


@dataclass(frozen=True)
class Graph:
    """A whole model. Widths are in elements, `context_length` in tokens.

    `scaled_roles` are the roles whose weights llama.cpp multiplies by a tensor `<name>.scale` of the same file.
    """

    architecture: str
    vocabulary_size: int
    hidden_size: int
    context_length: int
    embedding: Weight
    layers: tuple[Layer, ...]
    final_norm: Norm
    head: Weight
    predictions: tuple[Prediction, ...] = ()
    scaled_roles: tuple[Role, ...] = ()

    def weights(self) -> Iterator[Weight]:
        """Every weight once, in file order."""
        return _weights(self)

    def parameters(self) -> int:
        """Number of weights' elements, the stored head of tied models counted."""
        return sum(weight.elements for weight in self.weights())

    def active_parameters(self) -> int:
        """Elements that one token touches: `top_k` experts of each stack, one row of the embedding, no drafting."""
        drafting = sum(weight.elements for weight in _weights(self.predictions))
        active = self.parameters() - drafting - self.embedding.elements + self.hidden_size
        for operation in self.operations():
            if isinstance(operation, MoE):
                unused = operation.experts - operation.router.top_k
                stacks = (stack for stack in (operation.gate, operation.up, operation.down) if stack)
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
