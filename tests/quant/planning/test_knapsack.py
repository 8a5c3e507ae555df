"""The choice of options under a budget, against trying them all."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as some
from moecast.errors import BadInput
from moecast.quant.planning.knapsack import Option, solve_knapsack

options = some.builds(Option, some.integers(1, 60), some.floats(0, 1), some.integers(1, 9).map(float))
problems = some.lists(some.lists(options, min_size=1, max_size=4), min_size=1, max_size=5)


def totals(items: list[list[Option]], chosen: tuple[int, ...]) -> tuple[int, float, float]:
    taken = [item[number] for item, number in zip(items, chosen, strict=True)]
    return sum(o.bytes for o in taken), sum(o.damage for o in taken), sum(o.active_bytes for o in taken)


@settings(max_examples=60, deadline=None)
@given(problems, some.floats(0, 1))
def test_least_damage_within_the_budget(items: list[list[Option]], share: float) -> None:
    least = sum(min(option.bytes for option in item) for item in items)
    most = sum(max(option.bytes for option in item) for item in items)
    budget = int(least + share * (most - least))
    every = [totals(items, chosen) for chosen in itertools.product(*(range(len(item)) for item in items))]
    best = min(damage for size, damage, _ in every if size <= budget)
    size, damage, _ = totals(items, tuple(solve_knapsack(items, budget)))
    assert size <= budget
    assert damage == pytest.approx(best)


@settings(max_examples=20, deadline=None)
@given(problems)
def test_the_second_budget_is_kept_too(items: list[list[Option]]) -> None:
    budget = sum(max(option.bytes for option in item) for item in items)
    free = totals(items, tuple(solve_knapsack(items, budget)))
    least_active = sum(min(option.active_bytes for option in item) for item in items)
    active_budget = (least_active + free[2]) / 2
    size, damage, active = totals(items, tuple(solve_knapsack(items, budget, active_budget)))
    assert size <= budget
    assert active <= active_budget
    assert damage >= free[1] - 1e-9


def test_a_budget_that_nothing_fits_is_refused() -> None:
    items = [[Option(10, 1.0), Option(20, 0.5)]] * 3
    with pytest.raises(BadInput, match="smallest known types take 30"):
        solve_knapsack(items, 29)
    with pytest.raises(BadInput, match="bytes for each token are too few"):
        solve_knapsack([[Option(10, 1.0, 5.0)]], 20, active_budget=4.0)
