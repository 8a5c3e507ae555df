"""The state of a pass after each layer, kept in the journal, so that no layer but the one in flight runs twice."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice

import torch
from torch import Tensor

from ..archs.graph import Layer
from ..quant.importance import Statistics
from ..runner.stream import Stream
from .journal import Journal


class Checkpoints:
    """Saves what lanes and errors are after a layer, and finds the last of it again."""

    def __init__(self, journal: Journal | None, layers: Sequence[Layer]) -> None:
        self._journal = journal
        done = [layer.index for layer in layers if journal and journal.holds(_states(layer.index))]
        self.last = max(done, default=None)
        self.errors: list[float] = []
        if journal and self.last is not None:
            self._states: Iterator[Tensor] | None = journal.load(_states(self.last))
            self.errors = next(self._states).tolist()
        else:
            self._states = None

    def hidden(self, chunks: int) -> Iterator[Tensor] | None:
        """The states of the next lane, chunk by chunk; None where the pass begins."""
        return islice(self._states, chunks) if self._states else None

    def save(self, layer: int, streams: Sequence[Stream], statistics: Statistics | None) -> None:
        """Keep everything as it is after a layer; `statistics` where they are needed once more at the end."""
        if not self._journal:
            return
        if statistics:
            self._journal.save(_statistics(layer), statistics.tensors())
        self._journal.save(_states(layer), self._tensors(streams))
        if self.last is not None:
            self._journal.drop(_states(self.last))
        self.last = layer

    def statistics(self, layer: int) -> Statistics:
        """Those of a layer that an earlier run has passed."""
        assert self._journal
        return Statistics.of_tensors(self._journal.load(_statistics(layer)))

    def _tensors(self, streams: Sequence[Stream]) -> Iterator[Tensor]:
        yield torch.tensor(self.errors, dtype=torch.float64)
        for stream in streams:
            yield from (stream.hidden[chunk] for chunk in range(len(stream.hidden)))


def _states(layer: int) -> str:
    return f"states-{layer}"


def _statistics(layer: int) -> str:
    return f"statistics-{layer}"
