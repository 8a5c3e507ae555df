"""The error that each type would cause in the outputs of each weight."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from ...archs.weights import Weight
from ...sources.model import pieces
from ..stream import Stream
from ..weights import CachedWeights, WeightProducts, multiply
from .rounded import Quantizer

_TOKENS = 32  # of each expert
_ROWS = 128  # of each matrix
_EXPERTS = 4  # of each stack, those with the most tokens
_VOCABULARY_ROWS = 4096  # of embedding and head
_HEAD_TOKENS = 512  # about so many


class ErrorWeights(WeightProducts):
    """A source's weights, which measure on the inputs of `project` what rounding would do to its outputs.

    The relative squared error of a type is that of the products of some rows, some tokens and the busiest experts, so
    an expert counts by what it contributes.

    Attributes:
        squares: sums of squares by weight name and type, under the name "" those of the outputs themselves.
    """

    def __init__(self, source: CachedWeights, quantizer: Quantizer, types: Mapping[str, set[str]]) -> None:
        super().__init__(source.graph, source.label, source.compute_dtype, source.device)
        self._source = source
        self._quantizer = quantizer
        self._types = types
        self.squares: dict[str, dict[str, float]] = {}
        self._seen: dict[str, set[int | None]] = {}

    def load(self, weight: Weight, expert: int | None = None, rows: tuple[int, int] | None = None) -> Tensor:
        return self._source.load(weight, expert, rows)

    def project(self, states: Tensor, weight: Weight, expert: int | None = None) -> Tensor:
        self._note(states, weight, expert)
        return super().project(states, weight, expert)

    def project_groups(self, states: Tensor, weight: Weight) -> Tensor:
        self._note(states.flatten(0, 1), weight, None)
        return super().project_groups(states, weight)

    def release(self, expert: int | None = None) -> None:
        self._source.release(expert)

    def relative(self) -> dict[str, dict[str, float]]:
        """By weight name and type, the squared error of the outputs over their square."""
        return {
            name: {type: error / squares[""] for type, error in squares.items() if type}
            for name, squares in self.squares.items()
            if squares[""]
        }

    def note_embedding(self, tokens: Tensor) -> None:
        """Errors of rows of the embedding themselves, each weighed by how often its token occurs."""
        weight = self.graph.embedding
        counts = torch.bincount(tokens.flatten(), minlength=weight.shape[0])
        step = max(1, weight.shape[0] // _VOCABULARY_ROWS)
        for _, rows in pieces(weight):
            part = counts[slice(*rows)] if rows else counts
            used = torch.where(part > 0)[0][::step]
            if len(used):
                values = self.load(weight, None, rows)[used]
                self._add(weight, None, values, partial(torch.mul, part[used].sqrt()[:, None]))
            self.release()

    def note_head(self, stream: Stream) -> None:
        """Errors of logits of some tokens of a stream that has passed all layers."""
        weight, count = self.graph.head, stream.tokens.shape[1]
        positions = slice(None, None, max(1, count * len(stream.hidden) // _HEAD_TOKENS))
        states = stream.final_states(positions)
        step = max(1, weight.shape[0] // _VOCABULARY_ROWS)
        for _, rows in pieces(weight):
            self._add(weight, None, self.load(weight, None, rows)[::step], lambda values: multiply(states, values))
            self.release()

    def _note(self, states: Tensor, weight: Weight, expert: int | None) -> None:
        seen = self._seen.setdefault(weight.name, set())
        if weight.name not in self._types or expert in seen or len(seen) >= _EXPERTS:
            return
        seen.add(expert)
        some = _some(states, _TOKENS) * (len(states) / min(len(states), _TOKENS)) ** 0.5
        matrix = _some(self.load(weight, expert), _ROWS)
        self._add(weight, expert, matrix, lambda rows: multiply(some, rows))

    def _add(self, weight: Weight, expert: int | None, matrix: Tensor, output: Callable[[Tensor], Tensor]) -> None:
        squares = self.squares.setdefault(weight.name, {"": 0.0})
        squares[""] += float(output(matrix).square().sum())
        for type in self._types[weight.name]:
            (rounded,) = self._quantizer.round(matrix[None], weight, type, [expert])
            squares[type] = squares.get(type, 0.0) + float(output(rounded - matrix).square().sum())


def _some(rows: Tensor, count: int) -> Tensor:
    """At most so many rows, evenly spread."""
    return rows[:: max(1, -(-len(rows) // count))]
