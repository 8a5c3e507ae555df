"""Formats with whole-number levels around zero: Q8_0, Q5_0, Q4_0, Q6_K and Q3_K."""

from __future__ import annotations

from functools import partial
from typing import Final

import torch
from torch import Tensor

from .lanes import (
    Codec,
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
from .scaled import Uniform, grid_of, search_multiples, search_scale

_LEVELS_8_0: Final = Uniform(-127, 127)
_LEVELS_5_0: Final = Uniform(-16, 15)
_LEVELS_4_0: Final = Uniform(-8, 7, peaks=(-8.5, -9.5, -7.25, -8.0))
_LEVELS_6_K: Final = Uniform(-32, 31)
_LEVELS_3_K: Final = Uniform(-4, 3, peaks=(-4.4, -5.6, -3.8, -3.2, -7.0))
_LEVELS_3_K_ALIKE: Final = Uniform(-4, 3, peaks=(-4.2,), quick=True)  # a long search gains next to nothing


def _block_codes(values: Tensor, weights: Tensor, unit: Tensor, levels: Uniform) -> tuple[Tensor, Tensor]:
    """The bytes of the scale [2, lanes] and the codes [32, lanes]."""
    scale = search_scale(values, weights, unit, levels)
    codes = levels.codes(values * spread(reciprocal(scale)))
    product = ordered_sum(weights * (codes.to(torch.float32) + levels.lowest) * values)
    scale = half(scale * lengthening(values, weights, product * scale), unit)
    return half_to_bytes(scale, unit), codes


def _encode_8_0(values: Tensor, unit: Tensor, weights: Tensor) -> Tensor:
    """Without a search: the error is too small for one to matter, and files too large for one not to."""
    scale = half(values.abs().amax(0) / 127, unit)
    codes = _LEVELS_8_0.codes(values * spread(reciprocal(scale)))
    return torch.cat([half_to_bytes(scale, unit), codes - 127])  # uint8 wraps to two's complement


def _decode_8_0(data: Tensor) -> Tensor:
    return data[2:].view(torch.int8).to(torch.float32) * half_from_bytes(data[:2])


def _encode_4_0(values: Tensor, unit: Tensor, weights: Tensor) -> Tensor:
    return _with_codes_4_0(*_block_codes(values, weights, unit, _LEVELS_4_0))


def _with_codes_4_0(data: Tensor, codes: Tensor) -> Tensor:
    return torch.cat([data[:2], pack_halves(codes)])


def _decode_4_0(data: Tensor) -> Tensor:
    return _from_codes(block_scale(data), unpack(data[2:], 4).flatten(0, 1), _LEVELS_4_0)


def _encode_5_0(values: Tensor, unit: Tensor, weights: Tensor) -> Tensor:
    return _with_codes_5_0(*_block_codes(values, weights, unit, _LEVELS_5_0))


def _with_codes_5_0(data: Tensor, codes: Tensor) -> Tensor:
    return torch.cat([data[:2], pack_5_bits(codes)])


def _decode_5_0(data: Tensor) -> Tensor:
    return _from_codes(block_scale(data), unpack_5_bits(data[2:]), _LEVELS_5_0)


def pack_5_bits(codes: Tensor) -> Tensor:
    """The fifth bits of 32 codes, then the lower four: uint8 [32, lanes] -> [20, lanes]."""
    fifth = pack((codes >> 4).unflatten(0, (4, 8, 1)), 1).flatten(0, 1)
    return torch.cat([fifth, pack_halves(codes & 15)])


def unpack_5_bits(data: Tensor) -> Tensor:
    """The inverse of `pack_5_bits`."""
    fifth = unpack(data[:4].unsqueeze(1), 1).flatten(0, 2)
    return unpack(data[4:], 4).flatten(0, 1) | fifth << 4


def _super_block_codes(
    values: Tensor, weights: Tensor, unit: Tensor, levels: Uniform, lowest: int, highest: int
) -> tuple[Tensor, Tensor, Tensor]:
    """For [16, 16, lanes]: the step [lanes], divided by the unit, the multiples [16, lanes] and the codes."""
    step, multiples = search_multiples(values, weights, unit, levels, lowest, highest)
    codes = levels.codes(values * spread(reciprocal(step * multiples)))
    return step, multiples.to(torch.int8), codes


def _encode_6_k(values: Tensor, unit: Tensor, weights: Tensor) -> Tensor:
    values, weights = values.unflatten(0, (16, 16)), weights.unflatten(0, (16, 16))
    step, multiples, codes = _super_block_codes(values, weights, unit, _LEVELS_6_K, -128, 127)
    return _join_6_k(codes, torch.cat([multiples.view(torch.uint8), half_to_bytes(step, unit)]))


def _join_6_k(codes: Tensor, scales: Tensor) -> Tensor:
    low = pack((codes & 15).reshape(2, 2, 64, -1), 4).flatten(0, 1)
    high = pack((codes >> 4).reshape(2, 4, 32, -1), 2).flatten(0, 1)
    return torch.cat([low, high, scales])


def _with_codes_6_k(data: Tensor, codes: Tensor) -> Tensor:
    return _join_6_k(codes, data[192:])


def _decode_6_k(data: Tensor) -> Tensor:
    low, high = data[:128], unpack(data[128:192].unflatten(0, (2, 32)), 2).flatten(0, 2)
    codes = unpack(low.unflatten(0, (2, 64)), 4).flatten(0, 2) | high << 4
    return _from_codes(_scales_6_k(data), codes, _LEVELS_6_K)


def _scales_6_k(data: Tensor) -> Tensor:
    return half_from_bytes(data[208:]) * data[192:208].view(torch.int8).to(torch.float32)


def _encode_3_k(values: Tensor, unit: Tensor, weights: Tensor, levels: Uniform = _LEVELS_3_K) -> Tensor:
    values, weights = values.unflatten(0, (16, 16)), weights.unflatten(0, (16, 16))
    step, multiples, codes = _super_block_codes(values, weights, unit, levels, -32, 31)
    product = ordered_sum(ordered_sum(weights * (codes.to(torch.float32) - 4) * values) * multiples)
    step = half(step * lengthening(values, weights, product * step), unit)
    scales = (multiples + 32).view(torch.uint8)
    scales = torch.cat([pack((scales & 15).unflatten(0, (2, 8)), 4), pack((scales >> 4).unflatten(0, (4, 4)), 2)])
    return _join_3_k(codes, torch.cat([scales, half_to_bytes(step, unit)]))


def _join_3_k(codes: Tensor, scales: Tensor) -> Tensor:
    third = pack((codes >> 2).reshape(8, 32, -1), 1)
    low = pack((codes & 3).reshape(2, 4, 32, -1), 2).flatten(0, 1)
    return torch.cat([third, low, scales])


def _with_codes_3_k(data: Tensor, codes: Tensor) -> Tensor:
    return _join_3_k(codes, data[96:])


def _decode_3_k(data: Tensor) -> Tensor:
    third, low = data[:32], data[32:96]
    codes = unpack(low.unflatten(0, (2, 32)), 2).flatten(0, 2) | unpack(third, 1).flatten(0, 1) << 2
    return _from_codes(_scales_3_k(data), codes, _LEVELS_3_K)


def _scales_3_k(data: Tensor) -> Tensor:
    multiples = unpack(data[96:104], 4).flatten(0, 1) | unpack(data[104:108], 2).flatten(0, 1) << 4
    return half_from_bytes(data[108:]) * (multiples.to(torch.float32) - 32)


def _from_codes(scale: Tensor, codes: Tensor, levels: Uniform) -> Tensor:
    """Scales [s, lanes] and codes [n, lanes] to values [n, lanes]."""
    parts = (codes.to(torch.float32) + levels.lowest).view(len(scale), -1, codes.shape[-1])
    return (spread(scale) * parts).flatten(0, 1)


CODECS: Final = {
    "Q8_0": Codec(_decode_8_0, _encode_8_0),
    "Q5_0": Codec(_decode_5_0, _encode_5_0, grid=grid_of(_LEVELS_5_0, without_minima(block_scale), _with_codes_5_0)),
    "Q4_0": Codec(_decode_4_0, _encode_4_0, grid=grid_of(_LEVELS_4_0, without_minima(block_scale), _with_codes_4_0)),
    "Q6_K": Codec(_decode_6_k, _encode_6_k, grid=grid_of(_LEVELS_6_K, without_minima(_scales_6_k), _with_codes_6_k)),
    "Q3_K": Codec(
        _decode_3_k,
        _encode_3_k,
        partial(_encode_3_k, levels=_LEVELS_3_K_ALIKE),
        grid_of(_LEVELS_3_K, without_minima(_scales_3_k), _with_codes_3_k),
    ),
}
