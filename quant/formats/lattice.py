"""Formats whose codes index points of a lattice: IQ1_S, IQ1_M, IQ2_XXS, IQ2_XS, IQ2_S, IQ3_XXS and IQ3_S.

The points themselves are data of the gguf package, which is read rather than copied.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Final

import torch
from torch import Tensor

from .lanes import (
    Codec,
    Grid,
    from_bytes,
    half,
    half_from_bytes,
    half_to_bytes,
    ordered_sum,
    pack,
    spread,
    unpack,
    without_minima,
)
from .lattice_search import Choice, Lattice, even_signs, search_odd_multiples
from .norm_correction import lengthening

LATTICES: Final = ("IQ1_S", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S")  # IQ1_M has the points of IQ1_S

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
    points = _IQ2_XXS.points(data[2:].unflatten(0, (8, 8))[:, :4].flatten(0, 1))
    return _with_scales(_IQ2_XXS.scales(data), points, _word_signs(_words_iq2_xxs(data)))


def _words_iq2_xxs(data: Tensor) -> Tensor:
    return from_bytes(data[2:].unflatten(0, (8, 8))[:, 4:].flatten(0, 1), 4)


def _decode_iq3_xxs(data: Tensor) -> Tensor:
    points = _IQ3_XXS.points(data[2:66].unflatten(0, (32, 2))).flatten(1, 2)
    return _with_scales(_IQ3_XXS.scales(data), points, _word_signs(_words_iq3_xxs(data)))


def _words_iq3_xxs(data: Tensor) -> Tensor:
    return from_bytes(data[66:], 4)


def _word_signs(word: Tensor) -> Tensor:
    """Signs from words [8, lanes] that hold four times seven bits: float32 [32, 8, lanes]."""
    return torch.stack([_even_signs(word >> 7 * group & 127) for group in range(4)], dim=1).flatten(0, 1)


def _decode_iq2_xs(data: Tensor) -> Tensor:
    code = from_bytes(data[2:66], 2)
    return _with_scales(_IQ2_XS.scales(data), _IQ2_XS.points(code & 511), _even_signs(code >> 9))


def _decode_iq2_s(data: Tensor) -> Tensor:
    low, signs, high = data[2:74].split([32, 32, 8])
    index = low.to(torch.int32) | unpack(high.unsqueeze(1), 2).flatten(0, 2).to(torch.int32) << 8
    return _with_scales(_IQ2_S.scales(data), _IQ2_S.points(index), _signs(signs))


def _decode_iq3_s(data: Tensor) -> Tensor:
    low, high, signs = data[2:106].split([64, 8, 32])
    index = low.to(torch.int32) | unpack(high.unsqueeze(1), 1).flatten(0, 2).to(torch.int32) << 8
    points = _IQ3_S.points(index.unflatten(0, (32, 2))).flatten(1, 2)
    return _with_scales(_IQ3_S.scales(data), points, _signs(signs))


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


def digits(name: str) -> tuple[Tensor, int]:
    """The places of a lattice's levels among all that it has, uint8 [points, 8 or 4], and how many it has."""
    lattice = _lattice(name, 1)
    return lattice.digits.to(torch.uint8).contiguous(), int(lattice.digits.max()) + 1


@cache
def _lattice(name: str, divisor: int) -> Lattice:
    """A format's lattice in levels that odd multiples of the step scale: the points over a power of two."""
    return Lattice(_points(name, torch.device("cpu")) / divisor)


@cache
def _lattice_on(device: torch.device, name: str, divisor: int) -> Lattice:
    return _lattice(name, divisor).to(device)


