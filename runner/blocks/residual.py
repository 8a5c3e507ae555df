"""How sublayers read the residual and write to it: by a sum, or by hyper-connections."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from ...archs.graph import HyperConnections, ResidualMix, SubLayer
from ..weights import Weights


class Residual(Protocol):
    """What flows from sublayer to sublayer, [tokens, *width] of one chunk."""

    width: tuple[int, ...]

    def begin(self, embedded: Tensor) -> Tensor:
        """The residual that holds embedded tokens [tokens, hidden size]."""

    def branch(self, sublayer: SubLayer, residual: Tensor) -> Branch:
        """Opens a sublayer's way out of the residual and back."""

    def end(self, residual: Tensor) -> Tensor:
        """The hidden states [..., hidden size] that a residual amounts to."""


class Branch(Protocol):
    """One sublayer's way out of the residual and back; `input` is [tokens, hidden size]."""

    input: Tensor

    def join(self, output: Tensor) -> Tensor:
        """The residual with the sublayer's output [tokens, hidden size] in it."""


def residual_of(weights: Weights) -> Residual:
    kind, size = weights.graph.residual, weights.graph.hidden_size
    return HyperResidual(kind, size, weights) if kind else Sum(size)


class Sum:
    """One stream, to which every sublayer adds its output."""

    def __init__(self, size: int) -> None:
        self.width: tuple[int, ...] = (size,)

    def begin(self, embedded: Tensor) -> Tensor:
        return embedded

    def branch(self, sublayer: SubLayer, residual: Tensor) -> Branch:
        return _SumBranch(residual)

    def end(self, residual: Tensor) -> Tensor:
        return residual


class _SumBranch:
    def __init__(self, residual: Tensor) -> None:
        self.input = residual

    def join(self, output: Tensor) -> Tensor:
        return self.input + output


class HyperResidual:
    """Streams [tokens, streams, hidden size], mixed anew for every token (see `graph.HyperConnections`)."""

    def __init__(self, kind: HyperConnections, size: int, weights: Weights) -> None:
        self.width: tuple[int, ...] = (kind.multiplicity, size)
        self.kind = kind
        self.weights = weights

    def begin(self, embedded: Tensor) -> Tensor:
        return embedded.unsqueeze(-2).repeat_interleave(self.kind.multiplicity, dim=-2)

    def branch(self, sublayer: SubLayer, residual: Tensor) -> Branch:
        assert sublayer.mix
        count = self.kind.multiplicity
        coefficients = self._coefficients(sublayer.mix, residual, (count, count, count * count))
        read, write, mixing = coefficients.split((count, count, count * count), dim=-1)
        mixing = self._doubly_stochastic(mixing.unflatten(-1, (count, count)))
        return _HyperBranch(residual, self._collapsed(read, residual), 2 * write.sigmoid(), mixing)

    def end(self, residual: Tensor) -> Tensor:
        return self._collapsed(self._coefficients(self.kind.head, residual, (self.kind.multiplicity,)), residual)

    def _coefficients(self, mix: ResidualMix, residual: Tensor, kinds: tuple[int, ...]) -> Tensor:
        """[..., streams, hidden size] -> [..., coefficients]; the norm has no weight, so it can follow the product."""
        function, base, scale = (self.weights.load(weight) for weight in (mix.function, mix.base, mix.scale))
        flat = residual.flatten(-2)
        mean_square = torch.linalg.vector_norm(flat, dim=-1, keepdim=True).square() / flat.shape[-1]
        normed = functional.linear(flat, function) * torch.rsqrt(mean_square + self.kind.norm_epsilon)
        scales = torch.cat([one.expand(count) for one, count in zip(scale, kinds, strict=True)])
        return normed * scales + base

    def _collapsed(self, read: Tensor, residual: Tensor) -> Tensor:
        return ((read.sigmoid() + self.kind.epsilon).unsqueeze(-2) @ residual).squeeze(-2)

    def _doubly_stochastic(self, logits: Tensor) -> Tensor:
        """Softmax over the last axis, then rows and columns in turn brought to a sum of one, columns last."""
        epsilon = self.kind.epsilon
        matrix = logits.softmax(dim=-1) + epsilon
        matrix = matrix / (matrix.sum(dim=-2, keepdim=True) + epsilon)
        for _ in range(self.kind.iterations - 1):
            matrix = matrix / (matrix.sum(dim=-1, keepdim=True) + epsilon)
            matrix = matrix / (matrix.sum(dim=-2, keepdim=True) + epsilon)
        return matrix


class _HyperBranch:
    def __init__(self, residual: Tensor, input: Tensor, write: Tensor, mixing: Tensor) -> None:
        self.input = input
        self._residual = residual
        self._write = write
        self._mixing = mixing

    def join(self, output: Tensor) -> Tensor:
        mixed = self._mixing.transpose(-1, -2) @ self._residual
        return mixed + self._write.unsqueeze(-1) * output.unsqueeze(-2)
