"""Zero padding of a graph, so that every row divides into blocks without changing a single result.

Blocks of 256 values do not fit rows of 2688 or 1856; what llama.cpp stores instead takes 4.5 bits at least. Zeros do
no harm: silu(0) * 0 and max(0, 0)^2 are 0, so an expert's inner width may grow by rows of zeros in `up` and columns of
zeros in `down`. The hidden size may grow too: with a = sqrt(new / old), whatever writes into the residual stream
(embedding, output and down projections) is multiplied by a and gets rows of zeros, whatever reads from it gets columns
of zeros, and the weights of its RMSNorms are divided by a. The mean square that a norm sees is then the old one. Norms
of what is about to be written see that multiplied by a, and have to leave it so: their weights stay.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from itertools import combinations
from math import sqrt

from ...archs.expressions import Padded
from ...archs.graph import Branch, Graph, Layer, Norm, Operation, SubLayer, Width, with_weights
from ...archs.weights import Role, Weight

WidthKind = tuple[Role, ...]
"""What grows at once, because a file states it once: the widths that are the rows of weights with these roles."""
_HIDDEN: WidthKind = ()


def padded_forms(graph: Graph, multiple: int) -> Iterator[Graph]:
    """The graph as it is, then with each choice of the widths that are no multiple padded to one, all of them last."""
    kinds = _growing(graph, multiple)
    for count in range(len(kinds) + 1):
        for chosen in combinations(kinds, count):
            yield pad(graph, multiple, chosen) if chosen else graph


def changed_widths(graph: Graph, padded: Graph) -> str:
    """How long rows were and are, such as "1856 to 2048, 2688 to 2816"; empty where none is longer."""
    columns = {weight.name: weight.columns for weight in graph.weights()}
    widths = {(columns[weight.name], weight.columns) for weight in padded.weights()}
    return ", ".join(f"{old} to {new}" for old, new in sorted(widths) if old != new)


def pad(graph: Graph, multiple: int, kinds: Collection[WidthKind] | None = None) -> Graph:
    """The same model with widths that may grow rounded up to a multiple: all of them, or those of some kinds.

    The hidden size may, and the inner widths that operations say may. A graph with drafting blocks keeps its hidden
    size, as does any with a LayerNorm, which subtracts the mean, with per-layer embeddings, or with a head that is the
    embedding, which would be multiplied too; one with hyper-connections keeps all its widths.
    """
    kinds = _growing(graph, multiple) if kinds is None else kinds
    if not kinds:
        return graph
    hidden = _rounded(graph.hidden_size, multiple) if _HIDDEN in kinds else graph.hidden_size
    padding = _Padding(multiple, kinds, hidden, sqrt(hidden / graph.hidden_size))
    return replace(
        graph,
        hidden_size=hidden,
        embedding=_resized(graph.embedding, columns=hidden, factor=padding.factor),
        layers=tuple(padding.layer(layer) for layer in graph.layers),
        final_norm=padding.norm(graph.final_norm),
        head=_resized(graph.head, columns=hidden),
        predictions=tuple(replace(p, layer=padding.layer(p.layer)) for p in graph.predictions),
    )


def _growing(graph: Graph, multiple: int) -> list[WidthKind]:
    """The kinds of widths that may grow and are no multiple."""
    if graph.residual:
        return []
    kinds = [_HIDDEN] if _hidden_size_may_grow(graph) and graph.hidden_size % multiple else []
    layers = (*graph.layers, *(prediction.layer for prediction in graph.predictions))
    operations = (operation for layer in layers for operation in layer.operations)
    widths = (width for operation in operations for width in operation.widths if width.size % multiple)
    return [*dict.fromkeys([*kinds, *map(_kind, widths)])]


def _kind(width: Width) -> WidthKind:
    return tuple(weight.role for weight in width.rows)


def _hidden_size_may_grow(graph: Graph) -> bool:
    sublayers = [sublayer for layer in graph.layers for sublayer in layer.sublayers]
    norms = (graph.final_norm, *(norm for sublayer in sublayers for norm in sublayer.norms))
    return not (graph.predictions or graph.tied or graph.per_layer or any(norm.centered for norm in norms))


def _resized(weight: Weight, rows: int | None = None, columns: int | None = None, factor: float = 1.0) -> Weight:
    """`factor * weight` with zeros in further rows and columns; a vector, as any bias, has either."""
    if len(weight.shape) == 1 or weight.role is Role.BIAS:
        shape = (*weight.shape[:-1], rows or columns or weight.columns)
    else:
        shape = (*weight.shape[:-2], rows or weight.shape[-2], columns or weight.columns)
    if shape == weight.shape and factor == 1.0:
        return weight
    return replace(weight, shape=shape, source=Padded(weight.source, shape, factor))


def _rounded(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


@dataclass(frozen=True)
class _Padding:
    """`kinds` grow; `hidden` is the new hidden size, `factor` the growth of what the residual stream holds."""

    multiple: int
    kinds: Collection[WidthKind]
    hidden: int
    factor: float

    def norm(self, norm: Norm) -> Norm:
        return replace(norm, weight=_resized(norm.weight, columns=self.hidden, factor=1 / self.factor))

    def layer(self, layer: Layer) -> Layer:
        return replace(layer, sublayers=tuple(map(self.sublayer, layer.sublayers)))

    def sublayer(self, sublayer: SubLayer) -> SubLayer:
        post_norm = self.post_norm(sublayer.post_norm)
        return replace(sublayer, branches=tuple(map(self.branch, sublayer.branches)), post_norm=post_norm)

    def branch(self, branch: Branch) -> Branch:
        """An operation that reads the residual without a norm reads it multiplied by the factor."""
        norm = self.norm(branch.norm) if branch.norm else None
        operation = self.operation(branch.operation, 1.0 if norm else 1 / self.factor)
        return Branch(norm, operation, self.post_norm(branch.post_norm))

    def post_norm(self, norm: Norm | None) -> Norm | None:
        return replace(norm, weight=_resized(norm.weight, columns=self.hidden)) if norm else None

    def operation(self, operation: Operation, read_factor: float) -> Operation:
        """What its rows and columns grow to, and what a weight is multiplied by, follow from an operation's facts."""
        rows = {weight.name: self.hidden for weight in operation.writes}
        columns = {weight.name: self.hidden for weight in operation.reads}
        factors = {weight.name: read_factor for weight in operation.reads}
        factors |= {weight.name: self.factor for weight in operation.writes}
        for norm in operation.residual_norms:
            columns[norm.weight.name], factors[norm.weight.name] = self.hidden, 1 / self.factor
        for width in operation.widths:
            size = _rounded(width.size, self.multiple) if _kind(width) in self.kinds else width.size
            rows |= {weight.name: size for weight in width.rows}
            columns |= {weight.name: size for weight in width.columns}

        def resized(weight: Weight) -> Weight:
            name = weight.name
            return _resized(weight, rows.get(name), columns.get(name), factors.get(name, 1.0))

        return with_weights(operation, resized)
