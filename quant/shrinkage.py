"""Least squares shrinks: the closest point of a coarse grid is shorter than the weights it stands for.

With q the best approximation of x, q.x = q.q, so every product with a row comes out smaller by the share of x that
was lost. At 2 bits that is an eighth of the norm, the same way in every layer, and it costs more KL divergence than
the extra squared error of scales that keep q.x = x.x (benchmarks/quality.py). Above 4 bits it makes no difference.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from .formats import Format

# Where a block of these types holds its float16 factors.
FACTORS: Final = {
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "IQ2_XXS": (0,),
    "IQ2_XS": (0,),
    "IQ2_S": (0,),
    "IQ3_XXS": (0,),
    "IQ3_S": (0,),
}
_LARGEST_FACTOR: Final = 1.5  # a block that lost more than this is noise, and noise is not to be amplified
_SHARE: Final = 0.7  # of the way: the length lost falls in proportion, the squared error grows with the square
_HALF: Final = torch.finfo(torch.float16)


def restore_length(values: Tensor, decoded: Tensor, weights: Tensor | None, data: Tensor, format: Format) -> None:
    """Scale every block so that its projection on the weights it stands for is as long as they are, in place.

    values, decoded: float32 [rows, columns]; weights: [columns] or None; data: uint8 [rows, row bytes].
    """
    size = format.block_size
    original, stored = values.reshape(-1, size), decoded.reshape(-1, size)
    unit = original.abs().amax(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    original, stored = original / unit, stored / unit  # squares of the largest float32 are out of reach
    pull = original if weights is None else original * weights.expand_as(values).reshape(-1, size)
    factor = ((pull * original).sum(dim=1) / (pull * stored).sum(dim=1)).nan_to_num(nan=1.0)
    factor = torch.where((factor > 1) & (factor <= _LARGEST_FACTOR), factor**_SHARE, 1.0)
    blocks = data.view(-1, format.block_bytes)
    for offset in FACTORS[format.name]:
        field = blocks[:, offset : offset + 2]
        scaled = field.contiguous().view(torch.float16).flatten().float() * factor
        field.copy_(scaled.clamp(_HALF.min, _HALF.max).to(torch.float16).view(-1, 1).view(torch.uint8))
