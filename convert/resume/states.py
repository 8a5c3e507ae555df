"""Saves the states of a pass in the journal after each layer, so that only the layer in flight runs twice."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import takewhile

from torch import Tensor

from ...archs.graph import Layer
from ...quant.rounding.statistics import Statistics
from .journal import Journal


def _always(layer: int) -> bool:
    return True


class SavedStates:
    """The `LayerStates` of a pass, which goes by a name of its own in the journal.

    A layer is only passed where all else that was made of it and of those before is there: `intact` says so.
    """

    def __init__(
        self,
        journal: Journal,
        layers: Sequence[Layer],
        name: str = "states",
        intact: Callable[[int], bool] = _always,
    ) -> None:
        self._journal = journal
        self._name = name
        passed = [layer.index for layer in takewhile(lambda layer: intact(layer.index), layers)]
        self.last = max((index for index in passed if journal.holds(self._of(index))), default=None)
        for layer in layers:
            if layer.index != self.last:
                journal.drop(self._of(layer.index))

    def load(self) -> Iterator[Tensor]:
        """What was saved after `last`."""
        assert self.last is not None
        return self._journal.load(self._of(self.last))

    def save(self, layer: int, tensors: Iterable[Tensor]) -> None:
        """Keep tensors as they are after a layer; those of the layer before go."""
        self._journal.save(self._of(layer), tensors)
        self.drop()
        self.last = layer

    def drop(self) -> None:
        """Remove what is kept."""
        if self.last is not None:
            self._journal.drop(self._of(self.last))

    def _of(self, layer: int) -> str:
        return f"{self._name}-{layer}"


class MeasurementCache:
    """Results of passes over these layers, each measured once, by this run or by an earlier one; all without a journal.

    A pass that was stopped goes on from its `SavedStates`.
    """

    def __init__(self, journal: Journal | None, layers: Sequence[Layer]) -> None:
        self._journal = journal
        self._layers = layers

    def get(self, name: str, measure: Callable[[SavedStates | None], list[Tensor]]) -> list[Tensor]:
        """What `measure` gives, under a name."""
        if not self._journal:
            return measure(None)
        if not self._journal.holds(name):
            states = SavedStates(self._journal, self._layers, f"{name}-states")
            self._journal.save(name, measure(states))
            states.drop()
        return list(self._journal.load(name))


def save_statistics(journal: Journal, layer: int, statistics: Statistics) -> None:
    """Keep what a layer's weights have seen until the importance matrix is complete."""
    journal.save(f"statistics-{layer}", statistics.tensors())


def holds_statistics(journal: Journal, layer: int) -> bool:
    """Whether what an earlier run has kept of a layer is there."""
    return journal.holds(f"statistics-{layer}")


def load_statistics(journal: Journal, layer: int) -> Statistics:
    """What an earlier run has kept of a layer."""
    return Statistics.of_tensors(journal.load(f"statistics-{layer}"))
