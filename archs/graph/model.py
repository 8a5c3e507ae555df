"""Layers, the residual that they share, and the whole model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from ..weights import Role, Weight
from .operation import Operation
from .parts import Norm
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

    Its input is `projection([embedding_norm(embedding of the next token), hidden_norm(hidden)])`; its output goes
    through a norm of its own, or through the model's final norm, and the model's head. The model itself never runs it.
    """

    embedding_norm: Norm
    hidden_norm: Norm
    projection: Weight
    layer: Layer
    final_norm: Norm | None = None


@dataclass(frozen=True)
class Graph:
    """A whole model. Widths are in elements, `context_length` in tokens.

    `scaled_roles` are the roles whose weights llama.cpp multiplies by a tensor `<name>.scale` of the same file.
    `residual` is None for one stream that sublayers add to. `draft` is a graph without layers, whose predictions need
    a final norm and a stream mix of their own; it is no part of this graph's weights and makes a file of its own.
    `notes` say what of the checkpoint the graph leaves out. The embedding may be the head too, as one weight of the
    head's role. Its rows are multiplied by `embedding_scale`; logits are `logit_scale * (head . state)`, or with a soft
    cap c of them `c * tanh(logits / c)`.
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

    def attending_to_all(self) -> Graph:
        """The same graph without any choice of what a token attends to: what full attention would have said."""
        return with_operations(self, lambda operation: operation.attending_to_all())

    def weights(self) -> Iterator[Weight]:
        """Every weight once, in file order."""
        return weights_in(replace(self, draft=None))

    def parameters(self) -> int:
        """Number of weights' elements, with a head that repeats the embedding."""
        return sum(weight.elements for weight in self.weights() if weight.role is not Role.HASH_TABLE)

    def active_parameters(self) -> int:
        """Elements that one token touches: `top_k` experts of each stack, one row of the embedding, no drafting."""
        shares = self.active_shares()
        stored = (weight for weight in self.weights() if weight.role is not Role.HASH_TABLE)
        return sum(round(weight.elements * shares.get(weight.name, 1.0)) for weight in stored)

    def active_shares(self) -> dict[str, float]:
        """By weight name, the part of it that one token touches: `top_k` of all experts, one row of the embedding.

        Names that are missing are touched as a whole; the blocks for drafting are not counted.
        """
        shares = {} if self.tied else {self.embedding.name: 1 / self.embedding.shape[0]}
        for operation in self.operations():
            shares |= {w.name: share for w in weights_in(operation) if (share := operation.active_share(w)) != 1.0}
        return shares | {weight.name: 0.0 for weight in weights_in(self.predictions)}

    def state_bytes_per_token(self) -> int:
        """Bytes that each further token adds to the KV cache."""
        return sum(operation.state_bytes_per_token for operation in self.operations())

    def fixed_state_bytes(self) -> int:
        """Bytes of state that do not grow with the context: recurrent states, windows of keys."""
        return sum(operation.fixed_state_bytes for operation in self.operations())

    def operations(self) -> Iterator[Operation]:
        return (operation for layer in self.layers for operation in layer.operations)

    def shared_states(self) -> dict[int, int]:
        """By the number of each layer whose state others share, the number of the last of these."""
        readers = ((op.shares_state_of, layer.index) for layer in self.layers for op in layer.operations)
        return {source: reader for source, reader in readers if source is not None}