@dataclass(frozen=True)
class _Signed:
    """A format that stores signs apart from points.

    Attributes:
        name: of the format and its lattice.
        divisor: of the points, whose quotients are the levels that odd multiples of the step scale.
        even: whether each eight values have an even number of negative signs.
        multiples: the stored scales from the bytes: integers [8 or 16, lanes].
        join: bytes from those of the step [2, lanes], the stored scales, the point numbers [32 or 64, lanes] and the
            signs [32, lanes], eight to a byte.
        spans: scales to choose points for before there is a step.
    """

    name: str
    divisor: int
    even: bool
    sub_blocks: int
    multiples: Callable[[Tensor], Tensor]
    join: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    spans: tuple[float, ...] = (0.92, 1.12)

    def encode(self, values: Tensor, unit: Tensor, weights: Tensor) -> Tensor:
        lattice = self._lattice(values.device)
        negative, magnitudes = self._signs(values, weights)
        magnitudes = magnitudes.view(self.sub_blocks, 256 // self.sub_blocks, -1)
        points = lattice.points.shape[1]
        point_weights = weights.view(self.sub_blocks, -1, points, weights.shape[-1])

        def nearest(scaled: Tensor) -> Choice:
            numbers = lattice.nearest(scaled.unflatten(1, (-1, points)), point_weights)
            return Choice(lattice.point(numbers).flatten(1, 2), numbers)

        weights = weights.view_as(magnitudes)
        step, multiples, codes, product = search_odd_multiples(
            magnitudes, weights, unit, [lattice.rising], self.spans, largest=31, nearest=nearest
        )
        step = half(step * lengthening(magnitudes, weights, step * product), unit)
        stored = multiples.to(torch.int64) >> 1
        return self.join(half_to_bytes(step, unit), stored, codes.flatten(0, 1), _packed(negative))

    def scales(self, data: Tensor) -> Tensor:
        """What levels are multiplied with, odd multiples of the step: float32 [8 or 16, lanes]."""
        return half_from_bytes(data[:2]) * (1 + 2 * self.multiples(data).to(torch.float32))

    def points(self, numbers: Tensor) -> Tensor:
        """The levels of points with these numbers: [..., lanes] -> [..., 4 or 8, lanes]."""
        return self._lattice(numbers.device).point(numbers.to(torch.int64))

    @property
    def grid(self) -> Grid:
        return Grid(without_minima(self.scales), self._nearest, self._with_levels, group=8)

    def _nearest(self, scaled: Tensor, weights: Tensor) -> Tensor:
        lattice, weights = self._lattice(scaled.device), weights[:, None].expand_as(scaled)
        negative, magnitudes = self._signs(scaled, weights)
        parts = (-1, lattice.points.shape[1])
        numbers = lattice.nearest(magnitudes.flatten(0, 1).unflatten(0, parts), weights.unflatten(0, parts))
        levels = lattice.point(numbers).flatten(0, 1)
        return torch.where(negative.flatten(0, 1), -levels, levels)

    def _with_levels(self, data: Tensor, levels: Tensor) -> Tensor:
        numbers = self._lattice(levels.device).numbers(levels.abs())
        return self.join(data[:2], self.multiples(data), numbers, _packed(levels.unflatten(0, (32, 8)) < 0))

    def _lattice(self, device: torch.device) -> Lattice:
        return _lattice_on(device, self.name, self.divisor)

    def _signs(self, values: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Which values [n, lanes] are stored as negative, and what their points have to be near: [n / 8, 8, lanes]."""
        groups, group_weights = values.unflatten(0, (-1, 8)), weights.unflatten(0, (-1, 8))
        negative = even_signs(groups, group_weights) if self.even else groups < 0
        return negative, torch.where(negative, -groups, groups)


def _packed(negative: Tensor) -> Tensor:
    """Signs [32, 8, lanes] to bytes [32, lanes]."""
    return pack(negative.unsqueeze(2), 1).flatten(0, 1)


def _join_iq2_xxs(step: Tensor, scales: Tensor, numbers: Tensor, signs: Tensor) -> Tensor:
    words = torch.cat([numbers.to(torch.uint8).unflatten(0, (8, 4)), _scale_words(scales, signs)], dim=1)
    return torch.cat([step, words.flatten(0, 1)])


def _join_iq3_xxs(step: Tensor, scales: Tensor, numbers: Tensor, signs: Tensor) -> Tensor:
    return torch.cat([step, numbers.to(torch.uint8), _scale_words(scales, signs).flatten(0, 1)])


def _scale_words(scales: Tensor, signs: Tensor) -> Tensor:
    """Four times seven signs and a scale in a 32-bit word: [8, lanes] and [32, lanes] -> uint8 [8, 4, lanes]."""
    word = scales << 28
    for group in range(4):
        word = word | (signs[group::4].to(torch.int64) & 127) << 7 * group
    words: Tensor = _to_bytes(word, 4).unflatten(0, (8, 4))
    return words


def _join_iq2_xs(step: Tensor, scales: Tensor, numbers: Tensor, signs: Tensor) -> Tensor:
    codes = numbers | (signs.to(torch.int64) & 127) << 9
    return torch.cat([step, _to_bytes(codes, 2), _to_nibbles(scales)])


def _join_iq2_s(step: Tensor, scales: Tensor, numbers: Tensor, signs: Tensor) -> Tensor:
    high = pack((numbers >> 8).unflatten(0, (8, 4, 1)), 2).flatten(0, 1)
    return torch.cat([step, _low_byte(numbers), signs, high, _to_nibbles(scales)])


def _join_iq3_s(step: Tensor, scales: Tensor, numbers: Tensor, signs: Tensor) -> Tensor:
    high = pack((numbers >> 8).unflatten(0, (8, 8, 1)), 1).flatten(0, 1)
    return torch.cat([step, _low_byte(numbers), high, signs, _to_nibbles(scales)])


_IQ2_XXS: Final = _Signed("IQ2_XXS", 8, True, 8, lambda data: _words_iq2_xxs(data) >> 28, _join_iq2_xxs)
_IQ2_XS: Final = _Signed("IQ2_XS", 8, True, 16, lambda data: _nibbles(data[66:]), _join_iq2_xs)
_IQ2_S: Final = _Signed("IQ2_S", 8, False, 16, lambda data: _nibbles(data[74:]), _join_iq2_s)
_IQ3_XXS: Final = _Signed("IQ3_XXS", 4, True, 8, lambda data: _words_iq3_xxs(data) >> 28, _join_iq3_xxs)
_IQ3_S: Final = _Signed("IQ3_S", 1, False, 8, lambda data: _nibbles(data[106:]), _join_iq3_s, (1.02,))


def _encode_iq1_s(values: Tensor, unit: Tensor, weights: Tensor) -> Tensor:
    step, scales, codes = _shifted_codes(values, unit, weights, sub_blocks=8, shifts=1)
    word = scales << 12 | (codes[:, 0] >> 11) << 15
    for group in range(4):
        word = word | (codes[:, group] >> 8 & 7) << 3 * group
    return torch.cat([half_to_bytes(step, unit), _low_byte(codes.flatten(0, 1)), _to_bytes(word, 2)])


def _encode_iq1_m(values: Tensor, unit: Tensor, weights: Tensor) -> Tensor:
    step, scales, codes = _shifted_codes(values, unit, weights, sub_blocks=16, shifts=2)
    codes = codes.flatten(0, 1)
    step_bits = from_bytes(half_to_bytes(step, unit), 2)[0]
    word = torch.stack([(step_bits >> 4 * place & 15) << 12 for place in range(4)])
    for place in range(4):
        word = word | scales[place::4] << 3 * place
    return torch.cat([_low_byte(codes), _to_nibbles(codes >> 8), _to_bytes(word, 2)])


def _shifted_codes(
    values: Tensor, unit: Tensor, weights: Tensor, sub_blocks: int, shifts: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The search for formats that shift points, `shifts` times in a sub-block.

    Returns the step [lanes], divided by the unit, the halved multiples [sub_blocks, lanes] and
    [sub_blocks, points, lanes] point numbers, with bit 11 set for a shift down.
    """
    lattice = _lattice_on(values.device, "IQ1_S", 1)
    values, weights = values.unflatten(0, (sub_blocks, -1)), weights.unflatten(0, (sub_blocks, -1))
    part_weights, point_weights = (weights.unflatten(1, parts) for parts in ((shifts, -1), (shifts, -1, 8)))

    def nearest(scaled: Tensor) -> Choice:
        parts = scaled.unflatten(1, (shifts, -1))

        def distance(shift: float) -> Tensor:
            """Of values by themselves from the nearest levels."""
            miss = parts - shift - (parts - shift).round().clamp(-1, 1)
            return ordered_sum(part_weights * miss * miss)

        down = (distance(-_IQ1_SHIFT) < distance(_IQ1_SHIFT)).unsqueeze(2)
        shift = spread(torch.where(down, -_IQ1_SHIFT, _IQ1_SHIFT))
        numbers = lattice.nearest(scaled.unflatten(1, (shifts, -1, 8)) - shift, point_weights)
        codes = numbers | torch.where(down, 1 << 11, 0)
        return Choice((lattice.point(numbers) + shift).flatten(1, 3), codes.flatten(1, 2))

    levels = [tuple(level + shift for level in lattice.rising) for shift in (_IQ1_SHIFT, -_IQ1_SHIFT)]
    step, multiples, codes, _ = search_odd_multiples(values, weights, unit, levels, (), largest=15, nearest=nearest)
    return step, multiples.to(torch.int64) >> 1, codes


def _to_nibbles(numbers: Tensor) -> Tensor:
    """The inverse of `_nibbles`."""
    return pack(numbers.unflatten(0, (-1, 2, 1)), 4).flatten(0, 1)


def _low_byte(numbers: Tensor) -> Tensor:
    return (numbers & 255).to(torch.uint8)


def _to_bytes(numbers: Tensor, count: int) -> Tensor:
    """The inverse of `from_bytes`: int64 [n, lanes] -> uint8 [n * count, lanes]."""
    return torch.stack([_low_byte(numbers >> 8 * place) for place in range(count)], dim=1).flatten(0, 1)


CODECS: Final = {
    "IQ1_S": Codec(_decode_iq1_s, _encode_iq1_s),
    "IQ1_M": Codec(_decode_iq1_m, _encode_iq1_m),
    "IQ2_XXS": Codec(_decode_iq2_xxs, _IQ2_XXS.encode, grid=_IQ2_XXS.grid),
    "IQ2_XS": Codec(_decode_iq2_xs, _IQ2_XS.encode, grid=_IQ2_XS.grid),
    "IQ2_S": Codec(_decode_iq2_s, _IQ2_S.encode, grid=_IQ2_S.grid),
    "IQ3_XXS": Codec(_decode_iq3_xxs, _IQ3_XXS.encode, grid=_IQ3_XXS.grid),
    "IQ3_S": Codec(_decode_iq3_s, _IQ3_S.encode, grid=_IQ3_S.grid),
}
