"""Weights rounded to planned types in memory, as a file would hold them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from ...archs.graph import Graph
from ...archs.weights import Weight
from ...quant import dequantize
from ...quant.formats.table import format_named
from ...quant.rounding.feedback import quantize_weight
from ...quant.rounding.statistics import Importance
from ..weights import CachedWeights, WeightProducts


class Quantizer:
    """Rounds weights to types and back; what it made is kept until `release`, for all streams that ask for the same.

    Streams of several plans do: a weight of one name and shape is the same in all of a model's forms.
    """

    def __init__(self, source: CachedWeights, importance: Importance | None) -> None:
        self.source = source
        self._importance = importance
        self._kept: dict[tuple[str, tuple[int, ...], str, int | None, tuple[int, int] | None], Tensor] = {}

    def load(self, weight: Weight, type: str, expert: int | None, rows: tuple[int, int] | None) -> Tensor:
        """The weight's numbers after storing them in that type: float32, of the shape that `Weights.load` gives."""
        key = (weight.name, weight.shape, type, expert, rows)
        if key not in self._kept:
            values = self.source.load(weight, expert, rows)
            self._kept[key] = self.round(values.reshape(1, -1, weight.columns), weight, type, [expert]).view_as(values)
        return self._kept[key]

    def prepare(self, weight: Weight, type: str, experts: Sequence[int]) -> None:
        """Round matrices of a stack together, which `load` will give."""
        keys = [(weight.name, weight.shape, type, expert, None) for expert in experts]
        missing = [(key, expert) for key, expert in zip(keys, experts, strict=True) if key not in self._kept]
        if len(missing) > 1:
            values = torch.stack([self.source.load(weight, expert) for _, expert in missing])
            rounded = self.round(values, weight, type, [expert for _, expert in missing])
            self._kept.update(zip((key for key, _ in missing), rounded, strict=True))

    def round(self, values: Tensor, weight: Weight, type: str, experts: Sequence[int | None]) -> Tensor:
        """Some rows [matrices, rows, columns] of a weight's matrices after storing them; rows that blocks do not divide
        are filled up with zeros first."""
        missing = -weight.columns % format_named(type).block_size
        padded = functional.pad(values, (0, missing)) if missing else values
        data = quantize_weight(padded, weight, experts, type, self._importance)
        stored = dequantize(data.flatten(0, 1), type)
        return stored[:, : weight.columns].reshape(values.shape)

    def release(self, expert: int | None = None) -> None:
        self._kept = {} if expert is None else {key: kept for key, kept in self._kept.items() if key[3] != expert}
        self.source.release(expert)


class RoundedWeights(WeightProducts):
    """The weights of a graph, those named in `types` rounded to them; the others are the source's.

    The graph is the source's own or another form of it, whose weights read the same stored tensors.
    """

    def __init__(self, quantizer: Quantizer, graph: Graph, types: Mapping[str, str]) -> None:
        source = quantizer.source
        super().__init__(graph, source.label, source.compute_dtype, source.device)
        self._quantizer = quantizer
        self._types = types

    def load(self, weight: Weight, expert: int | None = None, rows: tuple[int, int] | None = None) -> Tensor:
        type = self._types.get(weight.name)
        if type is None:
            return self._quantizer.source.load(weight, expert, rows)
        return self._quantizer.load(weight, type, expert, rows)

    def prepare(self, stacks: Sequence[Weight], experts: Sequence[int]) -> None:
        for stack in stacks:
            if stack.name in self._types:
                self._quantizer.prepare(stack, self._types[stack.name], experts)

    def release(self, expert: int | None = None) -> None:
        self._quantizer.release(expert)
