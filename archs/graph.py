"""The unified graph: frozen, printable, comparable blocks that every reader executes, writes or prices.

No reader asks which architecture a graph came from; everything it needs to know is a field here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass, replace
from enum import Enum
from typing import Any

from .weights import Role, Weight


class Activation(Enum):
    """What lies between the projections of an expert or a multi-layer perceptron."""

    SWIGLU = "swiglu"  # silu(gate) * up; with a clamp c: silu(min(gate, c)) * min(max(up, -c), c)
    RELU_SQUARED = "relu_squared"  # max(up, 0)^2, there is no gate (So et al. 2021)


class Score(Enum):
    """What turns router logits into scores."""

    SIGMOID = "sigmoid"
    SQRT_SOFTPLUS = "sqrt_softplus"


@dataclass(frozen=True)
class Norm:
    """RMSNorm: `x / sqrt(mean(x^2) + epsilon) * weight`, in float32 (Zhang & Sennrich 2019).

    A weight of shape [groups, size] normalizes every group of `size` elements by itself.
    """

    weight: Weight
    epsilon: float


@dataclass(frozen=True)
class Yarn:
    """Slows by `factor` the rotations that turn less than `slow` times within `original_context` tokens.

    Those that turn more than `fast` times stay, the ones between are blended (Peng et al. 2023; their attention
    factor is not used).
    """

    factor: float
    original_context: int
    fast: float
    slow: float


@dataclass(frozen=True)
class Rope:
    """Rotary embedding (Su et al. 2021) on `size` dimensions of a head: the first ones, or the `last`.

    Of these, i is paired with i + size/2, or, `interleaved`, 2i with 2i + 1.
    """

    size: int
    base: float
    interleaved: bool = False
    last: bool = False
    yarn: Yarn | None = None


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
class Compressor:
    """Pools every `ratio` tokens into one entry: per channel, values weighted by softmax(`gate x + position`).

    Where it `overlaps`, value and gate are twice as wide: a token's first half goes into the next entry, its second
    half into its own, so an entry pools 2 * ratio tokens. Entries are normalized, then rotated by the position of the
    first token of their own.
    """

    ratio: int
    overlaps: bool
    value: Weight
    gate: Weight
    position: Weight
    norm: Norm
    rope: Rope


@dataclass(frozen=True)
class Indexer:
    """Picks the `top_k` entries that a token attends to, by the sum over heads of `head_weight x * relu(query . key)`.

    Queries come from the attention's latent query, keys from a compressor of the same ratio.
    """

    heads: int
    head_size: int
    top_k: int
    query: Weight
    head_weight: Weight
    compressor: Compressor


@dataclass(frozen=True)
class CompressedAttention:
    """Attention to the last `window` tokens, and to compressed entries of the whole past (DeepSeek-AI 2026).

    One rotated vector per token or entry is key and value of all heads; the output is rotated back. Queries pass
    through a latent norm, then each head through a norm without weights. A learnt `sink` logit per head takes its
    share of the softmax. Output: the heads of each of `groups` groups are projected by the group's own rows of
    `output_down`, then `output_up` joins the groups. Without `indexer` every complete entry is attended to.
    """

    heads: int
    head_size: int
    window: int
    groups: int
    query_down: Weight
    query_norm: Norm
    query_up: Weight
    key_value: Weight
    key_value_norm: Norm
    sink: Weight
    output_down: Weight
    output_up: Weight
    rope: Rope
    compressor: Compressor | None
    indexer: Indexer | None


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
    """`down(activation(gate x, up x))`: a dense layer, or the shared expert beside routed ones."""

    up: Weight
    down: Weight
    activation: Activation
    gate: Weight | None = None
    clamp: float | None = None


@dataclass(frozen=True)
class Router:
    """Scores every expert, adds `bias` for the choice only, keeps `top_k` and renormalizes their scores.

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
class HashRouter:
    """Looks up a token's experts in `table` [vocabulary, top_k]; their shares come from scores as a `Router`'s do."""

    weight: Weight
    table: Weight
    score: Score
    epsilon: float
    scale: float

    @property
    def top_k(self) -> int:
        return self.table.columns


@dataclass(frozen=True)
class MoE:
    """Routed experts `down(activation(gate x, up x))`, weighted by the router and summed.

    With latent projections the experts live in a smaller space: `latent_up(sum of experts(latent_down x))`; the
    router and the shared expert, whose answer is added, see x itself.
    """

    router: Router | HashRouter
    up: Weight
    down: Weight
    activation: Activation
    gate: Weight | None = None
    latent_down: Weight | None = None
    latent_up: Weight | None = None
    shared: MLP | None = None
    clamp: float | None = None

    @property
    def experts(self) -> int:
        return self.up.shape[0]

    @property
    def expert_size(self) -> int:
        """Width of one expert's hidden layer."""
        return self.up.shape[1]


Operation = Attention | CompressedAttention | Mamba2 | MLP | MoE


