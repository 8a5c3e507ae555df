"""What rounding makes of pieces of weights, made once for all files of a pass that want the same."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from ..quant.planning.plan import Plan, PlannedTensor

_Key = tuple[Hashable, tuple[int | None, ...], tuple[int, int] | None]  # of what, which matrices, which rows


@dataclass(frozen=True)
class Rounded:
    """Some matrices of a stack, or rows of what is none, as they are stored.

    Attributes:
        data: uint8 [matrices, rows, row bytes].
        squares: how far they are from what they were, see `Findings.squares`.
        problems: what the type could not hold, a line each.
    """

    data: Tensor
    squares: tuple[float, float]
    problems: tuple[str, ...] = ()

    @classmethod
    def joined(cls, parts: Sequence[Self]) -> Self:
        """Several matrices that were rounded one by one."""
        changed, sizes = zip(*(part.squares for part in parts), strict=True)
        problems = dict.fromkeys(line for part in parts for line in part.problems)
        return cls(torch.cat([part.data for part in parts]), (sum(changed), sum(sizes)), tuple(problems))


class Roundings:
    """Keeps what was rounded for one of several files until the last that wants the same has it, or until `release`.

    plans: those of all files whose columns are weighed by the same importance.
    """

    def __init__(self, plans: Iterable[Plan]) -> None:
        self._files = Counter(_what(tensor) for plan in plans for tensor in plan.tensors)
        self._kept: dict[_Key, tuple[Rounded, int]] = {}  # and how many files have yet to take it

    def get(
        self,
        tensor: PlannedTensor,
        experts: Sequence[int | None],
        rows: tuple[int, int] | None,
        make: Callable[[PlannedTensor, Sequence[int | None], tuple[int, int] | None], Rounded],
    ) -> Rounded:
        """What `make` gives, or gave for another file."""
        key = (_what(tensor), tuple(experts), rows)
        rounded, left = self._kept.pop(key, (None, self._files[key[0]]))
        if rounded is None:
            rounded = make(tensor, experts, rows)
        if left > 1:
            self._kept[key] = rounded, left - 1
        return rounded

    def release(self, expert: int | None = None) -> None:
        """All files have what they want of one expert, or of all that was loaded."""
        kept = self._kept.items()
        self._kept = {} if expert is None else {key: value for key, value in kept if expert not in key[1]}


def _what(tensor: PlannedTensor) -> Hashable:
    return tensor.weight.name, tensor.weight.origin, tensor.type.name
