"""The Weights protocol that blocks compute with, and its plain form: the model's own numbers."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from ..archs.expressions import Padded
from ..archs.graph import Graph
from ..archs.weights import Weight
from ..sources.decode import pad
from ..sources.model import Model
from .placement import CPU

_TILE = 32  # tokens: for every number of them, oneDNN compiles a kernel of its own and keeps half a megabyte


class Weights(Protocol):
    """The weights of a graph in use. All numbers are float32 and lie on `device`, as states and products do.

    What was loaded is kept until `release`.

    Every product with a stored matrix goes through `project`, so that a variant can watch its inputs. `label` names
    the model in messages.
    """

    graph: Graph
    label: str
    device: torch.device

    def load(self, weight: Weight, expert: int | None = None, rows: tuple[int, int] | None = None) -> Tensor:
        """A weight's numbers: one expert of a stack, some rows, or all of it. See `decode.evaluate`."""

    def project(self, states: Tensor, weight: Weight, expert: int | None = None) -> Tensor:
        """states [tokens, columns] -> states @ weight.T, [tokens, rows]"""

    def project_groups(self, states: Tensor, weight: Weight) -> Tensor:
        """states [groups, tokens, columns] -> [groups, tokens, rows / groups], each group by its own rows."""

    def announce(self, stacks: Sequence[Weight], states: Tensor) -> None:
        """States [tokens, columns] are about to be read by experts of these stacks, each token by some of them."""

    def prepare(self, stacks: Sequence[Weight], experts: Sequence[int]) -> None:
        """These experts of these stacks come next: what is best made of several at once may be made now."""

    def release(self, expert: int | None = None) -> None:
        """Drop what was kept of one expert, or all that was kept: whoever needed it is done."""


class WeightProducts:
    """Products with whatever `load` gives.

    Products with weights that may be quantized are computed in `compute_dtype`, see `multiply`; the others decide too
    much, and stay in float32.
    """

    def __init__(
        self, graph: Graph, label: str, compute_dtype: torch.dtype = torch.float32, device: torch.device = CPU
    ) -> None:
        self.graph = graph
        self.label = label
        self.compute_dtype = compute_dtype
        self.device = device

    def load(self, weight: Weight, expert: int | None = None, rows: tuple[int, int] | None = None) -> Tensor:
        raise NotImplementedError

    def announce(self, stacks: Sequence[Weight], states: Tensor) -> None:
        """Nothing follows from it here."""

    def prepare(self, stacks: Sequence[Weight], experts: Sequence[int]) -> None:
        """Nothing is made of several at once here."""

    def project(self, states: Tensor, weight: Weight, expert: int | None = None) -> Tensor:
        return multiply(states, self.matmul_operand(weight, expert), self._dtype_for(weight))

    def project_groups(self, states: Tensor, weight: Weight) -> Tensor:
        matrices = self.matmul_operand(weight, None).unflatten(0, (len(states), -1))  # [groups, rows / groups, columns]
        return multiply(states, matrices, self._dtype_for(weight))

    def matmul_operand(self, weight: Weight, expert: int | None) -> Tensor:
        """A matrix to multiply with: float32, or what products with it are computed in."""
        return self.load(weight, expert)

    def _dtype_for(self, weight: Weight) -> torch.dtype:
        return torch.float32 if weight.role.keep_f32 else self.compute_dtype


class CachedWeights(WeightProducts):
    """Weights that are read once and kept until `release`; `read` and `read_directly` say where they come from."""

    def __init__(
        self, graph: Graph, label: str, compute_dtype: torch.dtype = torch.float32, device: torch.device = CPU
    ) -> None:
        super().__init__(graph, label, compute_dtype, device)
        # By origin, because a padded graph has other weights of the same names.
        self._kept: dict[tuple[Hashable, int | None, tuple[int, int] | torch.dtype | None], Tensor] = {}

    def read(self, weight: Weight, expert: int | None, rows: tuple[int, int] | None) -> Tensor:
        raise NotImplementedError

    def read_directly(self, weight: Weight, expert: int | None) -> Tensor | None:
        """A matrix in `compute_dtype`, None where it has to be rounded from what `read` gives."""
        raise NotImplementedError

    def matmul_operand(self, weight: Weight, expert: int | None) -> Tensor:
        if self._dtype_for(weight) == torch.float32:
            return self.load(weight, expert)
        key = (weight.origin, expert, self.compute_dtype)
        if key not in self._kept:
            direct = self.read_directly(weight, expert)
            if direct is None:
                return self.load(weight, expert)
            self._kept[key] = direct
        return self._kept[key]

    def load(self, weight: Weight, expert: int | None = None, rows: tuple[int, int] | None = None) -> Tensor:
        origin = weight.origin
        whole = self._kept.get((origin, expert, None))
        if rows and whole is not None:
            return whole[slice(*rows)]
        key = (origin, expert, rows)
        if key not in self._kept:
            self._kept[key] = self.read(weight, expert, rows)
        return self._kept[key]

    def release(self, expert: int | None = None) -> None:
        self._kept = {} if expert is None else {key: kept for key, kept in self._kept.items() if key[1] != expert}


class ModelWeights(CachedWeights):
    """The weights of a model as they are stored; streams of one model share them, so each is decoded once for all.

    Those of padded forms of its graph are made of its own.
    """

    def __init__(self, model: Model, compute_dtype: torch.dtype = torch.float32, device: torch.device = CPU) -> None:
        super().__init__(model.graph, str(model.path), compute_dtype, device)
        self.model = model
        self._own = {id(weight.source): weight for weight in model.graph.weights()}

    def read(self, weight: Weight, expert: int | None, rows: tuple[int, int] | None) -> Tensor:
        source = weight.source
        if isinstance(source, Padded) and (own := self._own.get(id(source.source))):
            return pad(source, rows, lambda part: self.load(own, expert, part), self.device)
        return self.model.load(weight, expert, rows, self.device)

    def read_directly(self, weight: Weight, expert: int | None) -> Tensor | None:
        return self.model.load_directly(weight, expert, self.compute_dtype, self.device)


def multiply(states: Tensor, matrix: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The product all else is made of: [..., tokens, columns] by [..., rows, columns] gives [..., tokens, rows].

    Both factors are rounded to `dtype` first, summed up in float32 and rounded to `dtype`; the result is float32.
    """
    if dtype == torch.float32:
        return states @ matrix.mT
    tokens = states.shape[-2]
    padded = functional.pad(states.to(dtype), (0, 0, 0, -tokens % _TILE))
    return (padded @ matrix.to(dtype).mT)[..., :tokens, :].float()
