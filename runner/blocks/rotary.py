"""Rotary embeddings."""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

from ...archs.graph import Rope, Yarn


def rotate(states: Tensor, rope: Rope, positions: Tensor, divisors: Tensor | None = None) -> Tensor:
    """Rotates [..., tokens, head size] by `positions` [tokens], in float32; by their negatives it rotates back.

    divisors: the numbers of those of the rope, where it has any.
    """
    angles = positions[:, None] * frequencies(rope).to(positions.device)
    angles = angles if divisors is None else angles / divisors
    cosine, sine = angles.cos(), angles.sin()  # [tokens, size / 2]
    start = states.shape[-1] - rope.size if rope.last else 0
    before, turning, after = states.split((start, rope.size, states.shape[-1] - start - rope.size), dim=-1)
    turning = turning * rope.yarn.magnitude if rope.yarn else turning
    first, second = turning.unflatten(-1, (-1, 2)).unbind(-1) if rope.interleaved else turning.chunk(2, dim=-1)
    turned = (first * cosine - second * sine, second * cosine + first * sine)
    joined = torch.stack(turned, dim=-1).flatten(-2) if rope.interleaved else torch.cat(turned, dim=-1)
    return torch.cat((before, joined, after), dim=-1)


@cache
def frequencies(rope: Rope) -> Tensor:
    """base^(-2i/size), slowed where YaRN says so: radians per position, [size / 2], made on the CPU."""
    frequencies = 1.0 / rope.base ** (torch.arange(0, rope.size, 2, dtype=torch.float32, device="cpu") / rope.size)
    if rope.yarn is None:
        return frequencies
    slowed = _slowed(rope, rope.yarn)
    return frequencies / rope.yarn.factor * slowed + frequencies * (1 - slowed)


def _slowed(rope: Rope, yarn: Yarn) -> Tensor:
    """How much each pair is slowed, from 0 to 1: a ramp between the pairs that turn `fast` and `slow` times."""

    def pair_turning(times: float) -> float:
        wavelength = yarn.original_context / times
        return rope.size * math.log(wavelength / (2 * math.pi)) / (2 * math.log(rope.base))

    first, last = pair_turning(yarn.fast), pair_turning(yarn.slow)
    if yarn.rounded:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, rope.size - 1)
    pairs = torch.arange(rope.size // 2, dtype=torch.float32, device="cpu")
    return ((pairs - first) / max(last - first, 1e-3)).clamp(0, 1)
