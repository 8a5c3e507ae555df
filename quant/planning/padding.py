"""Zero padding of a graph, so that every row divides into blocks without changing a single result.

Blocks of 256 values do not fit rows of 2688 or 1856; what llama.cpp stores instead takes 4.5 bits at least. Zeros do
no harm: silu(0) * 0 and max(0, 0)^2 are 0, so an expert's inner width may grow by rows of zeros in `up` and columns of
zeros in `down`. The hidden size may grow too: with a = sqrt(new / old), whatever writes into the residual stream
(embedding, output and down projections) is multiplied by a and gets rows of zeros, whatever reads from it gets columns
of zeros, and the weights of its RMSNorms are divided by a. The mean square that a norm sees is then the old one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import sqrt

from ...archs.graph import Graph, Layer, Norm, Operation, Prediction, with_weights
from ...archs.weights import Padded, Weight


def pad(graph: Graph, multiple: int) -> Graph:
    """The same model with all widths that may grow rounded up to a multiple.

    The hidden size may, and the inner widths that operations say may. A graph with drafting blocks keeps its hidden
    size, because their LayerNorm subtracts the mean, and one with hyper-connections all its widths.
    """
    if graph.residual:
        return graph
    hidden = graph.hidden_size if graph.predictions else _rounded(graph.hidden_size, multiple)
    padding = _Padding(multiple, hidden, sqrt(hidden / graph.hidden_size))
    return replace(
        graph,
        hidden_size=hidden,
        embedding=_resized(graph.embedding, columns=hidden, factor=padding.factor),
        layers=tuple(padding.layer(layer) for layer in graph.layers),
        final_norm=padding.norm(graph.final_norm),
        head=_resized(graph.head, columns=hidden),
        predictions=tuple(padding.prediction(prediction) for prediction in graph.predictions),
    )


def _resized(weight: Weight, rows: int | None = None, columns: int | None = None, factor: float = 1.0) -> Weight:
    """`factor * weight` with zeros in further rows and columns; a vector has columns only."""
    if len(weight.shape) == 1:
        shape: tuple[int, ...] = (columns or weight.columns,)
    else:
        shape = (*weight.shape[:-2], rows or weight.shape[-2], columns or weight.columns)
    if shape == weight.shape and factor == 1.0:
        return weight
    return replace(weight, shape=shape, source=Padded(weight.source, shape, factor))


def _rounded(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


@dataclass(frozen=True)
class _Padding:
    """`hidden` is the new hidden size, `factor` the growth of what the residual stream holds."""

    multiple: int
    hidden: int
    factor: float

    def norm(self, norm: Norm) -> Norm:
        return replace(norm, weight=_resized(norm.weight, columns=self.hidden, factor=1 / self.factor))

    def layer(self, layer: Layer) -> Layer:
        sublayers = (
            replace(sublayer, norm=self.norm(sublayer.norm), operation=self.operation(sublayer.operation))
            for sublayer in layer.sublayers
        )
        return replace(layer, sublayers=tuple(sublayers))

    def prediction(self, prediction: Prediction) -> Prediction:
        return replace(prediction, layer=self.layer(prediction.layer))

    def operation(self, operation: Operation) -> Operation:
        """By weight name, what its rows and columns grow to and what it is multiplied by follow from its facts."""
        rows = {weight.name: self.hidden for weight in operation.writes}
        columns = {weight.name: self.hidden for weight in operation.reads}
        factors = {weight.name: self.factor for weight in operation.writes}
        for width in operation.widths:
            size = _rounded(width.size, self.multiple)
            rows |= {weight.name: size for weight in width.rows}
            columns |= {weight.name: size for weight in width.columns}

        def resized(weight: Weight) -> Weight:
            name = weight.name
            return _resized(weight, rows.get(name), columns.get(name), factors.get(name, 1.0))

        return with_weights(operation, resized)
