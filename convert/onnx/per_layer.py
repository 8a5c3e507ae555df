"""Per-layer embeddings in ONNX."""

from __future__ import annotations

import onnx_ir as ir

from ...archs.graph import PerLayerEmbedding, PerLayerInput
from .builder import Builder

_EMBEDDED = "per-layer embeddings"


def embed_for_layers(build: Builder, per_layer: PerLayerEmbedding, embedded: ir.Value) -> None:
    """Make vectors of all layers [batch, sequence, layers, width] of embedded tokens [batch, sequence, hidden size]."""
    apart = [0, 0, -1, per_layer.width]
    stored = build.scaled(build.rows(build.tokens(), per_layer.table), per_layer.table_scale)
    projected = build.scaled(build.project(embedded, per_layer.projection), per_layer.projection_scale)
    normed = build.norm(build.reshape(projected, apart), per_layer.norm)
    vectors = build.scaled(build.op("Add", build.reshape(stored, apart), normed), per_layer.scale)
    build.once(_EMBEDDED, lambda: vectors)


def per_layer_input(build: Builder, operation: PerLayerInput, states: ir.Value, layer: int) -> ir.Value:
    """states [batch, sequence, hidden size] -> what the layer adds of its embeddings, of the same shape."""
    gate = build.op("Gelu", build.project(states, operation.gate), approximate="tanh")
    own = build.op("Gather", build.made(_EMBEDDED), build.constant(layer), axis=2)
    return build.project(build.op("Mul", gate, own), operation.output)
