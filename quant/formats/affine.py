"""Formats that store ``scale * code - minimum``: Q4_1, Q5_1, Q2_K, Q4_K and Q5_K.

Each sub-block tries a few ranges for its codes, each a little inside or outside the range of its values; the one
whose codes leave the least weighted error after least squares stays. Then scales and codes refine each other: least
squares given the codes, rounding to what the format can store, nearest codes given the stored scales.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import torch
from torch import Tensor

from .lanes import (
    REFINEMENTS,
    Codec,
    best_of,
    block_scale,
    half,
    half_from_bytes,
    half_to_bytes,
    ordered_sum,
    pack,
    pack_halves,
    reciprocal,
    spread,
    unpack,
)
from .norm_correction import lengthening
from .scaled import Uniform, grid_of
from .symmetric import pack_5_bits, unpack_5_bits

SINGULAR: Final = 1e-6  # a determinant this small, relative to its terms, has lost its digits

# Ranges to try: by how many levels the lowest and the highest value lie outside the codes (negative: inside). Chosen
# greedily, in the order in which a range lowers the error of many synthetic blocks most.
STARTS: Final = (
    (0.3, 0.3), (0.6, 0.0), (0.0, 0.6), (-0.9, 0.0), (0.0, 0.0), (-0.9, -0.9),
    (-0.2, 0.9), (1.3, 0.3), (-0.2, -0.9), (0.3, 0.0), (0.0, 0.3), (0.6, 0.9),
)  # fmt: skip

# Steps to try for the scales and the minima of a super-block, relative to those that just span them.
STEPS: Final = ((1.0, 1.0), (1.05, 1.0), (1.0, 1.05))


class Fit(NamedTuple):
    """Weighted sums over products of codes a, offsets b and values x, for ``x ≈ scale * a - minimum * b``.

    All that the best scale and minimum for given codes depend on. In a sub-block b is 1; for a whole super-block a
    and b carry the multiples of the sub-blocks, and scale and minimum are its two steps.
    """

    aa: Tensor
    ab: Tensor
    bb: Tensor
    ax: Tensor
    bx: Tensor

    def gain(self, scale: Tensor, minimum: Tensor) -> Tensor:
        """What scale and minimum take off the weighted sum of squares."""
        linear = scale * self.ax - minimum * self.bx
        square = scale * scale * self.aa - 2 * (scale * minimum * self.ab) + minimum * minimum * self.bb
        return 2 * linear - square

    def solve(self, scale: Tensor, minimum: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
        """Least squares; where it has no solution the arguments stay. The minimum is at least 0 unless signed."""
        both = self.aa * self.bb
        determinant = both - self.ab * self.ab
        regular = determinant > SINGULAR * both
        inverse = reciprocal(determinant)
        new_scale = (self.ax * self.bb - self.ab * self.bx) * inverse
        new_minimum = (self.ab * self.ax - self.aa * self.bx) * inverse
        if not signed:
            below = new_minimum < 0
            new_scale = torch.where(below, self.ax * reciprocal(self.aa), new_scale)
            new_minimum = torch.where(below, 0.0, new_minimum)
        return torch.where(regular, new_scale, scale), torch.where(regular, new_minimum, minimum)

    def with_multiples(self, scales: Tensor, minima: Tensor) -> Fit:
        """The fit of a super-block's two steps, given the multiples of its sub-blocks: [s, lanes] -> [lanes]."""
        return Fit(
            ordered_sum(self.aa * scales * scales),
            ordered_sum(self.ab * scales * minima),
            ordered_sum(self.bb * minima * minima),
            ordered_sum(self.ax * scales),
            ordered_sum(self.bx * minima),
        )


