"""A Weights wrapper that collects statistics of the inputs it multiplies."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..archs.weights import Weight
from ..quant.rounding.statistics import Statistics
from .stream import Stream
from .weights import Weights


class ObservingWeights:
    """The weights of `inner`; the inputs of every product go into `statistics` first."""

    def __init__(self, inner: Weights, statistics: Statistics) -> None:
        self.graph = inner.graph
        self.label = inner.label
        self.device = inner.device
        self._inner = inner
        self._statistics = statistics

    def load(self, weight: Weight, expert: int | None = None, rows: tuple[int, int] | None = None) -> Tensor:
        return self._inner.load(weight, expert, rows)

    def announce(self, stacks: Sequence[Weight], states: Tensor) -> None:
        self._statistics.add_layer(stacks, states)

    def prepare(self, stacks: Sequence[Weight], experts: Sequence[int]) -> None:
        self._inner.prepare(stacks, experts)

    def project(self, states: Tensor, weight: Weight, expert: int | None = None) -> Tensor:
        self._statistics.add(weight, expert, states)
        return self._inner.project(states, weight, expert)

    def project_groups(self, states: Tensor, weight: Weight) -> Tensor:
        self._statistics.add(weight, None, states.flatten(0, 1))
        return self._inner.project_groups(states, weight)

    def release(self, expert: int | None = None) -> None:
        self._statistics.release(expert)
        self._inner.release(expert)


def observe_head(stream: Stream, statistics: Statistics) -> None:
    """Count in what the head reads of all tokens of a stream that has passed all layers.

    A head that is the embedding is written before that: to it all inputs are alike.
    """
    if stream.weights.graph.tied:
        return
    for chunk in range(len(stream.hidden)):
        statistics.add(stream.weights.graph.head, None, stream.final(chunk, slice(None)))
