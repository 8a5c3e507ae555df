"""The search behind every format that stores ``scale * level``: symmetric integers and codebooks.

Each sub-block tries a few scales, each mapping its value of largest magnitude to another level; the one whose codes
leave the least weighted error after least squares stays. Then scales and codes refine each other: least squares for
the scales given the codes, rounding to what the format can store, nearest codes given the stored scales.

Where to start was chosen greedily, in the order in which a start lowers the error of many synthetic blocks most
(heavy-tailed and normal; unweighted, and weighted with a few channels a hundred times above the rest).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from itertools import pairwise
from typing import Final, NamedTuple, Protocol

import torch
from torch import Tensor

from .lanes import REFINEMENTS, Grid, best_of, half, ordered_sum, reciprocal, spread

STEPS: Final = (1.0, 1.02, 0.98)  # super-block steps to try, relative to the one that just spans the scales


class Levels(Protocol):
    """The levels that codes stand for."""

    @property
    def peaks(self) -> tuple[float, ...]:
        """Where the value of largest magnitude may go, in levels; beyond the outermost level it will be clipped."""

    @property
    def quick(self) -> bool:
        """Whether super-blocks keep the first step that is tried, unrefined."""

    def nearest(self, values: Tensor) -> Tensor:
        """The level nearest to each value, float32."""


# How many levels beyond the lowest the peak starts (negative: short of it), for whole-number levels.
_BEYOND: Final = (0.0, 1.0, -1.0, -2.0)


class Uniform:
    """Whole-number levels from `lowest` (negative) to `highest`; codes count from 0."""

    def __init__(self, lowest: int, highest: int, peaks: tuple[float, ...] = (), quick: bool = False) -> None:
        self.lowest, self.highest, self.quick = lowest, highest, quick
        self.peaks = peaks or tuple(lowest - beyond for beyond in _BEYOND)

    def nearest(self, values: Tensor) -> Tensor:
        return values.round().clamp(self.lowest, self.highest)

    def codes(self, values: Tensor) -> Tensor:
        return (self.nearest(values) - self.lowest).to(torch.uint8)


class Table:
    """Whole-number levels listed in rising order, and the codes that stand for them.

    A value midway between two levels takes the lower one. The middles are whole halves, so the nearest level is a
    function of the doubled value rounded up, which indexes a short list.
    """

    quick = False

    def __init__(self, levels: tuple[int, ...], codes: tuple[int, ...], peaks: tuple[float, ...] = ()) -> None:
        self.peaks = peaks
        self._first, self._last = 2 * levels[0], 2 * levels[-1]
        sums = [low + high for low, high in pairwise(levels)]
        places = [bisect_left(sums, doubled) for doubled in range(self._first, self._last + 1)]
        self._levels = torch.tensor([levels[place] for place in places], dtype=torch.float32, device="cpu")
        self._codes = torch.tensor([codes[place] for place in places], dtype=torch.uint8, device="cpu")
        level_of = dict(zip(codes, levels, strict=True))
        self._decoded = torch.tensor([level_of.get(code, 0) for code in range(16)], device="cpu")

    def nearest(self, values: Tensor) -> Tensor:
        return _look_up(self._levels, self._places(values))

    def codes(self, values: Tensor) -> Tensor:
        return _look_up(self._codes, self._places(values))

    def decoded(self, codes: Tensor) -> Tensor:
        """The levels that codes stand for, float32."""
        return _look_up(self._decoded, codes).to(torch.float32)

    def _places(self, values: Tensor) -> Tensor:
        return (values * 2).ceil().clamp(self._first, self._last) - self._first


def _look_up(table: Tensor, index: Tensor) -> Tensor:
    return table.to(index.device).index_select(0, index.flatten().to(torch.int64)).view(index.shape)


def grid_of(
    levels: Uniform | Table,
    scales: Callable[[Tensor], tuple[Tensor, Tensor]],
    with_codes: Callable[[Tensor, Tensor], Tensor],
) -> Grid:
    """The grid of a format whose codes stand for single levels; with_codes: the bytes with other codes."""
    return Grid(
        scales, lambda scaled, _: levels.nearest(scaled), lambda data, chosen: with_codes(data, levels.codes(chosen))
    )


class Fit(NamedTuple):
    """Weighted sums of ``level²`` and ``level * value``: all that the best scale for given levels depends on."""

    square: Tensor
    product: Tensor

    @property
    def scale(self) -> Tensor:
        return self.product * reciprocal(self.square)

    @property
    def gain(self) -> Tensor:
        """What the best scale takes off the weighted sum of squares."""
        return self.product * self.scale

    def with_multiples(self, multiples: Tensor) -> Fit:
        """The fit of one step for all sub-blocks, whose scales are these multiples of it: [s, lanes] -> [lanes]."""
        return Fit(ordered_sum(self.square * multiples * multiples), ordered_sum(self.product * multiples))


def search_scale(values: Tensor, weights: Tensor, unit: Tensor, levels: Levels) -> Tensor:
    """float16 scales for blocks without sub-blocks: [n, lanes] -> [lanes], divided by the unit."""
    fit = _best_start(values, weights, levels)
    for _ in range(REFINEMENTS):
        fit = _fit(values, weights, levels, reciprocal(half(fit.scale, unit)))
    return half(fit.scale, unit)


def search_multiples(
    values: Tensor, weights: Tensor, unit: Tensor, levels: Levels, lowest: int, highest: int
) -> tuple[Tensor, Tensor]:
    """Scales for super-blocks, whole multiples in [lowest, highest] of a float16 step.

    [s, n, lanes] -> step [lanes], divided by the unit, and multiples [s, lanes].
    """
    fit = _best_start(values, weights, levels)
    peak = peak_of(fit.scale)

    def trial(target: float) -> tuple[Tensor, Tensor, Tensor]:
        multiples = _nearest_multiples(fit.scale, peak * (1 / target), lowest, highest)
        joint = fit.with_multiples(multiples)
        return joint.gain, joint.scale, multiples

    targets = (*(lowest * step for step in STEPS), float(highest))
    _, step, multiples = best_of(map(trial, targets[:1] if levels.quick else targets))
    for _ in range(0 if levels.quick else REFINEMENTS):
        step = half(step, unit)
        fit = _fit(values, weights, levels, reciprocal(step * multiples))
        multiples = _nearest_multiples(fit.scale, step, lowest, highest)
        step = fit.with_multiples(multiples).scale
    return half(step, unit), multiples


def peak_of(values: Tensor) -> Tensor:
    """The value of largest magnitude, with its sign, a tie going to the positive: [..., n, lanes] -> [..., lanes]."""
    highest, lowest = values.amax(-2), values.amin(-2)
    return torch.where(highest >= -lowest, highest, lowest)


def _fit(values: Tensor, weights: Tensor, levels: Levels, inverse: Tensor) -> Fit:
    nearest = levels.nearest(values * spread(inverse))
    weighted = weights * nearest
    return Fit(ordered_sum(weighted * nearest), ordered_sum(weighted * values))


def _best_start(values: Tensor, weights: Tensor, levels: Levels) -> Fit:
    inverse_peak = reciprocal(peak_of(values))
    trials = (_fit(values, weights, levels, inverse_peak * peak) for peak in levels.peaks)
    return Fit(*best_of((trial.gain, *trial) for trial in trials)[1:])


def _nearest_multiples(scale: Tensor, step: Tensor, lowest: int, highest: int) -> Tensor:
    """0 for a scale of 0 alone: a sub-block far smaller than its neighbours is better off with few levels than none."""
    ratio = scale * reciprocal(step)
    multiples = ratio.round().clamp(lowest, highest)
    return torch.where(multiples == 0, torch.sign(ratio), multiples)
