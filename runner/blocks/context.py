"""What an operation may know of a chunk of text beside its hidden states."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class Context:
    """A chunk on its way through a layer.

    Attributes:
        tokens: ids of the chunk's tokens, int64 [tokens].
        positions: where they stand in their text, int64 [tokens].
        layer: number of the layer.
        shares: whether later layers read what this one remembers; then it puts that into `shared`.
        input: the tokens' embeddings for this layer, [tokens, width], see `graph.PerLayerEmbedding`.
        shared: by number of the layer, what others may read of all tokens so far, float32 [tokens so far, width].
        causal: whether a token sees of its chunk only those before it.
    """

    tokens: Tensor
    positions: Tensor
    layer: int = 0
    shares: bool = False
    input: Tensor | None = None
    shared: dict[int, Tensor] = field(default_factory=dict)
    causal: bool = True
