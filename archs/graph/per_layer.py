"""Per-layer embeddings: what each layer reads of a token beside the residual."""

from __future__ import annotations

from dataclasses import dataclass

from ..weights import Weight
from .operation import Operation
from .parts import Activation, Norm


@dataclass(frozen=True)
class PerLayerEmbedding:
    """A vector of each token for each layer: `scale * (table_scale * table[token] + norm(projection_scale * P e))`.

    e is the token's embedding, P the `projection` [layers * width, hidden size]. A row of `table` [vocabulary,
    layers * width], as a product with P, holds the vectors of all layers, each of which is normed by itself.
    """

    table: Weight
    projection: Weight
    norm: Norm
    table_scale: float
    projection_scale: float
    scale: float

    @property
    def width(self) -> int:
        """Of one layer's vector."""
        return self.norm.weight.columns


@dataclass(frozen=True)
class PerLayerInput(Operation):
    """`output(activation(gate x, v))`, where v is the token's vector for this layer, see `PerLayerEmbedding`."""

    gate: Weight
    output: Weight
    activation: Activation

    @property
    def reads(self) -> tuple[Weight, ...]:
        return (self.gate,)

    @property
    def writes(self) -> tuple[Weight, ...]:
        return (self.output,)

    def scratch_values(self, context: int) -> int:
        width, hidden = self.gate.shape
        return context * (hidden + 3 * width)
