"""The search behind every format whose codes index points of a lattice, several values at a time.

The scale of each sub-block is an odd multiple of the block's float16 step. As long as it is sought each value goes to
the nearest level by itself: of a few scales the one stays whose levels leave the least weighted error after least
squares. Then most formats choose points, for scales a little below and above that, and again the best stays. A step and
multiples for those scales follow, points are chosen once more for the scales that can be stored, and step and multiples
are fitted to those points.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import copy
from typing import Final, NamedTuple

import torch
from torch import Tensor

from .lanes import best_of, half, ordered_sum, reciprocal, spread
from .scaled import Fit

# Where to try to put a sub-block's largest magnitude, relative to the highest level.
PEAKS: Final = (0.9, 1.1, 1.35, 1.7, 2.2)

# Steps to try for a block, relative to the one whose largest multiple is the largest scale.
STEPS: Final = (1.0, 1.03, 0.97, 0.94, 0.9)

TAG_BITS: Final = 8  # the lowest bits of a distance give way to the number of what it belongs to
_TAG: Final = (1 << TAG_BITS) - 1


class Choice(NamedTuple):
    """Points chosen for sub-blocks: the levels they stand for [s, n, lanes], and what to store [s, points, lanes]."""

    levels: Tensor
    codes: Tensor


class Scaled(NamedTuple):
    """A block's step [lanes], divided by the unit; odd multiples of it [s, lanes]; points [s, points, lanes]; and the
    weighted sum [lanes] of values times what is stored for them, in steps.
    """

    step: Tensor
    multiples: Tensor
    codes: Tensor
    product: Tensor


class Lattice:
    """Points of four or eight levels, and the search for the one that is nearest by weighted distance.

    A distance is that of the first half of a point plus that of the second, and there are far fewer halves than
    points: the halves' distances are tabulated, and for each first half the nearest of its second halves is taken.
    Of equally near points the one whose first half comes first wins, then the one whose second half does, in lexical
    order. The lowest TAG_BITS bits of a second half's distance are its number, its levels being digits of two or
    three bits, and count as part of the distance.
    """

    def __init__(self, points: Tensor) -> None:
        """points: float32 [points, 4 or 8], of at most 4 levels for 8 values and at most 8 for 4."""
        self.points = points
        self.levels, self.digits = torch.unique(points, return_inverse=True)
        self.rising: tuple[float, ...] = tuple(self.levels.tolist())
        middle = points.shape[1] // 2
        places = torch.arange(middle - 1, -1, -1, device=points.device)
        first, second = self.digits.split(middle, dim=1)
        values = len(self.levels) ** places  # of digits in a half's place in a table of all halves
        halves = torch.cartesian_prod(*[torch.arange(len(self.levels), device=points.device)] * middle)
        self._tags = (halves << places * (TAG_BITS // middle)).sum(1).to(torch.int32)
        firsts, seconds = (first * values).sum(1), (second * values).sum(1)
        self._partners = {place: seconds[firsts == place].sort().values for place in firsts.unique().tolist()}
        self._numbers = torch.zeros(len(halves) << TAG_BITS, dtype=torch.int64, device=points.device)
        self._numbers[firsts << TAG_BITS | self._tags[seconds]] = torch.arange(len(points), device=points.device)

    def to(self, device: torch.device) -> Lattice:
        """The same on a device."""
        moved = copy(self)
        for name, part in vars(self).items():
            if isinstance(part, Tensor):
                setattr(moved, name, part.to(device))
        moved._partners = {place: partners.to(device) for place, partners in self._partners.items()}
        return moved

    def nearest(self, values: Tensor, weights: Tensor) -> Tensor:
        """The numbers of the nearest points: [..., 4 or 8, lanes] -> int64 [..., lanes]."""
        values, weights = values.movedim(-2, 0), weights.movedim(-2, 0)
        middle = len(values) // 2
        firsts = self._distances(values[:middle], weights[:middle])
        seconds = _tagged(self._distances(values[middle:], weights[middle:]), self._tags)
        least = torch.full_like(firsts[0], torch.inf)
        pair = torch.zeros_like(least, dtype=torch.int32)
        for place, partners in self._partners.items():
            second = seconds.index_select(0, partners).amin(0)
            distance = firsts[place] + second.view(torch.float32)
            nearer = distance < least
            least = torch.where(nearer, distance, least)
            pair = torch.where(nearer, second & _TAG | place << TAG_BITS, pair)
        return self._numbers[pair.to(torch.int64)]

    def point(self, numbers: Tensor) -> Tensor:
        """The points with these numbers: [..., lanes] -> [..., 4 or 8, lanes]."""
        return self.points[numbers].movedim(-1, -2)

    def numbers(self, levels: Tensor) -> Tensor:
        """The numbers of points that are in the lattice: [n * (4 or 8), lanes] -> int64 [n, lanes]."""
        digits = torch.bucketize(levels, self.levels).unflatten(0, (-1, self.points.shape[1]))
        first, second = digits.split(digits.shape[1] // 2, dim=1)
        places = len(self.levels) ** torch.arange(first.shape[1] - 1, -1, -1, device=levels.device)[:, None]
        return self._numbers[(first * places).sum(1) << TAG_BITS | self._tags[(second * places).sum(1)].to(torch.int64)]

    def _distances(self, values: Tensor, weights: Tensor) -> Tensor:
        """Weighted squared distances of the values [2 or 4, ...] from all halves: [halves, ...]."""
        levels = self.levels.view(-1, *[1] * (values.ndim - 1))
        misses = [value - levels for value in values]
        parts = [weight * miss * miss for weight, miss in zip(weights, misses, strict=True)]
        while len(parts) > 1:
            pairs = zip(parts[::2], parts[1::2], strict=True)
            parts = [(left.unsqueeze(1) + right).flatten(0, 1) for left, right in pairs]
        whole: Tensor = parts[0]
        return whole


def _tagged(distances: Tensor, tags: Tensor) -> Tensor:
    """Distances [p, ...] whose lowest bits are the tags [p], as int32, which sorts them alike."""
    return distances.view(torch.int32) & ~_TAG | tags.view(-1, *[1] * (distances.ndim - 1))


def even_signs(values: Tensor, weights: Tensor) -> Tensor:
    """Which of eight values to store as negative, an even number of them: [..., 8, lanes] -> bool, the same shape.

    Where the number of negative values is odd, the one that loses least by it gets the other sign: the one whose
    weighted magnitude is the least, as far as all but its last TAG_BITS bits tell, and the first of equals.
    """
    negative = values < 0
    places = torch.arange(8, dtype=torch.int32, device=values.device)
    losses = _tagged((weights * values.abs()).movedim(-2, 0), places)
    cheapest = losses == losses.amin(0)
    odd = negative.sum(-2, keepdim=True) % 2 == 1
    return negative ^ (cheapest.movedim(0, -2) & odd)


def search_odd_multiples(
    values: Tensor,
    weights: Tensor,
    unit: Tensor,
    levels: list[tuple[float, ...]],
    spans: tuple[float, ...],
    largest: int,
    nearest: Callable[[Tensor], Choice],
) -> Scaled:
    """Step, multiples up to `largest` and points for blocks [s, n, lanes].

    `levels` lists the sets of levels, rising, that the points of a sub-block may be made of; `spans` the scales to
    choose points for before there is a step, relative to the best for values by themselves, if any; `nearest` chooses
    the points for values that are divided by their scale.
    """

    def fit_of(levels: Tensor) -> Fit:
        weighted = weights * levels
        return Fit(ordered_sum(weighted * levels), ordered_sum(weighted * values))

    def starts() -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        peak = values.abs().amax(-2)
        for relative in PEAKS:
            for rising in levels:
                scaled = values * spread(reciprocal(peak * (1 / (relative * rising[-1]))))
                choices = torch.tensor(rising, device=values.device)
                middles = (choices[1:] + choices[:-1]) * 0.5
                fit = fit_of(choices[torch.bucketize(scaled, middles)])
                yield fit.gain, *fit

    def choose(scale: Tensor) -> tuple[Fit, Tensor]:
        choice = nearest(values * spread(reciprocal(scale)))
        return fit_of(choice.levels), choice.codes

    def spanned(span: float) -> tuple[Tensor, Tensor, Tensor]:
        fit, _ = choose(first.scale * span)
        return fit.gain, *fit

    first = Fit(*best_of(starts())[1:])
    fit = Fit(*best_of(map(spanned, spans))[1:]) if spans else first
    widest = fit.scale.amax(0)

    def trial(relative: float) -> tuple[Tensor, Tensor, Tensor]:
        multiples = _nearest_odd(fit.scale, widest * (1 / (relative * largest)), largest)
        joint = fit.with_multiples(multiples)
        return joint.gain, joint.scale, multiples

    _, step, multiples = best_of(map(trial, STEPS))
    stored, codes = choose(half(step, unit) * multiples)
    multiples = _nearest_odd(stored.scale, step, largest)
    step = half(stored.with_multiples(multiples).scale, unit)
    multiples = _nearest_odd(stored.scale, step, largest)
    return Scaled(step, multiples, codes, stored.with_multiples(multiples).product)


def _nearest_odd(scale: Tensor, step: Tensor, largest: int) -> Tensor:
    """Odd multiples of the step from 1 to `largest`, as near to the scale as they come."""
    return ((scale * reciprocal(step) - 1) * 0.5).round().clamp(0, largest // 2) * 2 + 1
