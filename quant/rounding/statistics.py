"""Statistics of weights' inputs: the mean square of each column, which quantizers weigh columns by."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Final, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from ...archs.weights import Role, Weight

if TYPE_CHECKING:
    from .moments import SecondMoments

PRIOR: Final = 16  # tokens that the average over all experts counts for beside an expert's own


class Importance(Protocol):
    """What quantizers weigh columns by."""

    def of(self, weight: Weight, expert: int | None) -> Tensor | None:
        """The mean square of each input of one matrix, [columns]; None where nothing is known."""

    def moments(self, weight: Weight, expert: int | None) -> SecondMoments | None:
        """How the inputs of one matrix go together; None where that is not known."""


class Statistics:
    """Sums of squares of the inputs of weights, and how many inputs there were.

    `sums` are float64 [matrices, columns] by weight name, `counts` int64 [matrices].
    """

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, Tensor] = {}
        self._pooled: dict[str, Tensor] = {}
        self._expert_stacks: list[str] = []

    @classmethod
    def of_tensors(cls, tensors: Iterator[Tensor]) -> Statistics:
        """What `tensors` gave."""
        statistics = cls()
        names, statistics._expert_stacks = (bytes(next(tensors).tolist()).decode().split("\n") for _ in range(2))
        for name in names:
            statistics.sums[name], statistics.counts[name] = next(tensors), next(tensors)
            statistics._pooled[name] = statistics.sums[name].sum(dim=0)
        return statistics

    def tensors(self) -> Iterator[Tensor]:
        """Everything as tensors, the names (UTF-8) of all weights and of stacks of experts first."""
        for names in (self.sums, self._expert_stacks):
            yield torch.tensor(list("\n".join(names).encode()), dtype=torch.uint8)
        for name, sums in self.sums.items():
            yield sums
            yield self.counts[name]

    def add(self, weight: Weight, expert: int | None, states: Tensor) -> None:
        """Count in what a matrix is multiplied with, [inputs, columns]."""
        name, columns = weight.name, states.shape[1]
        if name not in self.sums:
            self.sums[name] = torch.zeros(weight.matrices, columns, dtype=torch.float64)
            self.counts[name] = torch.zeros(weight.matrices, dtype=torch.int64)
            self._pooled[name] = torch.zeros(columns, dtype=torch.float64)
            if weight.experts is not None:
                self._expert_stacks.append(name)
        squares = states.square().sum(dim=0).double()
        self.sums[name][expert or 0] += squares
        self.counts[name][expert or 0] += len(states)
        self._pooled[name] += squares

    def of(self, weight: Weight, expert: int | None) -> Tensor | None:
        """The mean square of each input of one matrix, float64 [columns]; None where nothing has passed.

        An expert's own mean is drawn towards that of all experts so far, the more so the less it has seen:
        (n * own + k * pooled) / (n + k). Inner neurons of two experts have nothing in common but their size, so the
        pooled mean of down projections is one for all columns. Columns that pad a weight have no inputs: 0.
        """
        if weight.name not in self.sums:
            return None
        counts = self.counts[weight.name]
        own, count = self.sums[weight.name][expert or 0], counts[expert or 0]
        if weight.experts is None:
            mean = own / count
        else:
            pooled = self.pooled(weight)
            if weight.role is Role.EXPERT_DOWN:
                pooled = pooled.mean().expand_as(pooled)
            mean = (own + PRIOR * pooled) / (count + PRIOR)
        return functional.pad(mean, (0, weight.columns - len(mean)))

    def pooled(self, weight: Weight) -> Tensor:
        """The mean square of each input of all experts, float64 [columns]."""
        return self._pooled[weight.name] / self.counts[weight.name].sum()

    def moments(self, weight: Weight, expert: int | None) -> SecondMoments | None:
        return None

    def release(self, expert: int | None = None) -> None:
        """Nobody will ask again for what was made of one expert's inputs, or of all."""

    @property
    def expert_tokens(self) -> Tensor | None:
        """How many tokens each expert has seen, int64 [experts]; None where there are no experts."""
        return next((self.counts[name] for name in self._expert_stacks if name in self.counts), None)

    def clear(self) -> None:
        self.sums.clear()
        self.counts.clear()
        self._pooled.clear()
        self._expert_stacks.clear()
