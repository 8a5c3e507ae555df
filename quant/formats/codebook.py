"""Formats whose codes index sixteen uneven levels: IQ4_NL, IQ4_XS, MXFP4 and NVFP4."""

from __future__ import annotations

from functools import reduce
from operator import add
from typing import Final

import torch
from torch import Tensor

from .lanes import (
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
    without_minima,
)
from .norm_correction import lengthening
from .scaled import Table, grid_of, search_multiples, search_scale

# The levels of llama.cpp's non-linear 4-bit types, for codes 0 to 15.
_NON_LINEAR: Final = Table(
    (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113),
    tuple(range(16)),
    peaks=(-127, 119, -143, -111, -135, 143, 111, -119),
)


class _Microfloat:
    """Levels of E2M1 of the OCP microscaling specification, doubled to whole numbers.

    Code 8, minus zero, is never written.
    """

    @staticmethod
    def nearest(values: Tensor) -> Tensor:
        magnitude = values.abs().clamp(max=12)
        # Added to this, a magnitude is rounded to a multiple of the distance between levels: 1 below 4, 2 below 8.
        whole = ((magnitude.view(torch.int32) & 0x7F800000).clamp(min=0x40000000) + (22 << 23)).view(torch.float32)
        return torch.copysign((magnitude + whole) - whole, values)

    @staticmethod
    def codes(values: Tensor) -> Tensor:
        """A code is the upper bits of a float, once magnitudes below 2 are brought between 1 and 2, where floats with a
        single bit of mantissa are two, as the levels below 2 are; so it takes no more than to round bits.
        """
        magnitude = values.abs()
        normal = torch.maximum(magnitude, magnitude * 0.5 + 1)
        codes = (normal.view(torch.int32) - 0x3F800000 + (1 << 21) >> 22).clamp(max=7)
        return torch.where((values < 0) & (codes > 0), codes + 8, codes).to(torch.uint8)

    @staticmethod
    def decoded(codes: Tensor) -> Tensor:
        """The levels that codes stand for, float32."""
        level = torch.tensor((0, 1, 2, 3, 4, 6, 8, 12), device=codes.device)[(codes & 7).long()]
        return torch.where(codes > 7, -level, level).to(torch.float32)


_E2M1: Final = _Microfloat()


def _encode_iq4_nl(values: Tensor, unit: Tensor, weights: Tensor) -> Tensor:
    scale = search_scale(values, weights, unit, _NON_LINEAR)
    scaled = values * spread(reciprocal(scale))
    product = ordered_sum(weights * _NON_LINEAR.nearest(scaled) * values)
    scale = half(scale * lengthening(values, weights, product * scale), unit)
    return _with_codes_iq4_nl(half_to_bytes(scale, unit), _NON_LINEAR.codes(scaled))


def _with_codes_iq4_nl(data: Tensor, codes: Tensor) -> Tensor:
    return torch.cat([data[:2], pack_halves(codes)])


def _decode_iq4_nl(data: Tensor) -> Tensor:
    return block_scale(data) * _NON_LINEAR.decoded(unpack(data[2:], 4).flatten(0, 1))


def _encode_iq4_xs(values: Tensor, unit: Tensor, weights: Tensor) -> Tensor:
    values, weights = values.unflatten(0, (8, 32)), weights.unflatten(0, (8, 32))
    step, multiples = search_multiples(values, weights, unit, _NON_LINEAR, -32, 31)
    scaled = values * spread(reciprocal(step * multiples))
    product = ordered_sum(ordered_sum(weights * _NON_LINEAR.nearest(scaled) * values) * multiples)
    step = half(step * lengthening(values, weights, product * step), unit)
    scales = (multiples + 32).to(torch.uint8)
    high = pack((scales >> 4).unflatten(0, (2, 4, 1)), 2).flatten(0, 1)
    low = pack((scales & 15).unflatten(0, (4, 2, 1)), 4).flatten(0, 1)
    return _with_codes_iq4_xs(torch.cat([half_to_bytes(step, unit), high, low]), _NON_LINEAR.codes(scaled))


def _with_codes_iq4_xs(data: Tensor, codes: Tensor) -> Tensor:
    return torch.cat([data[:8], pack(codes.view(8, 2, 16, -1), 4).flatten(0, 1)])


def _decode_iq4_xs(data: Tensor) -> Tensor:
    levels = _NON_LINEAR.decoded(unpack(data[8:].unflatten(0, (8, 16)), 4).flatten(1, 2))
    return (spread(_scales_iq4_xs(data)) * levels).flatten(0, 1)


def _scales_iq4_xs(data: Tensor) -> Tensor:
    step, high, low = data[:8].split([2, 2, 4])
    scales = unpack(low.unsqueeze(1), 4).flatten(0, 2) | unpack(high.unsqueeze(1), 2).flatten(0, 2) << 4
    return half_from_bytes(step) * (scales.to(torch.float32) - 32)


def _encode_mxfp4(values: Tensor, unit: Tensor, weights: Tensor) -> Tensor:
    """The exponent that puts the peak between 7 and 14, or one more if that is better."""
    exponent = (_mxfp4_exponent(values, unit, 7) - 1).clamp(min=1)
    costs = weights * _mxfp4_cost((values * spread(_mxfp4_inverse(exponent, unit) * 0.5)).abs())
    above = ordered_sum(reduce(add, costs.unflatten(0, (4, 8)))) > 0  # summed in the order that suits the kernels
    return _mxfp4_bytes(values, unit, exponent + above.int())


