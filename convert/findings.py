"""What a pass finds out about layers and weights on its way; saved with its states, it outlives an interruption."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

EXACT = 0.0, 0.0
"""Sums of squares of what is stored as it is."""
_ROWS = 64  # of a matrix: enough to tell how far rounding went, at no cost that counts


@dataclass
class Findings:
    """What is known so far.

    Attributes:
        layer_errors: after each layer, how far the hidden states are from the source's; empty without a comparison.
        expert_tokens: by layer, how many calibration tokens each of its experts has seen; empty without calibration.
        squares: by weight, sums of squares of what rounding has changed, and of the numbers that were rounded.
    """

    layer_errors: list[float] = field(default_factory=list)
    expert_tokens: dict[int, list[int]] = field(default_factory=dict)
    squares: dict[str, tuple[float, float]] = field(default_factory=dict)

    def take_over(self, values: Mapping[str, Any]) -> None:
        """Begin with what an earlier run has found, by the names of attributes."""
        self.layer_errors = values["layer_errors"]
        self.expert_tokens = {int(layer): tokens for layer, tokens in values["expert_tokens"].items()}
        self.squares = {name: tuple(sums) for name, sums in values["squares"].items()}

    def add(self, name: str, squares: tuple[float, float]) -> None:
        """Count in what rounding has changed of some rows of a weight, and these, as sums of squares."""
        changed, size = self.squares.get(name, EXACT)
        self.squares[name] = changed + squares[0], size + squares[1]

    @property
    def rounding_errors(self) -> dict[str, float]:
        """By weight, |stored - source| / |source|."""
        return {name: math.sqrt(sums[0] / sums[1]) if sums[1] else 0.0 for name, sums in self.squares.items()}


def squares_of(values: Tensor, stored: Tensor) -> tuple[float, float]:
    """Sums of squares of what rounding has changed of rows [rows, columns], and of these."""
    return float((stored - values).square().sum()), float(values.square().sum())


def some_rows(matrices: Tensor) -> Tensor:
    """Evenly spaced rows of matrices [matrices, rows, columns], as [rows, columns]."""
    return matrices[:, :: max(1, matrices.shape[1] // _ROWS)].flatten(0, 1)
