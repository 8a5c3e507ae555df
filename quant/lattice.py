"""Formats whose codes index points of a lattice: IQ1_S, IQ1_M, IQ2_XXS, IQ2_XS, IQ2_S, IQ3_XXS and IQ3_S.

The points themselves are data of the gguf package, which is read rather than copied.
"""

from __future__ import annotations

from functools import cache
from typing import Final

import torch
from torch import Tensor

from .lanes import Codec, from_bytes, half_from_bytes, spread, unpack

_IQ1_SHIFT: Final = 0.125  # IQ1 types move every point of a group up or down by this


@cache
def _points(name: str, device: torch.device) -> Tensor:
    """The lattice of a format, float32 [points, 8 or 4]."""
    from gguf import quants

    lattice = getattr(quants, name)
    lattice.init_grid()
    return torch.from_numpy(lattice.grid).reshape(lattice.grid_shape).to(device)


def _chosen(name: str, index: Tensor) -> Tensor:
    """The points at `index` [..., lanes], as [..., 8 or 4, lanes]."""
    return _points(name, index.device)[index.to(torch.int64)].movedim(-1, -2)


def _signs(bits: Tensor) -> Tensor:
    """Eight signs from each byte, set bits being negative: [..., lanes] -> float32 [..., 8, lanes]."""
    return 1 - 2 * unpack(bits.to(torch.uint8).unsqueeze(-2), 1).squeeze(-2).to(torch.float32)


def _even_signs(code: Tensor) -> Tensor:
    """Eight signs from seven bits: the eighth makes the number of negative ones even."""
    parity = code ^ code >> 4
    parity = parity ^ parity >> 2
    parity = parity ^ parity >> 1
    return _signs(code | (parity & 1) << 7)


def _nibbles(data: Tensor) -> Tensor:
    """Two numbers from each byte, the low half first: uint8 [n, lanes] -> [2 * n, lanes]."""
    return unpack(data.unsqueeze(1), 4).flatten(0, 2)


def _decode_iq2_xxs(data: Tensor) -> Tensor:
    """Each 32 values: four point numbers in one 32-bit word; four sign codes and a scale in the next."""
    step, words = half_from_bytes(data[:2]), data[2:].unflatten(0, (8, 8))
    points = _chosen("IQ2_XXS", words[:, :4])
    return _with_word_scales(step, words[:, 4:], points, 0.25)


def _decode_iq3_xxs(data: Tensor) -> Tensor:
    step, index, words = data.split([2, 64, 32])
    points = _chosen("IQ3_XXS", index.unflatten(0, (8, 4, 2))).flatten(2, 3)
    return _with_word_scales(half_from_bytes(step), words.unflatten(0, (8, 4)), points, 0.5)


def _with_word_scales(step: Tensor, words: Tensor, points: Tensor, factor: float) -> Tensor:
    """Points [8, 4, 8, lanes] times the signs (4 x 7 bits) and scale (4 bits) in the words [8, 4 bytes, lanes]."""
    word = from_bytes(words.flatten(0, 1), 4)
    signs = torch.stack([_even_signs(word >> 7 * group & 127) for group in range(4)], dim=1)
    scale = step * (0.5 + (word >> 28).to(torch.float32)) * factor
    return (spread(spread(scale)) * points * signs).flatten(0, 2)


def _decode_iq2_xs(data: Tensor) -> Tensor:
    step, codes, scales = data.split([2, 64, 8])
    code = from_bytes(codes, 2)
    scale = half_from_bytes(step) * (0.5 + _nibbles(scales).to(torch.float32)) * 0.25
    points = _chosen("IQ2_XS", code & 511)
    return _with_scales(scale, points, _even_signs(code >> 9))


def _decode_iq2_s(data: Tensor) -> Tensor:
    step, low, signs, high, scales = data.split([2, 32, 32, 8, 8])
    index = low.to(torch.int32) | unpack(high.unsqueeze(1), 2).flatten(0, 2).to(torch.int32) << 8
    scale = half_from_bytes(step) * (0.5 + _nibbles(scales).to(torch.float32)) * 0.25
    return _with_scales(scale, _chosen("IQ2_S", index), _signs(signs))


def _decode_iq3_s(data: Tensor) -> Tensor:
    step, low, high, signs, scales = data.split([2, 64, 8, 32, 4])
    index = low.to(torch.int32) | unpack(high.unsqueeze(1), 1).flatten(0, 2).to(torch.int32) << 8
    scale = half_from_bytes(step) * (1 + 2 * _nibbles(scales).to(torch.float32))
    points = _chosen("IQ3_S", index.unflatten(0, (32, 2))).flatten(1, 2)
    return _with_scales(scale, points, _signs(signs))


def _with_scales(scale: Tensor, points: Tensor, signs: Tensor) -> Tensor:
    """Points and signs [32, 8, lanes] times scales [8 or 16, lanes], each for its share of consecutive points."""
    scale = scale.repeat_interleave(len(points) // len(scale), dim=0)
    return (spread(scale) * points * signs).flatten(0, 1)


def _decode_iq1_s(data: Tensor) -> Tensor:
    step, low, words = data.split([2, 32, 16])
    word = from_bytes(words, 2)  # each: four times the upper 3 bits of a point number, a 3-bit scale, the shift's sign
    high = torch.stack([word >> 3 * group & 7 for group in range(4)], dim=1).flatten(0, 1)
    scale = half_from_bytes(step) * (2 * (word >> 12 & 7) + 1)
    shift = torch.where(word >> 15 == 0, _IQ1_SHIFT, -_IQ1_SHIFT)
    return _shifted(scale, shift.repeat_interleave(4, dim=0), low, high)


def _decode_iq1_m(data: Tensor) -> Tensor:
    low, high, scales = data.split([32, 16, 8])
    word = from_bytes(scales, 2)  # each: four 3-bit scales, and four bits of the float16 step
    step = sum(((word[place] >> 12) << 4 * place for place in range(4)), start=torch.zeros_like(word[0]))
    step = step.to(torch.int16).view(torch.float16).to(torch.float32)
    scale = step * (2 * torch.stack([word >> 3 * place & 7 for place in range(4)], dim=1).flatten(0, 1) + 1)
    high = _nibbles(high).to(torch.int64)
    return _shifted(scale, torch.where(high & 8 == 0, _IQ1_SHIFT, -_IQ1_SHIFT), low, high & 7)


def _shifted(scale: Tensor, shift: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """32 points numbered low + 256 * high, shifted and scaled; scale [8 or 16, lanes], shift [32, lanes]."""
    points = _chosen("IQ1_S", low.to(torch.int64) | high << 8)
    scale = scale.repeat_interleave(len(points) // len(scale), dim=0)
    return (spread(scale) * (points + spread(shift))).flatten(0, 1)


CODECS: Final = {
    "IQ1_S": Codec(_decode_iq1_s),
    "IQ1_M": Codec(_decode_iq1_m),
    "IQ2_XXS": Codec(_decode_iq2_xxs),
    "IQ2_XS": Codec(_decode_iq2_xs),
    "IQ2_S": Codec(_decode_iq2_s),
    "IQ3_XXS": Codec(_decode_iq3_xxs),
    "IQ3_S": Codec(_decode_iq3_s),
}
