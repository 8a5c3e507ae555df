"""Whole numbers of 4 bits, as GPTQ, AWQ and compressed-tensors pack them."""

from __future__ import annotations

import torch
from torch import Tensor

from ..archs.encodings import Packing
from .fp4 import unpack_nibbles

_PLACES = {Packing.AWQ: [0, 4, 1, 5, 2, 6, 3, 7]}  # where in a word the numbers of eight neighbours are


def unpack_codes(packing: Packing, words: Tensor) -> Tensor:
    """Stored words of a matrix, or of some rows of it where they are its rows: uint8 -> uint8 [rows, columns]."""
    match packing:
        case Packing.COMPRESSED_TENSORS:
            return _along_rows(words, packing)
        case Packing.AWQ:
            return _along_rows(words, packing).T.contiguous()
        case _:
            return _along_columns(words).T.contiguous()


def unpack_zeros(packing: Packing, words: Tensor) -> Tensor:
    """Stored words of the zeros of a matrix: uint8 -> uint8 [rows, groups], perhaps with further rows."""
    match packing:
        case Packing.COMPRESSED_TENSORS:
            return _along_columns(words)
        case Packing.GPTQ:
            return _along_rows(words, packing).T + 1
        case _:
            return _along_rows(words, packing).T


def decode_int4(codes: Tensor, zeros: Tensor | int, scales: Tensor, groups: Tensor | None) -> Tensor:
    """`(code - zero) * scale`, float32 [rows, columns]; scales of 16 bits lose nothing.

    Args:
        codes: uint8 [rows, columns].
        zeros: uint8 [rows, groups], or one for all.
        scales: float32 [rows, groups].
        groups: of each column its group, int64 [columns]; None where groups of one size follow one another.
    """
    rows, count = scales.shape
    zeros = zeros.float() if isinstance(zeros, Tensor) else torch.full_like(scales, zeros)
    if groups is not None:
        return (codes.float() - zeros[:, groups]) * scales[:, groups]
    values = codes.reshape(rows, count, -1).float()
    return ((values - zeros[..., None]) * scales[..., None]).flatten(1)


def _along_rows(words: Tensor, packing: Packing) -> Tensor:
    """Words [n, m], in bytes, that hold numbers of one row each: [n, 8 m]"""
    numbers = unpack_nibbles(words)  # whose bytes begin with the lowest
    places = _PLACES.get(packing)
    return numbers.unflatten(1, (-1, 8))[..., places].flatten(1) if places else numbers


def _along_columns(words: Tensor) -> Tensor:
    """Words [n, m], in bytes, that hold numbers of one column each: [8 n, m]"""
    return unpack_nibbles(words).unflatten(1, (-1, 8)).transpose(1, 2).flatten(0, 1)