class Block:
    """Sub-blocks of values [..., n, lanes], to be stored with codes from 0 to `top`.

    Scales and minima are [..., lanes]. A minimum is at least 0 unless `signed`.
    """

    def __init__(self, values: Tensor, weights: Tensor, top: int, signed: bool) -> None:
        self.values, self.weights, self.top, self.signed = values, weights, top, signed
        self.weight_sum = ordered_sum(weights)
        self.value_sum = ordered_sum(weights * values)

    def codes(self, scale: Tensor, minimum: Tensor) -> Tensor:
        """The nearest codes, float32."""
        return ((self.values + spread(minimum)) * spread(reciprocal(scale))).round().clamp(0, self.top)

    def fit(self, scale: Tensor, minimum: Tensor) -> Fit:
        """The sums for the nearest codes."""
        codes = self.codes(scale, minimum)
        weighted = self.weights * codes
        return Fit(
            aa=ordered_sum(weighted * codes),
            ab=ordered_sum(weighted),
            bb=self.weight_sum,
            ax=ordered_sum(weighted * self.values),
            bx=self.value_sum,
        )

    def best_start(self) -> tuple[Fit, Tensor, Tensor]:
        """The sums, scale and minimum that the best of STARTS leads to."""
        lowest, highest = self.values.amin(-2), self.values.amax(-2)
        if not self.signed:
            lowest = lowest.clamp(max=0)

        def trial(start: tuple[float, float]) -> tuple[Tensor, ...]:
            below, above = start
            scale = (highest - lowest) * (1 / (self.top + below + above))
            minimum = -lowest - scale * below
            if not self.signed:
                minimum = minimum.clamp(min=0)
            fit = self.fit(scale, minimum)
            scale, minimum = fit.solve(scale, minimum, self.signed)
            return fit.gain(scale, minimum), scale, minimum, *fit

        _, scale, minimum, *sums = best_of(map(trial, STARTS))
        return Fit(*sums), scale, minimum


def search_scale_and_minimum(block: Block, unit: Tensor) -> tuple[Tensor, Tensor]:
    """float16 scales and minima for blocks without sub-blocks, divided by the unit: two tensors [lanes]."""
    _, scale, minimum = block.best_start()
    for _ in range(REFINEMENTS):
        scale, minimum = half(scale, unit), half(minimum, unit)
        scale, minimum = block.fit(scale, minimum).solve(scale, minimum, block.signed)
    return half(scale, unit), half(minimum, unit)


