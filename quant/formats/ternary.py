"""Formats of one or two bits around a single scale: TQ1_0, TQ2_0, Q1_0 and Q2_0."""

from __future__ import annotations

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
    reciprocal,
    unpack,
    without_minima,
)
from .scaled import Uniform, grid_of, search_scale

# The peak of weights that have so few levels already is at the outermost; otherwise large values are best cut off.
_TERNARY: Final = Uniform(-1, 1, peaks=(1.0, 4.2, 9.8, 2.6, 1.6, 3.3, 6.0))
_TWO_BITS: Final = Uniform(-1, 2, peaks=(2.0, 1.0, 3.2, -4.6, 6.5, 2.2, -2.8, 4.1, -12.0))


def _encode_tq1_0(values: Tensor, unit: Tensor, weights: Tensor) -> Tensor:
    """A byte holds five base-3 digits, the first in the highest place, as a fraction of 256 rounded up."""
    scale, codes = _codes(values, unit, weights, _TERNARY)
    quintets, shorter, quartets = codes.to(torch.int32).split([160, 80, 16])
    groups = (quintets.unflatten(0, (5, 32)), shorter.unflatten(0, (5, 16)), quartets.unflatten(0, (4, 4)))
    numbers = torch.cat([sum(digits * 3 ** (4 - place) for place, digits in enumerate(group)) for group in groups])
    return torch.cat([((numbers * 256 + 242) // 243).to(torch.uint8), scale])


def _encode_tq2_0(values: Tensor, unit: Tensor, weights: Tensor) -> Tensor:
    scale, codes = _codes(values, unit, weights, _TERNARY)
    return torch.cat([pack(codes.unflatten(0, (2, 4, 32)), 2).flatten(0, 1), scale])


def _encode_q1_0(values: Tensor, unit: Tensor, weights: Tensor) -> Tensor:
    scale = half(ordered_sum(weights * values.abs()) * reciprocal(ordered_sum(weights)), unit)
    return torch.cat([half_to_bytes(scale, unit), pack((values >= 0).unflatten(0, (16, 8, 1)), 1).flatten(0, 1)])


def _encode_q2_0(values: Tensor, unit: Tensor, weights: Tensor) -> Tensor:
    return _with_codes_q2_0(*_codes(values, unit, weights, _TWO_BITS))


def _with_codes_q2_0(data: Tensor, codes: Tensor) -> Tensor:
    return torch.cat([data[:2], pack(codes.unflatten(0, (16, 4, 1)), 2).flatten(0, 1)])


def _codes(values: Tensor, unit: Tensor, weights: Tensor, levels: Uniform) -> tuple[Tensor, Tensor]:
    """The bytes of the scale [2, lanes] and the codes, uint8 [n, lanes]."""
    scale = search_scale(values, weights, unit, levels)
    return half_to_bytes(scale, unit), levels.codes(values * reciprocal(scale))


def _decode_tq1_0(data: Tensor) -> Tensor:
    """A byte holds five base-3 digits as a fraction of 256: the first digit is what tripling it carries over."""
    quintets, quartets, scale = data[:48], data[48:52], data[52:]
    groups = ((quintets[:32], 5), (quintets[32:], 5), (quartets, 4))
    digits = [(group * 3**place).to(torch.int32) * 3 >> 8 for group, count in groups for place in range(count)]
    return half_from_bytes(scale) * (torch.cat(digits).to(torch.float32) - 1)


def _decode_tq2_0(data: Tensor) -> Tensor:
    codes = unpack(data[:64].unflatten(0, (2, 32)), 2).flatten(0, 2)
    return half_from_bytes(data[64:]) * (codes.to(torch.float32) - 1)


def _decode_q1_0(data: Tensor) -> Tensor:
    signs = unpack(data[2:].unsqueeze(1), 1).flatten(0, 2)
    return half_from_bytes(data[:2]) * (signs.to(torch.float32) * 2 - 1)


def _decode_q2_0(data: Tensor) -> Tensor:
    codes = unpack(data[2:].unsqueeze(1), 2).flatten(0, 2)
    return half_from_bytes(data[:2]) * (codes.to(torch.float32) - 1)


CODECS: Final = {
    "TQ1_0": Codec(_decode_tq1_0, _encode_tq1_0),
    "TQ2_0": Codec(_decode_tq2_0, _encode_tq2_0),
    "Q1_0": Codec(_decode_q1_0, _encode_q1_0),
    "Q2_0": Codec(_decode_q2_0, _encode_q2_0, grid=grid_of(_TWO_BITS, without_minima(block_scale), _with_codes_q2_0)),
}
