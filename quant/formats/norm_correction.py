"""Lengthens what least squares has shortened: the closest point of a coarse grid is shorter than what it stands for.

With q the best approximation of x, q.x = q.q, so every product with a row comes out smaller by the share of x that
was lost. At 2 bits that is an eighth of the norm, the same way in every layer, and it costs more KL divergence than
the extra squared error of scales that keep q.x = x.x (benchmarks/quality.py). At 4 bits it is still half a per cent of
the norm, and as much of the divergence; at 6 there is nothing left to gain.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from .lanes import ordered_sum, reciprocal

_LARGEST: Final = 1.5  # a block that lost more than this is noise, and noise is not to be amplified
_SHARE: Final = 0.7  # of the way: the length lost falls in proportion, the squared error grows with the square


def lengthening(values: Tensor, weights: Tensor, kept: Tensor) -> Tensor:
    """What to multiply the steps of blocks with, so that their projections on their values become as long as those.

    values, weights: float32 [..., lanes]; kept: the weighted sums of value times stored value [lanes], in units of
    the values. Returns factors from 1 up, [lanes].
    """
    factor = ordered_sum((weights * values * values).flatten(0, -2)) * reciprocal(kept)
    return torch.where((factor > 1) & (factor <= _LARGEST), 1 + _SHARE * (factor - 1), 1.0)
