"""What a pass finds out about layers and weights on its way; saved with its states, it outlives an interruption."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field

from torch import Tensor

from ..runner.passes import packed, unpacked

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

    def tensor(self) -> Tensor:
        """All of it, for `take_over`."""
        return packed(asdict(self))

    def take_over(self, tensor: Tensor) -> None:
        """Begin with what an earlier run has found."""
        values = unpacked(tensor)
        self.layer_errors = values["layer_errors"]
        self.expert_tokens = {int(layer): tokens for layer, tokens in values["expert_tokens"].items()}
        self.squares = {name: tuple(sums) for name, sums in values["squares"].items()}

    def add_exact(self, name: str) -> None:
        """Some of a weight is stored as it is."""
        self.squares.setdefault(name, (0.0, 0.0))

    def add_rounded(self, name: str, values: Tensor, stored: Tensor) -> None:
        """Count in rows of a weight, [rows, columns], and what is stored of them."""
        changed, size = self.squares.get(name, (0.0, 0.0))
        self.squares[name] = changed + float((stored - values).square().sum()), size + float(values.square().sum())

    @property
    def rounding_errors(self) -> dict[str, float]:
        """By weight, |stored - source| / |source|."""
        return {name: math.sqrt(sums[0] / sums[1]) if sums[1] else 0.0 for name, sums in self.squares.items()}


def some_rows(matrices: Tensor) -> Tensor:
    """Evenly spaced rows of matrices [matrices, rows, columns], as [rows, columns]."""
    return matrices[:, :: max(1, matrices.shape[1] // _ROWS)].flatten(0, 1)
