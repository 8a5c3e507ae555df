"""A multiple-choice knapsack: which option each item takes so that the damage is least within a budget of bytes.

Dynamic programming over what is spent beyond the cheapest options, in steps of a fraction of the budget (Kellerer,
Pferschy & Pisinger 2004, section 11.5). Options are rounded to whole steps, up or down, so that errors cancel; the
answer is then the best one whose exact bytes are within the budget.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ...errors import BadInput

_STEPS = 1 << 14  # of what the budget leaves beyond the cheapest options
_COARSE_STEPS = 1 << 11  # where many answers are compared
_BISECTIONS = 24  # of the price of a byte that every token touches


@dataclass(frozen=True)
class Option:
    """One way to store an item.

    Attributes:
        bytes: what it takes of the budget.
        damage: what it does to the model, in any unit that adds up.
        active_bytes: what one token touches of it on average.
    """

    bytes: int
    damage: float
    active_bytes: float = 0.0


class BudgetTooSmall(BadInput):
    """Even the smallest types that are known take more than a budget; `least` is what they take, in bytes."""

    def __init__(self, budget: int, least: int) -> None:
        super().__init__(f"a budget of {budget} bytes is too small: the smallest known types take {least}")
        self.least = least


Items = Sequence[Sequence[Option]]


def solve_knapsack(items: Items, budget: int, active_budget: float | None = None) -> list[int]:
    """The number of the option that each item takes: least damage within `budget` bytes.

    Args:
        active_budget: most bytes that one token may touch, which is what bounds the speed of decoding.

    Raises BadInput when even the cheapest options are beyond a budget, BudgetTooSmall where it is the first one.
    """
    least = sum(min(option.bytes for option in options) for options in items)
    if least > budget:
        raise BudgetTooSmall(budget, least)
    chosen = _cheapest(items, budget, 0.0, _STEPS)
    if active_budget is None or _active(items, chosen) <= active_budget:
        return chosen
    return _within_active_budget(items, budget, active_budget)


def _active(items: Items, chosen: Sequence[int]) -> float:
    return sum(options[number].active_bytes for options, number in zip(items, chosen, strict=True))


def _within_active_budget(items: Items, budget: int, active_budget: float) -> list[int]:
    """The lowest price of an active byte, added to the damage, at which the answer keeps to the second budget."""
    lowest = [min(range(len(options)), key=lambda n: options[n].active_bytes) for options in items]
    if _active(items, lowest) > active_budget:
        raise BadInput(
            f"{active_budget:.0f} bytes for each token are too few: the smallest known types take "
            f"{_active(items, lowest):.0f}"
        )
    damages = [option.damage for options in items for option in options]
    most = (max(damages) + 1e-12) * len(items) / max(active_budget, 1.0)  # dear enough to outweigh all damage
    best = lowest
    low, high = 0.0, most
    for _ in range(_BISECTIONS):
        price = (low * high) ** 0.5 if low else high / 1024
        chosen = _cheapest(items, budget, price, _COARSE_STEPS)
        if _active(items, chosen) <= active_budget:
            best, high = chosen, price
        else:
            low = price
    return best


def _cheapest(items: Items, budget: int, price: float, count: int) -> list[int]:
    """Least sum of damage + price * active bytes within the budget, which is cut into `count` steps."""
    least = [min(option.bytes for option in options) for options in items]
    step = max((budget - sum(least)) / count, 1.0)
    total: NDArray[np.float64] = np.zeros(count + 1)  # [steps spent] -> least cost of the items so far
    choices = np.zeros((len(items), count + 1), dtype=np.uint8)
    steps = []
    for number, (options, base) in enumerate(zip(items, least, strict=True)):
        spent = [round((option.bytes - base) / step) for option in options]
        best = np.full(count + 1, np.inf)
        for which, (option, used) in enumerate(zip(options, spent, strict=True)):
            if used > count:
                continue
            cost = total[: count + 1 - used] + (option.damage + price * option.active_bytes)
            better = cost < best[used:]
            best[used:][better] = cost[better]
            choices[number, used:][better] = which
        total = best
        steps.append(spent)
    for spendable in range(count, -1, -1):
        chosen = _trace(choices, steps, spendable)
        if sum(options[which].bytes for options, which in zip(items, chosen, strict=True)) <= budget:
            return chosen
    raise AssertionError("the cheapest options are within the budget")


def _trace(choices: NDArray[np.uint8], steps: Sequence[Sequence[int]], spendable: int) -> list[int]:
    chosen = []
    for number in range(len(choices) - 1, -1, -1):
        which = int(choices[number, spendable])
        chosen.append(which)
        spendable -= steps[number][which]
    return chosen[::-1]
