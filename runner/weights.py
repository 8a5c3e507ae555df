"""What blocks ask of a model's weights, and the plain answer: the model's own numbers."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from ..archs.graph import Graph
from ..archs.weights import Weight
from ..sources.model import Model


class Weights(Protocol):
    """The weights of a graph in use. All numbers are float32; what was loaded is kept until `forget`.

    Every product with a stored matrix goes through `project`, so that a variant can watch its inputs. `label` names
    the model in messages.
    """

    graph: Graph
    label: str

    def load(self, weight: Weight, expert: int | None = None, rows: tuple[int, int] | None = None) -> Tensor:
        """A weight's numbers: one expert of a stack, some rows, or all of it. See `decode.evaluate`."""

    def project(self, states: Tensor, weight: Weight, expert: int | None = None) -> Tensor:
        """states [tokens, columns] -> states @ weight.T, [tokens, rows]"""

    def project_groups(self, states: Tensor, weight: Weight) -> Tensor:
        """states [groups, tokens, columns] -> [groups, tokens, rows / groups], each group by its own rows."""

    def forget(self, expert: int | None = None) -> None:
        """Drop what was kept of one expert, or all that was kept: whoever needed it is done."""


class KeptWeights:
    """Weights whose numbers are read once and kept until `forget`; `read` says where they come from."""

    def __init__(self, graph: Graph, label: str) -> None:
        self.graph = graph
        self.label = label
        # By identity, because a padded graph has other weights of the same names.
        self._kept: dict[tuple[int, int | None, tuple[int, int] | None], Tensor] = {}

    def read(self, weight: Weight, expert: int | None, rows: tuple[int, int] | None) -> Tensor:
        raise NotImplementedError

    def load(self, weight: Weight, expert: int | None = None, rows: tuple[int, int] | None = None) -> Tensor:
        whole = self._kept.get((id(weight), expert, None))
        if rows and whole is not None:
            return whole[slice(*rows)]
        key = (id(weight), expert, rows)
        if key not in self._kept:
            self._kept[key] = self.read(weight, expert, rows)
        return self._kept[key]

    def project(self, states: Tensor, weight: Weight, expert: int | None = None) -> Tensor:
        return multiply(states, self.load(weight, expert))

    def project_groups(self, states: Tensor, weight: Weight) -> Tensor:
        return multiply_groups(states, self.load(weight))

    def forget(self, expert: int | None = None) -> None:
        self._kept = {} if expert is None else {key: kept for key, kept in self._kept.items() if key[1] != expert}


class ModelWeights(KeptWeights):
    """The weights of a model as they are stored; lanes of one model share them, so each is decoded once for all."""

    def __init__(self, model: Model) -> None:
        super().__init__(model.graph, str(model.path))
        self.model = model

    def read(self, weight: Weight, expert: int | None, rows: tuple[int, int] | None) -> Tensor:
        return self.model.load(weight, expert, rows)


def multiply(states: Tensor, matrix: Tensor) -> Tensor:
    """The product that everything else is made of: states [..., columns], matrix [rows, columns] -> [..., rows]."""
    return states @ matrix.T


def multiply_groups(states: Tensor, matrix: Tensor) -> Tensor:
    """states [groups, tokens, columns], matrix [rows, columns] -> [groups, tokens, rows / groups]."""
    return states @ matrix.view(len(states), -1, matrix.shape[1]).transpose(1, 2)
