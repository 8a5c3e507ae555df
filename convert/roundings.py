"""What rounding makes of pieces of weights, made once for all files of a pass that want the same."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from ..quant.planning.plan import Plan, PlannedTensor

_Rows = tuple[int, int] | None


@dataclass(frozen=True)
class Rounded:
    """Some matrices of a stack, or rows of what is none, as they are stored.

    Attributes:
        data: uint8 [matrices, rows, row bytes].
        squares: how far rounding went, see `Findings.squares`; None where the numbers are stored as they are.
        problems: what the type could not hold, a line each.
    """

    data: Tensor
    squares: tuple[float, float] | None = None
    problems: tuple[str, ...] = ()

    @classmethod
    def joined(cls, parts: Sequence[Self]) -> Self:
        """Several matrices that were rounded one by one."""
        squares = [part.squares for part in parts if part.squares]
        total = (sum(changed for changed, _ in squares), sum(size for _, size in squares)) if squares else None
        problems = dict.fromkeys(line for part in parts for line in part.problems)
        return cls(torch.cat([part.data for part in parts]), total, tuple(problems))


class Roundings:
    """Keeps what was rounded for one of several files until the last that wants the same has it, or until `release`.

    Files want the same of a weight where they store it in the same type, and weigh its columns or do not; which does
    not matter where it is stored as it is. plans: those of all files, and whether anything weighs their columns.
    """

    def __init__(self, plans: Iterable[tuple[Plan, bool]]) -> None:
        wanted = ((_what(tensor), weighed) for plan, weighed in plans for tensor in plan.tensors)
        self._files: Counter[tuple[Hashable, bool]] = Counter(wanted)
        self._kept: dict[_Key, tuple[Rounded, int]] = {}  # and how many files have yet to take it

    def get(
        self,
        tensor: PlannedTensor,
        experts: Sequence[int | None],
        rows: _Rows,
        weighed: bool,
        make: Callable[[PlannedTensor, Sequence[int | None], _Rows], Rounded],
    ) -> Rounded:
        """What `make` gives, or gave for another file."""
        what, which = _what(tensor), tuple(experts)
        alike, exact = (what, weighed, which, rows), (what, None, which, rows)
        key: _Key = exact if exact in self._kept else alike
        if key in self._kept:
            rounded, left = self._kept.pop(key)
        else:
            rounded, left = make(tensor, experts, rows), self._files[what, weighed]
            if rounded.squares is None:
                key, left = exact, left + self._files[what, not weighed]
        if left > 1:
            self._kept[key] = rounded, left - 1
        return rounded

    def release(self, expert: int | None = None) -> None:
        """All files have what they want of one expert, or of all that was loaded."""
        kept = self._kept.items()
        self._kept = {} if expert is None else {key: value for key, value in kept if expert not in key[2]}


_Key = tuple[Hashable, bool | None, tuple[int | None, ...], _Rows]  # what, how weighed, which matrices, which rows


def _what(tensor: PlannedTensor) -> Hashable:
    return tensor.weight.name, tensor.weight.origin, tensor.type.name
