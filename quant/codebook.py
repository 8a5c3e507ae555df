"""Formats whose codes index sixteen uneven levels: IQ4_NL, IQ4_XS, MXFP4 and NVFP4."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from .lanes import Codec, best_of, half_from_bytes, half_to_bytes, ordered_sum, pack, reciprocal, spread, unpack
from .scaled import Table, search_multiples, search_scale

# The levels of llama.cpp's non-linear 4-bit types, for codes 0 to 15.
_NON_LINEAR: Final = Table(
    (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113),
    tuple(range(16)),
    peaks=(-127, 119, -143, -111, -135, 143, 111, -119),
)
# E2M1 of the OCP microscaling specification, doubled to whole numbers; code 8, minus zero, is never written.
_E2M1: Final = Table(
    (-12, -8, -6, -4, -3, -2, -1, 0, 1, 2, 3, 4, 6, 8, 12), (15, 14, 13, 12, 11, 10, 9, 0, 1, 2, 3, 4, 5, 6, 7)
)


def _encode_iq4_nl(values: Tensor, unit: Tensor, weights: Tensor) -> Tensor:
    scale = search_scale(values, weights, unit, _NON_LINEAR)
    codes = _NON_LINEAR.codes(values * spread(reciprocal(scale)))
    return torch.cat([half_to_bytes(scale, unit), pack(codes.unflatten(0, (2, 16)), 4)])


def _decode_iq4_nl(data: Tensor) -> Tensor:
    return half_from_bytes(data[:2]) * _NON_LINEAR.decoded(unpack(data[2:], 4).flatten(0, 1))


def _encode_iq4_xs(values: Tensor, unit: Tensor, weights: Tensor) -> Tensor:
    values, weights = values.unflatten(0, (8, 32)), weights.unflatten(0, (8, 32))
    step, multiples = search_multiples(values, weights, unit, _NON_LINEAR, -32, 31)
    codes = _NON_LINEAR.codes(values * spread(reciprocal(step * multiples)))
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
    """Tries three shared exponents: the one that puts the peak between 4 and 8 (6 is the top), one less, one more."""
    peak = unit.view(torch.int32) >> 23

    def trial(shift: int) -> tuple[Tensor, Tensor]:
        exponent = (peak + shift).clamp(min=0)
        scale = spread(_mxfp4_scale(exponent - peak))
        miss = _E2M1.nearest(values * (1 / scale)) * scale - values
        return -ordered_sum(weights * miss * miss), exponent

    _, exponent = best_of(map(trial, (-2, -3, -1)))
    codes = _E2M1.codes(values * spread(1 / _mxfp4_scale(exponent - peak)))
    return torch.cat([exponent.unsqueeze(0).to(torch.uint8), pack(codes.unflatten(0, (2, 16)), 4)])


def _mxfp4_scale(exponent: Tensor) -> Tensor:
    """What a doubled level is worth under a shared exponent relative to the unit's: 2 ** (exponent - 1)."""
    return (exponent + 126 << 23).view(torch.float32)


def _decode_mxfp4(data: Tensor) -> Tensor:
    exponent = data[0].to(torch.int32)  # of the scale of undoubled levels; 2 ** -128 and 2 ** -127 are subnormal
    scale = torch.where(exponent < 2, 0x00200000 << exponent.clamp(max=1), exponent - 1 << 23).view(torch.float32)
    return scale * _E2M1.decoded(unpack(data[1:], 4).flatten(0, 1))


def _decode_nvfp4(data: Tensor) -> Tensor:
    scales, codes = data.split([4, 32])
    exponent, mantissa = scales.to(torch.int32) >> 3 & 15, scales.to(torch.int32) & 7
    scale = torch.where(exponent > 0, (exponent + 120 << 23 | mantissa << 20).view(torch.float32), mantissa * 2.0**-9)
    scale = torch.where(scales == 0x7F, 0.0, scale * 0.5)  # 0x7F would be E4M3's NaN; half, as the levels are doubled
    return (spread(scale) * _E2M1.decoded(unpack(codes.unflatten(0, (4, 8)), 4).flatten(1, 2))).flatten(0, 1)


CODECS: Final = {
    "IQ4_NL": Codec(_decode_iq4_nl, _encode_iq4_nl),
    "IQ4_XS": Codec(_decode_iq4_xs, _encode_iq4_xs),
    "MXFP4": Codec(_decode_mxfp4, _encode_mxfp4),
    "NVFP4": Codec(_decode_nvfp4),
}
