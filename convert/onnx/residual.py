"""How sublayers read the residual and write to it, in ONNX: by a sum, or by hyper-connections."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import onnx_ir as ir

from ...archs.graph import Graph, HyperConnections, ResidualMix, SubLayer
from .builder import Builder

Join = Callable[[ir.Value], ir.Value]
"""A sublayer's output [batch, sequence, hidden size] -> the next residual."""


class Residual(Protocol):
    """What flows from sublayer to sublayer."""

    def begin(self, embedded: ir.Value) -> ir.Value:
        """The residual that holds embedded tokens [batch, sequence, hidden size]."""

    def branch(self, sublayer: SubLayer, residual: ir.Value) -> tuple[ir.Value, Join]:
        """What a sublayer reads, [batch, sequence, hidden size], and how it writes."""

    def end(self, residual: ir.Value) -> ir.Value:
        """The hidden states [batch, sequence, hidden size] that a residual amounts to."""


def residual_of(graph: Graph, build: Builder) -> Residual:
    return HyperResidual(graph.residual, build) if graph.residual else Sum(build)


class Sum:
    """One stream, to which every sublayer adds its output."""

    def __init__(self, build: Builder) -> None:
        self._build = build

    def begin(self, embedded: ir.Value) -> ir.Value:
        return embedded

    def branch(self, sublayer: SubLayer, residual: ir.Value) -> tuple[ir.Value, Join]:
        return residual, lambda output: self._build.op("Add", residual, output)

    def end(self, residual: ir.Value) -> ir.Value:
        return residual


class HyperResidual:
    """Streams [batch, sequence, streams, hidden size], mixed anew for every token.

    Matrix products of a few streams do it: ONNX Runtime's operators for hyper-connections are a hundred times slower.
    """

    def __init__(self, kind: HyperConnections, build: Builder) -> None:
        self._kind = kind
        self._build = build

    def begin(self, embedded: ir.Value) -> ir.Value:
        return self._build.op("Concat", *[self._stream(embedded)] * self._kind.multiplicity, axis=2)

    def branch(self, sublayer: SubLayer, residual: ir.Value) -> tuple[ir.Value, Join]:
        assert sublayer.mix
        build, count = self._build, self._kind.multiplicity
        kinds = [count, count, count * count]
        read, write, mixing = build.split(self._coefficients(sublayer.mix, residual, kinds), kinds)
        write = build.op("Mul", build.op("Sigmoid", write), build.constant(2.0))
        mixing = self._doubly_stochastic(build.reshape(mixing, [0, 0, count, count]))

        def join(output: ir.Value) -> ir.Value:
            mixed = build.microsoft("FusedMatMul", mixing, residual, transA=1)
            written = build.op("Mul", build.op("Unsqueeze", write, build.constant([-1])), self._stream(output))
            return build.op("Add", mixed, written)

        return self._collapsed(read, residual), join

    def end(self, residual: ir.Value) -> ir.Value:
        return self._collapsed(self._coefficients(self._kind.head, residual, [self._kind.multiplicity]), residual)

    def _stream(self, states: ir.Value) -> ir.Value:
        """[batch, sequence, ...] -> [batch, sequence, 1, ...]"""
        return self._build.op("Unsqueeze", states, self._build.constant([2]))

    def _coefficients(self, mix: ResidualMix, residual: ir.Value, kinds: list[int]) -> ir.Value:
        """A residual -> [batch, sequence, coefficients]"""
        build = self._build
        width = mix.function.columns
        normed = build.normalize(build.reshape(residual, [0, 0, width]), width, self._kind.norm_epsilon)
        kind_of_each = [kind for kind, count in enumerate(kinds) for _ in range(count)]
        scale = build.op("Gather", build.weight(mix.scale), build.constant(kind_of_each))
        return build.op("Add", build.op("Mul", build.project(normed, mix.function), scale), build.weight(mix.base))

    def _collapsed(self, read: ir.Value, residual: ir.Value) -> ir.Value:
        build = self._build
        shares = build.op("Add", build.op("Sigmoid", read), build.constant(self._kind.epsilon))
        return build.op("Squeeze", build.op("MatMul", self._stream(shares), residual), build.constant([2]))

    def _doubly_stochastic(self, logits: ir.Value) -> ir.Value:
        """Softmax over the last axis, then rows and columns in turn brought to a sum of one, columns last.

        The epsilon beside the sums is left out until the end: it scales rows and columns that sum to one alike, by
        1 / (1 + epsilon), and every normalization undoes the one before.
        """
        build, epsilon = self._build, self._kind.epsilon
        matrix = build.op("Add", build.op("Softmax", logits, axis=-1), build.constant(epsilon))
        for axis in (-2, *(self._kind.iterations - 1) * (-1, -2)):
            matrix = build.op("LpNormalization", matrix, axis=axis, p=1)
        return build.op("Mul", matrix, build.constant(1 / (1 + epsilon)))