def _mxfp4_cost(magnitude: Tensor) -> Tensor:
    """How much larger the squared error of a magnitude, divided by its scale, is than with the doubled scale.

    Below 2 the doubled scale has every other level only; from 2 to 6 both have the same levels; above 6 it alone has
    any, 8 and 12. Between levels and middles the difference is linear; above 6 a parabola comes close to it.
    """
    excess = magnitude.clamp(min=6.25) - 6.25
    return excess * excess - (0.25 - ((magnitude - 1).abs() - 0.5).abs()).clamp(min=0)


def _encode_mxfp4_alike(values: Tensor, unit: Tensor, weights: Tensor) -> Tensor:
    return _mxfp4_bytes(values, unit, _mxfp4_exponent(values, unit, 7.25))


def _mxfp4_exponent(values: Tensor, unit: Tensor, most: float) -> Tensor:
    """The exponent that puts the peak between 4 and 8, or one more if it is then above `most`, from 4 to 8.

    Where all weigh alike, 7.25 is best. Exponent 0, a subnormal scale, is not used.
    """
    above = values.abs().amax(0) > most / 4
    return ((unit.view(torch.int32) >> 23) - 2 + above.int()).clamp(min=1)


def _mxfp4_bytes(values: Tensor, unit: Tensor, exponent: Tensor) -> Tensor:
    codes = _E2M1.codes(values * spread(_mxfp4_inverse(exponent, unit)))
    return torch.cat([exponent.unsqueeze(0).to(torch.uint8), pack_halves(codes)])


def _mxfp4_inverse(exponent: Tensor, unit: Tensor) -> Tensor:
    """1 over what a doubled level is worth under an exponent, in units: 2 ** (128 - exponent) times the unit."""
    return (255 - exponent + (unit.view(torch.int32) >> 23) - 127 << 23).view(torch.float32)


def _decode_mxfp4(data: Tensor) -> Tensor:
    exponent = data[0].to(torch.int32)  # of the scale of undoubled levels; 2 ** -128 and 2 ** -127 are subnormal
    scale = torch.where(exponent < 2, 0x00200000 << exponent.clamp(max=1), exponent - 1 << 23).view(torch.float32)
    return scale * _E2M1.decoded(unpack(data[1:], 4).flatten(0, 1))


# The float8 scales to try, relative to the one that puts the peak at the top level: 8 apart, they differ by half.
_NVFP4_STEPS: Final = (0, 4, 1, 3, -1, 5, 2, -2, 6, -3, 7)


def _encode_nvfp4(values: Tensor, unit: Tensor, weights: Tensor) -> Tensor:
    """The scales are absolute: magnitudes above 2688 saturate, and those below 2^-11 vanish."""
    values, weights = values.unflatten(0, (4, 16)), weights.unflatten(0, (4, 16))
    spanning = (values.abs().amax(1) * (1 / 6) * unit).clamp(max=448.0)
    normal = (spanning.view(torch.int32) >> 20) - (120 << 3)
    first = torch.where(spanning < 2.0**-6, (spanning * 2.0**9).to(torch.int32), normal)

    def trial(step: int) -> tuple[Tensor, Tensor]:
        code = (first + step).clamp(1, 126)
        scale = _nvfp4_scale(code)
        miss = _E2M1.nearest(values * spread(unit * (1 / scale))) * spread(scale * (1 / unit)) - values
        return -ordered_sum(weights * miss * miss), code

    _, code = best_of(map(trial, _NVFP4_STEPS))
    codes = _E2M1.codes(values * spread(unit * (1 / _nvfp4_scale(code))))
    return torch.cat([code.to(torch.uint8), pack(codes.unflatten(1, (2, 8)), 4).flatten(0, 1)])


def _decode_nvfp4(data: Tensor) -> Tensor:
    scales, codes = data.split([4, 32])
    scale = _nvfp4_scale(scales.to(torch.int32))
    return (spread(scale) * _E2M1.decoded(unpack(codes.unflatten(0, (4, 8)), 4).flatten(1, 2))).flatten(0, 1)


def _nvfp4_scale(code: Tensor) -> Tensor:
    """What a doubled level is worth under a scale in E4M3 without a sign: int32 -> float32."""
    exponent, mantissa = code >> 3 & 15, code & 7
    scale = torch.where(exponent > 0, (exponent + 120 << 23 | mantissa << 20).view(torch.float32), mantissa * 2.0**-9)
    return torch.where(code == 127, 0.0, scale * 0.5)  # 127 would be E4M3's NaN


CODECS: Final = {
    "IQ4_NL": Codec(
        _decode_iq4_nl, _encode_iq4_nl, grid=grid_of(_NON_LINEAR, without_minima(block_scale), _with_codes_iq4_nl)
    ),
    "IQ4_XS": Codec(
        _decode_iq4_xs, _encode_iq4_xs, grid=grid_of(_NON_LINEAR, without_minima(_scales_iq4_xs), _with_codes_iq4_xs)
    ),
    "MXFP4": Codec(_decode_mxfp4, _encode_mxfp4, _encode_mxfp4_alike),
    "NVFP4": Codec(_decode_nvfp4, _encode_nvfp4),
}
