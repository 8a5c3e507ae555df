"""Layers, the residual that they share, and the whole model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from ..weights import Role, Weight
from .operation import Operation
from .parts import Norm
from .per_layer import PerLayerEmbedding
from .walk import weights_in, with_operations


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
class Branch:
    """`post_norm(operation(norm(x)))`, without what is None."""

    norm: Norm | None
    operation: Operation
    post_norm: Norm | None = None

    def __post_init__(self) -> None:
        assert self.norm or not self.operation.residual_norms, "what reads is normed once or everywhere"


@dataclass(frozen=True)
class SubLayer:
    """`scale * (x + post_norm(sum of the branches of x))`, without what is None.

    Most have one branch; several read the same x and are added together. With hyper-connections their streams are mixed
    by `mix` in place of the sum.
    """

    branches: tuple[Branch, ...]
    mix: ResidualMix | None = None
    post_norm: Norm | None = None
    scale: Weight | float | None = None

    @property
    def operations(self) -> tuple[Operation, ...]:
        return tuple(branch.operation for branch in self.branches)

    @property
    def norms(self) -> tuple[Norm, ...]:
        """All norms over the hidden size: of what is read of the residual, and of what is added to it."""
        of_branches = (norm for branch in self.branches for norm in (branch.norm, branch.post_norm))
        of_operations = (norm for operation in self.operations for norm in operation.residual_norms)
        return tuple(norm for norm in (*of_branches, *of_operations, self.post_norm) if norm)


def sequential(norm: Norm, operation: Operation, mix: ResidualMix | None = None) -> SubLayer:
    """A sublayer of one operation: `x + operation(norm(x))`."""
    return SubLayer((Branch(norm, operation),), mix)


@dataclass(frozen=True)
class Layer:
    index: int
    sublayers: tuple[SubLayer, ...]

    @property
    def operations(self) -> tuple[Operation, ...]:
        return tuple(operation for sublayer in self.sublayers for operation in sublayer.operations)


@dataclass(frozen=True)
class Prediction:
    """A block that drafts the token after next (multi-token prediction) for speculative decoding.

    Its input is `projection([embedding_norm(embedding of the next token), hidden_norm(hidden)])`, where hidden is what
    the model's head reads, or with `of_residual` all streams of the residual before they are brought together; of a
    draft's further tokens it is the block's own. Its output goes through norm and head, those of the model where it has
    none of its own. The model itself never runs it.
    """

    embedding_norm: Norm
    hidden_norm: Norm
    projection: Weight
    layer: Layer
    final_norm: Norm | None = None
    embedding: Weight | None = None
    head: Weight | None = None
    of_residual: bool = False


@dataclass(frozen=True)
class BlockDraft:
    """What drafts several tokens at once beside a model, with the layers of its own graph (DSpark).

    Of every token that the model has read, `norm(projection . [means of the model's streams after each of `sources`])`
    is what the attention of all layers makes keys of. Through the layers runs a block: the last token, which the model
    has not read yet, and `mask` for each that is to follow, up to `size` in all; they see one another and the keys. The
    first of them tells the first drafted token. Of every place, logits are those of the model's head, with
    `after . before[token]` of the token before the drafted one added; `confidence . [state, before[token]]` with the
    state before the last norm is the logit of its acceptance.
    """

    sources: tuple[int, ...]
    mask: int
    size: int
    projection: Weight
    norm: Norm
    before: Weight
    after: Weight
    confidence: Weight


@dataclass(frozen=True)
class Graph:
    """A whole model. Widths are in elements, `context_length` in tokens.

    `scaled_roles` are the roles whose weights llama.cpp multiplies by a tensor `<name>.scale` of the same file.
    `residual` is None for one stream that sublayers add to. `draft` is a graph without layers, whose predictions need
    a final norm and a stream mix of their own, or one of layers through which `block` says what runs, whose embedding
    and head are this graph's; it is no part of this graph's weights and makes a file of its own.
    `notes` say what of the checkpoint the graph leaves out. The embedding may be the head too, as one weight of the
    head's role. Its rows are multiplied by `embedding_scale`; logits are `logit_scale * (head . state)`, or with a soft
    cap c of them `c * tanh(logits / c)`. `per_layer` is what layers with a `PerLayerInput` read of a token.
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
    embedding_scale: float = 1.0
    logit_scale: float = 1.0
    logit_softcap: float | None = None
    per_layer: PerLayerEmbedding | None = None
    block: BlockDraft | None = None

    @property
    def tied(self) -> bool:
        """Whether embedding and head are one weight."""
        return self.head.name == self.embedding.name

    @property
    def experts(self) -> int:
        """How many the largest of its mixtures has, 0 in a dense model."""
        return max((weight.experts or 0 for weight in self.weights()), default=0)

    @property
    def residual_size(self) -> int:
        """Values of a token between two layers: those of all residual streams."""
        return self.hidden_size * (self.residual.multiplicity if self.residual else 1)

    @property
    def drafting(self) -> Graph | None:
        """What drafts as a model of its own, with all that it shares: a block for multi-token prediction is a layer."""
        holder = self.draft or self
        if holder.block:
            return holder
        if not holder.predictions:
            return None
        (block,) = holder.predictions
        return replace(
            holder,
            layers=(block.layer,),
            embedding=block.embedding or holder.embedding,
            final_norm=block.final_norm or holder.final_norm,
            head=block.head or holder.head,
        )

    def attending_to_all(self) -> Graph:
        """The same graph without any choice of what a token attends to: what full attention would have said."""
        return with_operations(self, lambda operation: operation.attending_to_all())

    def weights(self) -> Iterator[Weight]:
        """Every weight once, in file order, which is the order in which a pass reads them; but for another graph's."""
        others = {self.embedding.name, self.head.name} if self.block else {}
        own = weights_in((self.embedding, self.per_layer, replace(self, draft=None)))
        return (weight for weight in own if weight.name not in others)

    def parameters(self) -> int:
        """Number of weights' elements, with a head that repeats the embedding."""
        return sum(weight.elements for weight in self.weights() if weight.role is not Role.HASH_TABLE)

    def active_parameters(self) -> int:
        """Elements that one token touches: `top_k` experts of each stack, one row of the embedding, no drafting."""
        shares = self.active_shares()
        stored = (weight for weight in self.weights() if weight.role is not Role.HASH_TABLE)
        return sum(round(weight.elements * shares.get(weight.name, 1.0)) for weight in stored)

    def active_shares(self) -> dict[str, float]:
        """By weight name, the part of it that one token touches: `top_k` of all experts, one row of a table.

        Names that are missing are touched as a whole; the blocks for drafting are not counted.
        """
        tables = [] if self.tied else [self.embedding]
        tables += [self.per_layer.table] if self.per_layer else []
        shares = {table.name: 1 / table.shape[0] for table in tables}
        for operation in self.operations():
            shares |= {w.name: share for w in weights_in(operation) if (share := operation.active_share(w)) != 1.0}
        return shares | {weight.name: 0.0 for weight in weights_in(self.predictions)}

    def state_bytes_per_token(self) -> int:
        """Bytes that each further token adds to the KV cache."""
        return sum(operation.state_bytes_per_token for operation in self.operations())

    def fixed_state_bytes(self) -> int:
        """Bytes of state that do not grow with the context: recurrent states, windows of keys."""
        return sum(operation.fixed_state_bytes for operation in self.operations())

    @property
    def needs_flash_attention(self) -> bool:
        """Whether an operation does, see there."""
        return any(operation.needs_flash_attention for operation in self.operations())

    def operations(self) -> Iterator[Operation]:
        return (operation for layer in self.layers for operation in layer.operations)

    def shared_states(self) -> dict[int, int]:
        """By the number of each layer whose state others share, the number of the last of these."""
        readers = ((op.shares_state_of, layer.index) for layer in self.layers for op in layer.operations)
        return {source: reader for source, reader in readers if source is not None}
