"""A resumable pass of several streams through the layers of a model."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Any, Protocol

import torch
from torch import Tensor

from ..progress import NoProgress, Progress
from ..quant.rounding.moments import statistics_for
from ..quant.rounding.statistics import Importance, Statistics
from ..sources.model import Model
from .activations import Workspace
from .measure.evaluate import with_bos
from .observe import ObservingWeights, observe_head
from .stream import Stream
from .weights import Weights


class LayerStates(Protocol):
    """Keeps tensors of a pass after each layer, only those of the last; `last` is its index, None before the first."""

    last: int | None

    def load(self) -> Iterator[Tensor]:
        """What was saved after `last`."""

    def save(self, layer: int, tensors: Iterable[Tensor]) -> None:
        """Keep tensors as they are after a layer."""


class LayerPass:
    """The streams of one pass, from the embedding on, or from the layer where an earlier run was stopped.

    What is saved after a layer are `facts`, a tensor of the caller's, and the states of the streams in the order in
    which they were begun; begin them in the same order again.
    """

    def __init__(self, model: Model, workspace: Workspace | None = None, states: LayerStates | None = None) -> None:
        self.model = model
        self.streams: list[Stream] = []
        self._workspace = workspace
        self._states = states
        self._last = states.last if states else None
        self._saved = states.load() if states and states.last is not None else None
        self.facts = next(self._saved) if self._saved else None

    def is_done(self, layer: int) -> bool:
        """Whether an earlier run has passed this layer."""
        return self._last is not None and layer <= self._last

    def begin(self, tokens: Tensor, weights: Weights) -> Stream:
        """One more stream, of `tokens` [chunks, context]; each chunk begins with what the model wants there."""
        hidden = islice(self._saved, len(tokens)) if self._saved else None
        return self._add(with_bos(tokens, self.model.tokenizer), weights, hidden)

    def fork(self, stream: Stream, weights: Weights) -> Stream:
        """One more stream, which has come as far as another."""
        return self._add(stream.tokens, weights, _states_of(stream))

    def save(self, layer: int, facts: Tensor | None = None) -> None:
        """Keep what all streams have come to after a layer."""
        if self._states:
            first = torch.empty(0) if facts is None else facts
            self._states.save(layer, chain([first], *map(_states_of, self.streams)))

    def _add(self, tokens: Tensor, weights: Weights, hidden: Iterable[Tensor] | None) -> Stream:
        self.streams.append(Stream(self.model, tokens, None, weights, hidden, self._workspace))
        return self.streams[-1]


def packed(value: object) -> Tensor:
    """Anything that JSON can hold as a tensor, uint8 [bytes]."""
    return torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8)


def unpacked(tensor: Tensor) -> Any:
    """What was `packed`."""
    return json.loads(bytes(tensor.tolist()))


def _states_of(stream: Stream) -> Iterator[Tensor]:
    return (stream.hidden[chunk] for chunk in range(len(stream.hidden)))


@dataclass(frozen=True)
class Measuring:
    """What all passes that measure roundings of a model share.

    Attributes:
        model: what is measured.
        calibration: tokens [chunks, context] that show which inputs of a weight matter.
        importance: what to weigh columns by where there is no calibration.
        compute_dtype: what products with weights are computed in.
        error_feedback: round with error feedback, where there is calibration; see `quant.feedback`.
        workspace: where activations are kept, by default in memory.
        states: keeps what a pass has come to, by default nothing does.
    """

    model: Model
    calibration: Tensor | None = None
    importance: Importance | None = None
    progress: Progress = field(default_factory=NoProgress)
    compute_dtype: torch.dtype = torch.float32
    error_feedback: bool = False
    workspace: Workspace | None = None
    states: LayerStates | None = None

    @property
    def wants_importance(self) -> bool:
        """Whether something shows which inputs matter."""
        return self.calibration is not None or self.importance is not None

    def begin(self, source: Weights) -> tuple[LayerPass, Statistics, Importance | None]:
        """A pass in which calibration comes first, if there is any; what it finds; and what columns are weighed by."""
        layer_pass, statistics = LayerPass(self.model, self.workspace, self.states), statistics_for(self.error_feedback)
        if self.calibration is None:
            return layer_pass, statistics, self.importance
        layer_pass.begin(self.calibration, ObservingWeights(source, statistics))
        return layer_pass, statistics, statistics

    def end(self, layer_pass: LayerPass, statistics: Statistics) -> None:
        """All layers are passed, and the head is next."""
        if self.calibration is not None and self.error_feedback:
            observe_head(layer_pass.streams[0], statistics)
