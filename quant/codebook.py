"""Formats whose codes index sixteen uneven levels: IQ4_NL, IQ4_XS, MXFP4 and NVFP4."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from .lanes import Codec, best_of, half, half_from_bytes, half_to_bytes, ordered_sum, pack, reciprocal, spread, unpack
from .scaled import Table, search_multiples, search_scale
from .shrinkage import lengthening

# The levels of llama.cpp's non-linear 4-bit types, for codes 0 to 15.
_NON_LINEAR: Final = Table(
    (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113),
    tuple(range(16)),
    peaks=(-127, 119, -143, -111, -135, 143, 111, -119),
)


class _Microfloat(Table):
    """Levels of E2M1 of the OCP microscaling specification, doubled to whole numbers.

    A tie goes to the even mantissa, as in IEEE 754. Code 8, minus zero, is never written.
    """

    def __init__(self) -> None:
        positive = ((1, 1), (2, 2), (3, 3), (4, 4), (6, 5), (8, 6), (12, 7))
        levels = [*((-level, code + 8) for level, code in reversed(positive)), (0, 0), *positive]
        super().__init__(tuple(level for level, _ in levels), tuple(code for _, code in levels))

    def nearest(self, values: Tensor) -> Tensor:
        magnitude = values.abs().clamp(max=12)
        # Added to this, a magnitude is rounded to a multiple of the distance between levels: 1 below 4, 2 below 8.
        whole = ((magnitude.view(torch.int32) & 0x7F800000).clamp(min=0x40000000) + (22 << 23)).view(torch.float32)
        return torch.copysign((magnitude + whole) - whole, values)

    def codes(self, values: Tensor) -> Tensor:
        return super().codes(self.nearest(values))


_E2M1: Final = _Microfloat()


def _encode_iq4_nl(values: Tensor, unit: Tensor, weights: Tensor) -> Tensor:
    scale = search_scale(values, weights, unit, _NON_LINEAR)
    scaled = values * spread(reciprocal(scale))
    product = ordered_sum(weights * _NON_LINEAR.nearest(scaled) * values)
    scale = half(scale * lengthening(values, weights, product * scale), unit)
    codes = _NON_LINEAR.codes(scaled)
    return torch.cat([half_to_bytes(scale, unit), pack(codes.unflatten(0, (2, 16)), 4)])


def _decode_iq4_nl(data: Tensor) -> Tensor:
    return half_from_bytes(data[:2]) * _NON_LINEAR.decoded(unpack(data[2:], 4).flatten(0, 1))


def _encode_iq4_xs(values: Tensor, unit: Tensor, weights: Tensor) -> Tensor:
    values, weights = values.unflatten(0, (8, 32)), weights.unflatten(0, (8, 32))
    step, multiples = search_multiples(values, weights, unit, _NON_LINEAR, -32, 31)
    scaled = values * spread(reciprocal(step * multiples))
    product = ordered_sum(ordered_sum(weights * _NON_LINEAR.nearest(scaled) * values) * multiples)
    step = half(step * lengthening(values, weights, product * step), unit)
    codes = _NON_LINEAR.codes(scaled)
    scales = (multiples + 32).to(torch.uint8)
    high = pack((scales >> 4).unflatten(0, (2, 4, 1)), 2).flatten(0, 1)
    low = pack((scales & 15).unflatten(0, (4, 2, 1)), 4).flatten(0, 1)
    return torch.cat([half_to_bytes(step, unit), high, low, pack(codes.unflatten(1, (2, 16)), 4).flatten(0, 1)])


def _decode_iq4_xs(data: Tensor) -> Tensor:
    step, high, low, codes = data.split([2, 2, 4, 128])
    scales = unpack(low.unsqueeze(1), 4).flatten(0, 2) | unpack(high.unsqueeze(1), 2).flatten(0, 2) << 4
    scale = half_from_bytes(step) * (scales.to(torch.float32) - 32)
    return (spread(scale) * _NON_LINEAR.decoded(unpack(codes.unflatten(0, (8, 16)), 4).flatten(1, 2))).flatten(0, 1)


def _encode_mxfp4(values: Tensor, unit: Tensor, weights: Tensor) -> Tensor:
    """Tries two shared exponents: the one that puts the peak between 4 and 8 (6 is the top), and one more where the
    peak is then above 6.5, else one less, which suits blocks whose peak has little weight.
    """
    peak = unit.view(torch.int32) >> 23

    def trial(shift: int | Tensor) -> tuple[Tensor, Tensor]:
        exponent = (peak + shift).clamp(min=0)
        scale = spread(_mxfp4_scale(exponent - peak))
        miss = _E2M1.nearest(values * (1 / scale)) * scale - values
        return -ordered_sum(weights * miss * miss), exponent

    other = torch.where(values.abs().amax(0) > 6.5 / 4, -1, -3).to(torch.int32)
    return _mxfp4_bytes(values, unit, best_of((trial(-2), trial(other)))[1])


def _encode_mxfp4_alike(values: Tensor, unit: Tensor, weights: Tensor) -> Tensor:
    """The exponent that puts the peak between 4 and 8 is the best up to 7.25, and one more beyond."""
    shift = torch.where(values.abs().amax(0) > 7.25 / 4, -1, -2).to(torch.int32)
    return _mxfp4_bytes(values, unit, ((unit.view(torch.int32) >> 23) + shift).clamp(min=0))


def _mxfp4_bytes(values: Tensor, unit: Tensor, exponent: Tensor) -> Tensor:
    scale = _mxfp4_scale(exponent - (unit.view(torch.int32) >> 23))
    codes = _E2M1.codes(values * spread(1 / scale))
    return torch.cat([exponent.unsqueeze(0).to(torch.uint8), pack(codes.unflatten(0, (2, 16)), 4)])


def _mxfp4_scale(exponent: Tensor) -> Tensor:
    """What a doubled level is worth under a shared exponent relative to the unit's: 2 ** (exponent - 1)."""
    return (exponent + 126 << 23).view(torch.float32)


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
    "IQ4_NL": Codec(_decode_iq4_nl, _encode_iq4_nl),
    "IQ4_XS": Codec(_decode_iq4_xs, _encode_iq4_xs),
    "MXFP4": Codec(_decode_mxfp4, _encode_mxfp4, _encode_mxfp4_alike),
    "NVFP4": Codec(_decode_nvfp4, _encode_nvfp4),
}