def search_multiples(block: Block, unit: Tensor, largest: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Scales and minima for super-blocks, whole multiples up to `largest` of two float16 steps.

    Returns the steps of scales and minima [lanes], divided by the unit, and their multiples [s, lanes].
    """
    fit, scale, minimum = block.best_start()
    widest, deepest = scale.amax(0), minimum.amax(0)

    def trial(steps: tuple[float, float]) -> tuple[Tensor, ...]:
        scale_step, minimum_step = widest * (steps[0] / largest), deepest * (steps[1] / largest)
        multiples = _nearest_multiples(fit, scale, scale_step, minimum_step, largest)
        joint = fit.with_multiples(*multiples)
        scale_step, minimum_step = joint.solve(scale_step, minimum_step, signed=False)
        return joint.gain(scale_step, minimum_step), scale_step, minimum_step, *multiples

    _, scale_step, minimum_step, scales, minima = best_of(map(trial, STEPS))
    for _ in range(REFINEMENTS):
        scale_step, minimum_step = half(scale_step, unit), half(minimum_step, unit)
        scale, minimum = scale_step * scales, minimum_step * minima
        fit = block.fit(scale, minimum)
        scale, _ = fit.solve(scale, minimum, signed=False)
        scales, minima = _nearest_multiples(fit, scale, scale_step, minimum_step, largest)
        scale_step, minimum_step = fit.with_multiples(scales, minima).solve(scale_step, minimum_step, signed=False)
    return half(scale_step, unit), half(minimum_step, unit), scales, minima


def _nearest_multiples(
    fit: Fit, scale: Tensor, scale_step: Tensor, minimum_step: Tensor, largest: int
) -> tuple[Tensor, Tensor]:
    """Multiples of the steps for each sub-block: the scale rounded down or up, with the minimum that suits it best.

    A scale is never 0: a sub-block far narrower than its neighbours is better off with few codes than with one.
    """
    below = (scale * reciprocal(scale_step)).floor()

    def trial(multiple: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        scales = multiple.clamp(1, largest)
        stored = scales * scale_step
        minimum = (fit.ab * stored - fit.bx) * reciprocal(fit.bb)
        minima = (minimum * reciprocal(minimum_step)).round().clamp(0, largest)
        return fit.gain(stored, minima * minimum_step), scales, minima

    _, scales, minima = best_of(map(trial, (below, below + 1)))
    return scales, minima


def _encode_4_1(values: Tensor, unit: Tensor, weights: Tensor) -> Tensor:
    return _with_codes_4_1(*_block_codes(values, unit, weights, 15))


def _with_codes_4_1(data: Tensor, codes: Tensor) -> Tensor:
    return torch.cat([data[:4], pack_halves(codes)])


def _encode_5_1(values: Tensor, unit: Tensor, weights: Tensor) -> Tensor:
    return _with_codes_5_1(*_block_codes(values, unit, weights, 31))


def _with_codes_5_1(data: Tensor, codes: Tensor) -> Tensor:
    return torch.cat([data[:4], pack_5_bits(codes)])


def _block_codes(values: Tensor, unit: Tensor, weights: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """The bytes of scale and offset [4, lanes] and the codes [32, lanes]."""
    block = Block(values, weights, top, signed=True)
    scale, minimum = search_scale_and_minimum(block, unit)
    scales = torch.cat([half_to_bytes(scale, unit), half_to_bytes(-minimum, unit)])
    return scales, block.codes(scale, minimum).to(torch.uint8)


def _decode_4_1(data: Tensor) -> Tensor:
    return _from_codes(*_block_scales(data), unpack(data[4:], 4).flatten(0, 1))


def _decode_5_1(data: Tensor) -> Tensor:
    return _from_codes(*_block_scales(data), unpack_5_bits(data[4:]))


def _block_scales(data: Tensor) -> tuple[Tensor, Tensor]:
    return block_scale(data), -block_scale(data[2:])


def _encode_2_k(values: Tensor, unit: Tensor, weights: Tensor) -> Tensor:
    steps, scales, minima, codes = _super_block_codes(values, unit, weights, 16, 3, 15)
    return _join_2_k(scales | minima << 4, codes, steps)


def _join_2_k(multiples: Tensor, codes: Tensor, steps: Tensor) -> Tensor:
    return torch.cat([multiples, pack(codes.reshape(2, 4, 32, -1), 2).flatten(0, 1), steps])


def _with_codes_2_k(data: Tensor, codes: Tensor) -> Tensor:
    return _join_2_k(data[:16], codes, data[80:])


def _encode_4_k(values: Tensor, unit: Tensor, weights: Tensor) -> Tensor:
    steps, scales, minima, codes = _super_block_codes(values, unit, weights, 8, 15, 63)
    return _with_codes_4_k(torch.cat([steps, _pack_6_bits(scales, minima)]), codes)


def _with_codes_4_k(data: Tensor, codes: Tensor) -> Tensor:
    return torch.cat([data[:16], _pack_pairs(codes)])


def _encode_5_k(values: Tensor, unit: Tensor, weights: Tensor) -> Tensor:
    steps, scales, minima, codes = _super_block_codes(values, unit, weights, 8, 31, 63)
    return _with_codes_5_k(torch.cat([steps, _pack_6_bits(scales, minima)]), codes)


def _with_codes_5_k(data: Tensor, codes: Tensor) -> Tensor:
    codes = codes.view(8, 32, -1)
    return torch.cat([data[:16], pack(codes >> 4, 1), _pack_pairs(codes & 15)])


def _super_block_codes(
    values: Tensor, unit: Tensor, weights: Tensor, sub_blocks: int, top: int, largest: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The bytes of the two steps [4, lanes]; uint8 multiples [s, lanes], twice; codes [s, n, lanes]."""
    block = Block(values.unflatten(0, (sub_blocks, -1)), weights.unflatten(0, (sub_blocks, -1)), top, signed=False)
    scale_step, minimum_step, scales, minima = search_multiples(block, unit, largest)
    codes = block.codes(scale_step * scales, minimum_step * minima)
    products = ordered_sum(block.weights * codes * block.values) * (scale_step * scales)
    kept = ordered_sum(products - block.value_sum * (minimum_step * minima))
    factor = lengthening(block.values, block.weights, kept)
    steps = torch.cat([half_to_bytes(half(step * factor, unit), unit) for step in (scale_step, minimum_step)])
    return steps, scales.to(torch.uint8), minima.to(torch.uint8), codes.to(torch.uint8)


def _decode_2_k(data: Tensor) -> Tensor:
    return _from_codes(*_scales_2_k(data), unpack(data[16:80].unflatten(0, (2, 32)), 2).flatten(0, 2))


def _decode_4_k(data: Tensor) -> Tensor:
    return _from_codes(*_scales_k(data), _unpack_pairs(data[16:]).flatten(0, 1))


def _decode_5_k(data: Tensor) -> Tensor:
    codes = _unpack_pairs(data[48:]) | unpack(data[16:48], 1) << 4
    return _from_codes(*_scales_k(data), codes.flatten(0, 1))


def _scales_2_k(data: Tensor) -> tuple[Tensor, Tensor]:
    return _multiples(data[80:], data[:16] & 15, data[:16] >> 4)


def _scales_k(data: Tensor) -> tuple[Tensor, Tensor]:
    return _multiples(data[:4], *_unpack_6_bits(data[4:16]))


def _multiples(steps: Tensor, scales: Tensor, minima: Tensor) -> tuple[Tensor, Tensor]:
    """Bytes of the steps [4, lanes] times whole multiples [s, lanes]: scales and minima."""
    return half_from_bytes(steps[:2]) * scales.to(torch.float32), half_from_bytes(steps[2:]) * minima.to(torch.float32)


def _from_codes(scale: Tensor, minimum: Tensor, codes: Tensor) -> Tensor:
    """Scales and minima [s, lanes] and codes [n, lanes] to values [n, lanes]."""
    levels = codes.to(torch.float32).view(len(scale), -1, codes.shape[-1])
    return (spread(scale) * levels - spread(minimum)).flatten(0, 1)


def _pack_pairs(codes: Tensor) -> Tensor:
    """Four-bit codes of sub-blocks 2i and 2i + 1 side by side: [256, lanes] or [8, 32, lanes] -> [128, lanes]."""
    return pack(codes.view(4, 2, 32, -1), 4).flatten(0, 1)


def _unpack_pairs(data: Tensor) -> Tensor:
    return unpack(data.unflatten(0, (4, 32)), 4).flatten(0, 1)


def _pack_6_bits(scales: Tensor, minima: Tensor) -> Tensor:
    """8 scales and 8 minima of 6 bits in 12 bytes.

    Scales 0-3 and minima 0-3 fill the lower bits of a byte each, whose upper two are the upper bits of number + 4;
    the lower four bits of scales and minima 4-7 share the last four bytes.
    """
    first = torch.cat([scales[:4] | scales[4:] >> 4 << 6, minima[:4] | minima[4:] >> 4 << 6])
    return torch.cat([first, scales[4:] & 15 | (minima[4:] & 15) << 4])


def _unpack_6_bits(data: Tensor) -> tuple[Tensor, Tensor]:
    scales, minima, rest = data.split([4, 4, 4])
    return (
        torch.cat([scales & 63, rest & 15 | scales >> 6 << 4]),
        torch.cat([minima & 63, rest >> 4 | minima >> 6 << 4]),
    )


CODECS: Final = {
    "Q4_1": Codec(_decode_4_1, _encode_4_1, grid=grid_of(Uniform(0, 15), _block_scales, _with_codes_4_1)),
    "Q5_1": Codec(_decode_5_1, _encode_5_1, grid=grid_of(Uniform(0, 31), _block_scales, _with_codes_5_1)),
    "Q2_K": Codec(_decode_2_k, _encode_2_k, grid=grid_of(Uniform(0, 3), _scales_2_k, _with_codes_2_k)),
    "Q4_K": Codec(_decode_4_k, _encode_4_k, grid=grid_of(Uniform(0, 15), _scales_k, _with_codes_4_k)),
    "Q5_K": Codec(_decode_5_k, _encode_5_k, grid=grid_of(Uniform(0, 31), _scales_k, _with_codes_5_k)),
}