@dataclass(frozen=True)
class ResidualMix:
    """A linear map of all residual streams of a token to the coefficients that mix them.

    `coefficients = scale * (function . streams / rms(streams)) + base`, with one scale for each kind of coefficient.
    """

    function: Weight
    base: Weight
    scale: Weight


@dataclass(frozen=True)
class HyperConnections:
    """A residual of several streams X_i, all beginning as the embedding (Xie et al. 2026).

    A sublayer reads `sum_i (sigmoid(a_i) + epsilon) X_i` and its output y becomes
    `X_j = 2 sigmoid(b_j) y + sum_i M_ij X_i`, where M is softmax(c) made doubly stochastic by Sinkhorn iterations and
    a, b, c [streams, streams] come from the sublayer's mix. After the last layer `head` gives the a's of the result.
    """

    multiplicity: int
    iterations: int
    epsilon: float
    norm_epsilon: float
    head: ResidualMix


@dataclass(frozen=True)
class SubLayer:
    """`x + operation(norm(x))`, or with the streams of hyper-connections mixed by `mix` in place of the sum."""

    norm: Norm
    operation: Operation
    mix: ResidualMix | None = None


@dataclass(frozen=True)
class Layer:
    index: int
    sublayers: tuple[SubLayer, ...]


@dataclass(frozen=True)
class Prediction:
    """A block that drafts the token after next (multi-token prediction) for speculative decoding.

    Its input is `projection([embedding_norm(embedding of the next token), hidden_norm(hidden)])`; its output goes
    through a LayerNorm (mean removed), or like the model's own through its final norm, and the model's head. The model
    itself never runs it.
    """

    embedding_norm: Norm
    hidden_norm: Norm
    projection: Weight
    layer: Layer
    final_layer_norm: Weight | None = None


@dataclass(frozen=True)
class Graph:
    """A whole model. Widths are in elements, `context_length` in tokens.

    `scaled_roles` are the roles whose weights llama.cpp multiplies by a tensor `<name>.scale` of the same file.
    `residual` is None for one stream that sublayers add to. `draft` is a graph without layers, whose predictions need
    a final norm and a stream mix of their own; it is no part of this graph's weights and makes a file of its own.
    `notes` say what of the checkpoint the graph leaves out.
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
    residual: HyperConnections | None = None
    draft: Graph | None = None
    notes: tuple[str, ...] = ()

    @property
    def residual_size(self) -> int:
        """Values of a token between two layers: those of all residual streams."""
        return self.hidden_size * (self.residual.multiplicity if self.residual else 1)

    def weights(self) -> Iterator[Weight]:
        """Every weight once, in file order."""
        return weights_in(replace(self, draft=None))

    def parameters(self) -> int:
        """Number of weights' elements, the stored head of tied models counted."""
        return sum(weight.elements for weight in self.weights() if weight.role is not Role.HASH_TABLE)

    def active_parameters(self) -> int:
        """Elements that one token touches: `top_k` experts of each stack, one row of the embedding, no drafting."""
        drafting = sum(weight.elements for weight in weights_in(self.predictions))
        active = self.parameters() - drafting - self.embedding.elements + self.hidden_size
        for operation in self.operations():
            if isinstance(operation, MoE):
                unused = operation.experts - operation.router.top_k
                stacks = (stack for stack in (operation.gate, operation.up, operation.down) if stack)
                active -= unused * sum(stack.elements // operation.experts for stack in stacks)
        return active

    def state_bytes_per_token(self, bytes_per_value: int = 2) -> int:
        """Bytes that each further token adds to the KV cache; compressed entries count by their share of a token."""
        values = 0
        for operation in self.operations():
            match operation:
                case Attention():
                    values += 2 * operation.key_value_heads * operation.head_size
                case CompressedAttention(compressor=Compressor(ratio=ratio), indexer=indexer):
                    values += (operation.head_size + (indexer.head_size if indexer else 0)) // ratio
        return values * bytes_per_value

    def operations(self) -> Iterator[Operation]:
        return (sublayer.operation for layer in self.layers for sublayer in layer.sublayers)


def weights_in(node: Any) -> Iterator[Weight]:
    """Every weight of a block, a layer or a whole graph, in file order."""
    if isinstance(node, Weight):
        yield node
    elif isinstance(node, tuple):
        for item in node:
            yield from weights_in(item)
    elif is_dataclass(node):
        for field in fields(node):
            yield from weights_in(getattr(node, field.name))


def graph_as_json(node: Any) -> Any:
    """A JSON-able picture of a graph or any part of it; weights appear as name, role and shape."""
    if isinstance(node, Weight):
        return {"name": node.name, "role": node.role.value, "shape": list(node.shape)}
    if isinstance(node, Enum):
        return node.value
    if isinstance(node, tuple):
        return [graph_as_json(item) for item in node]
    if is_dataclass(node):
        values = {field.name: graph_as_json(getattr(node, field.name)) for field in fields(node)}
        return {"kind": type(node).__name__} | values
    return node
