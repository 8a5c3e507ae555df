"""A resumable pass of several streams through the layers of a model."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Any, Protocol

import torch
from torch import Tensor

from ..archs.graph import Layer
from ..progress import NoProgress, Progress
from ..quant.rounding.statistics import Importance, Statistics, statistics_for
from ..sources.model import Model
from .activations import Workspace
from .observe import ObservingWeights, observe_head
from .placement import CPU
from .stream import Stream, advance, embed
from .texts import with_bos
from .weights import ModelWeights, Weights

CALIBRATION, REFERENCE, CANDIDATE = "calibration", "reference", "candidate"  # names of streams


class LayerStates(Protocol):
    """Keeps tensors of a pass after each layer, only those of the last; `last` is its index, None before the first."""

    last: int | None

    def load(self) -> Iterator[Tensor]:
        """What was saved after `last`."""

    def save(self, layer: int, tensors: Iterable[Tensor]) -> None:
        """Keep tensors as they are after a layer."""


class LayerPass:
    """The streams of one pass by name, from the embedding on, or from the layer where an earlier run was stopped.

    What is saved after a layer are the names of the streams, `facts`, a tensor of the caller's, and what each stream
    has come to. Streams of an earlier run are begun again in the same order, under the same names.
    """

    def __init__(self, model: Model, workspace: Workspace | None = None, states: LayerStates | None = None) -> None:
        self.model = model
        self.streams: dict[str, Stream] = {}
        self.facts: Tensor | None = None
        self._workspace = workspace
        self._states = states
        self._last = states.last if states else None
        self._saved: Iterator[Tensor] = iter(())
        self._waiting: list[tuple[str, list[int]]] = []  # names of saved streams, layers whose states they share
        if states and states.last is not None:
            self._saved = states.load()
            self._waiting = [(name, sharing) for name, sharing in unpacked(next(self._saved))]
            self.facts = next(self._saved)

    @property
    def passed(self) -> int:
        """How many layers an earlier run has passed."""
        return 0 if self._last is None else self._last + 1

    def is_done(self, layer: int) -> bool:
        """Whether an earlier run has passed this layer."""
        return self._last is not None and layer <= self._last

    def begin(self, name: str, tokens: Tensor, weights: Weights) -> Stream:
        """One more stream, of `tokens` [chunks, context]; each chunk begins with what the model wants there."""
        self.begin_together({name: (tokens, weights)})
        return self.streams[name]

    def begin_together(self, streams: Mapping[str, tuple[Tensor, Weights]]) -> None:
        """The same for several by name; what they share of their embeddings is loaded once."""
        embed([self._begun(name, tokens, weights) for name, (tokens, weights) in streams.items()])

    def _begun(self, name: str, tokens: Tensor, weights: Weights) -> Stream:
        tokens = with_bos(tokens, self.model.tokenizer)
        if not self._waiting:
            return self._add(name, Stream(self.model, tokens, weights=weights, workspace=self._workspace))
        saved, sharing = self._waiting.pop(0)
        assert saved == name, f"{name} is begun where {saved} was saved"
        states = islice(self._saved, len(tokens) * (1 + len(sharing)))
        return self._add(name, Stream(self.model, tokens, None, weights, states, sharing, self._workspace))

    def fork(self, name: str, stream: Stream, weights: Weights) -> Stream:
        """One more stream, which has come as far as another."""
        states, sharing = stream.states(), [*stream.shared]
        forked = Stream(
            self.model, stream.tokens, None, weights, states, sharing, self._workspace, inputs=stream.inputs
        )
        return self._add(name, forked)

    def advance(self, layers: Sequence[Layer], experts_done: Callable[[Sequence[int]], None] | None = None) -> None:
        """Run every stream through a layer of its own, see `stream.advance`."""
        advance([*self.streams.values()], layers, experts_done)

    def save(self, layer: int, facts: Tensor | None = None) -> None:
        """Keep what all streams have come to after a layer."""
        if self._states:
            names = packed([(name, [*stream.shared]) for name, stream in self.streams.items()])
            first = (names, torch.empty(0, device="cpu") if facts is None else facts)
            states = chain(first, *(stream.states() for stream in self.streams.values()))
            self._states.save(layer, (tensor.cpu() for tensor in states))

    def _add(self, name: str, stream: Stream) -> Stream:
        assert name not in self.streams, f"two streams are called {name}"
        self.streams[name] = stream
        return stream


def packed(value: object) -> Tensor:
    """Anything that JSON can hold as a tensor, uint8 [bytes]."""
    return torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8, device="cpu")


def unpacked(tensor: Tensor) -> Any:
    """What was `packed`."""
    return json.loads(bytes(tensor.tolist()))


@dataclass(frozen=True)
class Measuring:
    """What all passes that measure roundings of a model share.

    Attributes:
        model: what is measured.
        calibration: tokens [chunks, context] that show which inputs of a weight matter.
        importance: what to weigh columns by where there is no calibration.
        compute_dtype: what products with weights are computed in.
        error_feedback: round with error feedback, where there is calibration; see `quant.feedback`.
        workspace: where activations are kept, by default in memory, and on which device is computed.
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

    def weights(self) -> ModelWeights:
        """The model's weights as they are stored."""
        return ModelWeights(self.model, self.compute_dtype, self.workspace.device if self.workspace else CPU)

    @property
    def wants_importance(self) -> bool:
        """Whether something shows which inputs matter."""
        return self.calibration is not None or self.importance is not None

    def begin(self, source: Weights) -> tuple[LayerPass, Statistics, Importance | None]:
        """A pass in which calibration comes first, if there is any; what it finds; and what columns are weighed by."""
        layer_pass, statistics = (
            LayerPass(self.model, self.workspace, self.states),
            statistics_for(self.error_feedback, self.compute_dtype),
        )
        if self.calibration is None:
            return layer_pass, statistics, self.importance
        layer_pass.begin(CALIBRATION, self.calibration, ObservingWeights(source, statistics))
        return layer_pass, statistics, statistics

    def end(self, layer_pass: LayerPass, statistics: Statistics) -> None:
        """All layers are passed, and the head is next."""
        if self.calibration is not None and self.error_feedback:
            observe_head(layer_pass.streams[CALIBRATION], statistics)
