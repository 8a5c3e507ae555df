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

from ...archs.expressions import Padded
from ...archs.graph import MLP, Attention, CompressedAttention, Graph, Layer, Mamba2, MoE, Norm, Operation, Prediction
from ...archs.weights import Weight


def pad(graph: Graph, multiple: int) -> Graph:
    """The same model with all widths that may grow rounded up to a multiple.

    Hidden size, latent size and the inner widths of experts and dense layers may; sizes of attention and Mamba-2
    may not. A graph with drafting blocks keeps its hidden size, because their LayerNorm subtracts the mean, and one
    with hyper-connections all its widths.
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
        head=padding.reader(graph.head),
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

    def reader(self, weight: Weight, rows: int | None = None) -> Weight:
        return _resized(weight, rows, self.hidden)

    def writer(self, weight: Weight, columns: int | None = None) -> Weight:
        return _resized(weight, self.hidden, columns, self.factor)

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
        assert not isinstance(operation, CompressedAttention)  # comes with hyper-connections
        match operation:
            case Attention():
                return replace(
                    operation,
                    query=self.reader(operation.query),
                    key=self.reader(operation.key),
                    value=self.reader(operation.value),
                    output=self.writer(operation.output),
                )
            case Mamba2():
                return replace(operation, input=self.reader(operation.input), output=self.writer(operation.output))
            case MLP():
                return self.mlp(operation)
            case MoE():
                return self.moe(operation)

    def mlp(self, operation: MLP) -> MLP:
        width = _rounded(operation.up.shape[0], self.multiple)
        return replace(
            operation,
            up=self.reader(operation.up, width),
            down=self.writer(operation.down, width),
            gate=self.reader(operation.gate, width) if operation.gate else None,
        )

    def moe(self, operation: MoE) -> MoE:
        width = _rounded(operation.expert_size, self.multiple)
        outside, factor = self.hidden, self.factor
        latent_down, latent_up = operation.latent_down, operation.latent_up
        if latent_down and latent_up:
            outside, factor = _rounded(latent_down.shape[0], self.multiple), 1.0
            latent_down, latent_up = self.reader(latent_down, outside), self.writer(latent_up, outside)
        return replace(
            operation,
            router=replace(operation.router, weight=self.reader(operation.router.weight)),
            gate=_resized(operation.gate, width, outside) if operation.gate else None,
            up=_resized(operation.up, width, outside),
            down=_resized(operation.down, outside, width, factor),
            latent_down=latent_down,
            latent_up=latent_up,
            shared=self.mlp(operation.shared) if operation.shared else None,
        )
