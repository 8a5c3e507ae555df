"""The arithmetic and the bit packing that every quantizer is written in.

Blocks lie side by side along the last dimension, one to a lane, and their values along the dimensions before it:
256-value blocks with sub-blocks of 32 are a tensor [8, 32, lanes], their bytes a uint8 tensor [block_bytes, lanes].
Every lane does the same work without looking at another, so one search fits torch on any device and the SIMD
registers of a CPU.

Results are the same bits everywhere, because only operations are used that IEEE 754 defines to the last bit:
float32, no fused multiply-add, rounding half to even, and sums in the one order that `ordered_sum` fixes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import reduce
from typing import Final, NamedTuple

import torch
from torch import Tensor

LARGEST_HALF: Final = 65504.0
SMALLEST_HALF: Final = 2.0**-24
REFINEMENTS: Final = 1  # rounds in which stored scales and codes adapt to each other
TINY: Final = 2.0**-116  # smaller numbers count as zero, so that no reciprocal overflows


@dataclass(frozen=True)
class Grid:
    """What a format's blocks can hold once their scales are chosen: ``scale * level - minimum``.

    scales: uint8 [block_bytes, lanes] -> scales and minima, float32 [s, lanes] both, each for its share of consecutive
    values.
    nearest: values divided by their scale [group, lanes] and their weights [group] -> the nearest levels, float32.
    with_levels: the bytes, with other levels [block_size, lanes] for the same scales.
    group: how many consecutive values choose their levels together.
    """

    scales: Callable[[Tensor], tuple[Tensor, Tensor]]
    nearest: Callable[[Tensor, Tensor], Tensor]
    with_levels: Callable[[Tensor, Tensor], Tensor]
    group: int = 1


class Coupling(NamedTuple):
    """How the errors of a block's values cost together, for `Kernels.choose`, in each of several matrices of a model.

    float32 [matrices, block_size, block_size] with a row for each value that is reached, the others [matrices,
    block_size]. Where values choose levels in groups, "before" and "after" are of groups.
    """

    search_weights: Tensor | None  # of values in the search for scales; None: all alike
    carried: Tensor  # what errors of values before change in what is wanted
    slopes: Tensor  # what differences from what was wanted in turn make of the slopes of values before
    metric: Tensor  # what changes make of all slopes, which are halves of how the squared error changes
    first_weights: Tensor  # of values chosen in turn
    weights: Tensor  # of values given all others: the diagonal of the metric

    def of(self, matrix: int) -> Coupling:
        """That of one matrix."""
        return Coupling(*(None if part is None else part[matrix] for part in self))  # type: ignore[arg-type]


@dataclass(frozen=True)
class Codec:
    """How one format turns lanes into bytes and back.

    decode: uint8 [block_bytes, lanes] -> float32 [block_size, lanes].
    encode: float32 values [block_size, lanes], the unit [lanes] that they were divided by (see `unit_of`) and their
    weights [block_size, lanes] -> uint8 [block_bytes, lanes]. It minimizes sum(weight * (value - decoded value)²).
    encode_unweighted: serves in its place where all weights are 1, if that allows a shorter search.
    grid: what its blocks can hold, where that is scales and levels.
    """

    decode: Callable[[Tensor], Tensor]
    encode: Callable[[Tensor, Tensor, Tensor], Tensor]
    encode_unweighted: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None
    grid: Grid | None = None


def ordered_sum(terms: Tensor) -> Tensor:
    """Sum over the last dimension but one, whose length is a multiple of 8: [..., n, lanes] -> [..., lanes].

    Each run of eight is added pairwise, ((0+1)+(2+3))+((4+5)+(6+7)), then the runs one after another.
    """
    runs: Tensor = terms.unflatten(-2, (-1, 8))
    while runs.shape[-2] > 1:
        runs = runs[..., 0::2, :] + runs[..., 1::2, :]
    total = runs[..., 0, 0, :]
    for run in range(1, runs.shape[-3]):
        total = total + runs[..., run, 0, :]
    return total


def reciprocal(value: Tensor) -> Tensor:
    """1 / value, and 0 where the value is too small for it."""
    usable = value.abs() > TINY
    return torch.where(usable, 1 / torch.where(usable, value, 1.0), 0.0)


def best_of(trials: Iterable[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """The trial with the largest first member, lane by lane; the first of equals. Members broadcast against it."""
    return reduce(_better_of, trials)


def _better_of(old: tuple[Tensor, ...], new: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    better = new[0] > old[0]
    return tuple(torch.where(better, new_part, old_part) for new_part, old_part in zip(new, old, strict=True))


def spread(value: Tensor) -> Tensor:
    """One number for each sub-block, [..., lanes], ready to meet that sub-block's values [..., n, lanes]."""
    return value.unsqueeze(-2)


