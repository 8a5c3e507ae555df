"""Per-layer embeddings: what is worked out once for all layers, and how a layer takes in its part."""

from __future__ import annotations

from torch import Tensor

from ...archs.graph import PerLayerEmbedding, PerLayerInput
from ..weights import Weights, multiply
from .common import activate, normalizer
from .context import Context


def project_inputs(per_layer: PerLayerEmbedding, embedded: Tensor, weights: Weights) -> tuple[Tensor, ...]:
    """What embedded tokens [tokens, hidden size] give to the vector of each layer, [tokens, width] each."""
    projected = per_layer.projection_scale * multiply(embedded, weights.load(per_layer.projection))
    normed = normalizer(per_layer.norm, weights)(projected.unflatten(1, (-1, per_layer.width)))
    return (per_layer.scale * normed).unbind(1)


class PerLayerMixer:
    """The operation with its weights; it mixes no tokens, so there is nothing to remember."""

    def __init__(self, operation: PerLayerInput, weights: Weights) -> None:
        self._operation = operation
        self._weights = weights

    def initial_state(self) -> None:
        """The state before the first token."""

    def __call__(self, states: Tensor, memory: None, context: Context) -> tuple[Tensor, None]:
        """states [tokens, hidden size] -> output of the same shape, and what to remember after the last token."""
        operation = self._operation
        assert context.input is not None
        gate = self._weights.project(states, operation.gate)
        inner = activate(operation.activation, None, gate, context.input)
        return self._weights.project(inner, operation.output), None