def unit_of(values: Tensor) -> Tensor:
    """A power of two near each lane's largest magnitude: [n, lanes] -> [lanes].

    Divided by it, which is exact, any block lies within (-4, 4), so that squares neither overflow nor vanish.
    """
    largest = values.abs().amax(0)
    return (largest.view(torch.int32) & 0x7F800000).view(torch.float32).clamp(2.0**-126, 2.0**126)


def half(value: Tensor, unit: Tensor) -> Tensor:
    """The nearest float16 to value * unit, again divided by the unit.

    Magnitudes beyond float16 become its largest, and those below its smallest: a scale of 0 would lose the block.
    """
    magnitude = (value * unit).abs().clamp(SMALLEST_HALF, LARGEST_HALF).to(torch.float16).to(torch.float32)
    return torch.sign(value) * magnitude * (1 / unit)


def half_to_bytes(value: Tensor, unit: Tensor) -> Tensor:
    """The two bytes of a result of `half`, [lanes] -> [2, lanes]."""
    bits = (value * unit).to(torch.float16).view(torch.int16).to(torch.int32)
    return torch.stack([bits & 0xFF, bits >> 8 & 0xFF]).to(torch.uint8)


def block_scale(data: Tensor) -> Tensor:
    """The one scale of a block that begins with it: uint8 [block_bytes, lanes] -> float32 [1, lanes]."""
    return half_from_bytes(data[:2])[None]


def without_minima(scales: Callable[[Tensor], Tensor]) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """What `Grid.scales` is where all minima are zero."""

    def with_zeros(data: Tensor) -> tuple[Tensor, Tensor]:
        found = scales(data)
        return found, torch.zeros_like(found)

    return with_zeros


def half_from_bytes(data: Tensor) -> Tensor:
    """float16 in two bytes to float32, [2, lanes] -> [lanes]."""
    return from_bytes(data, 2)[0].to(torch.int16).view(torch.float16).to(torch.float32)


def from_bytes(data: Tensor, count: int) -> Tensor:
    """Little-endian unsigned numbers of `count` bytes, at most 4: uint8 [n * count, lanes] -> int64 [n, lanes]."""
    parts: Tensor = data.unflatten(0, (-1, count)).to(torch.int64)
    numbers = parts[:, 0]
    for place in range(1, count):
        numbers = numbers | parts[:, place] << 8 * place
    return numbers


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes of `bits` bits into bytes, the first in the lowest bits: [..., 8 / bits, n, lanes] -> [..., n, lanes]."""
    codes = codes.to(torch.uint8)
    packed = codes[..., 0, :, :]
    for place in range(1, 8 // bits):
        packed = packed | codes[..., place, :, :] << bits * place
    return packed


def pack_halves(codes: Tensor) -> Tensor:
    """Four-bit codes of 32 values, those of the first half in the lower bits: [32, lanes] -> [16, lanes]."""
    return pack(codes.unflatten(0, (2, 16)), 4)


def unpack(data: Tensor, bits: int) -> Tensor:
    """The inverse of `pack`: uint8 [..., n, lanes] -> uint8 [..., 8 / bits, n, lanes]."""
    return torch.stack([data >> place & (1 << bits) - 1 for place in range(0, 8, bits)], dim=-3)
