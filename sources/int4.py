"""Whole numbers of 4 bits, as GPTQ, AWQ and compressed-tensors pack them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..archs.encodings import Int4, Packing
from ..archs.expressions import TensorInfo
from ..errors import BadInput
from .fp4 import unpack_nibbles
from .storage import Reader

_PLACES = {Packing.AWQ: [0, 4, 1, 5, 2, 6, 3, 7]}  # where in a word the numbers of eight neighbours are
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_EACH_ONE = 0x11111111  # taken from zeros in whole words, so that one of 0 borrows from the next
_MIDDLE = 8  # the zero where none is stored
_BLOCK = 32  # numbers that share a scale in Q4_0


@dataclass(frozen=True)
class Numbers:
    """Rows of a matrix: codes uint8 [rows, columns], zeros uint8 and scales float32 [rows, groups].

    `groups` are int64 [columns], the group of each column; None where groups of one size follow one another.
    """

    codes: Tensor
    zeros: Tensor
    scales: Tensor
    groups: Tensor | None


def read_int4(source: Int4, storage: Reader, rows: tuple[int, int] | None) -> Numbers:
    """Unpacks some rows, or all. Raises BadInput for columns of groups that are not there."""
    start, stop = rows or (0, source.shape[0])
    packing, by_rows = source.packing, source.by_rows

    def read(tensor: TensorInfo) -> Tensor:
        """The rows of the matrix, where the tensor has them as its own; else all of it."""
        return storage.read(tensor, start, stop) if by_rows else storage.read(tensor)

    codes, scales = read(source.codes), read(source.scale).view(_DTYPES[source.scale.dtype]).float()
    match packing:
        case Packing.COMPRESSED_TENSORS:
            codes = _along_rows(codes, packing)
        case Packing.AWQ:
            codes = _along_rows(codes, packing).T
        case _:
            codes = _along_columns(codes).T
    if not by_rows:
        codes, scales = codes[start:stop], scales.T[start:stop]
    zeros = torch.full_like(scales, _MIDDLE, dtype=torch.uint8)
    if source.zero:
        words = storage.read(source.zero)
        if packing is Packing.GPTQ:
            words = (words.view(torch.int32) + _EACH_ONE).view(torch.uint8)
        zeros = (_along_columns(words) if by_rows else _along_rows(words, packing).T)[start:stop]
    return Numbers(codes.contiguous(), zeros, scales.contiguous(), _groups(source, storage, scales.shape[1]))


def _groups(source: Int4, storage: Reader, count: int) -> Tensor | None:
    """Of each column its group; None where they follow one another, as all being -1 or 0 says too."""
    if source.groups is None:
        return None
    groups = storage.read(source.groups).view(torch.int32).flatten().long()
    if (groups == -1).all() or not groups.any():
        if len(groups) % count:
            raise BadInput(
                f"{source.groups.name} in {source.groups.file} says nothing of {len(groups)} columns in {count} "
                "groups, expected the group of each: fetch the checkpoint again"
            )
        return None
    outside = ((groups < 0) | (groups >= count)).nonzero()
    if len(outside):
        raise BadInput(
            f"{source.groups.name} in {source.groups.file} holds {groups[outside[0, 0]]}, expected numbers of {count} "
            "groups: the checkpoint is damaged, fetch it again"
        )
    columns = torch.arange(len(groups), device=groups.device)
    return groups if len(groups) % count or (groups != columns // (len(groups) // count)).any() else None


def decode_int4(numbers: Numbers) -> Tensor:
    """`(code - zero) * scale`, float32 [rows, columns]; scales of 16 bits lose nothing."""
    zeros, scales, groups = numbers.zeros.float(), numbers.scales, numbers.groups
    if groups is not None:
        return (numbers.codes.float() - zeros[:, groups]) * scales[:, groups]
    values: Tensor = numbers.codes.reshape(*scales.shape, -1).float()
    return values.sub_(zeros[..., None]).mul_(scales[..., None]).flatten(1)


def pack_q4_0(numbers: Numbers) -> Tensor | None:
    """The same codes and scales in ggml's Q4_0, uint8 [rows, columns / 32 * 18]; None where it does not hold them.

    A block of 32 columns holds its scale in float16, then sixteen bytes; byte j holds column j in its low and column
    j + 16 in its high nibble. Its zero is 8.
    """
    codes, scales = numbers.codes, numbers.scales
    blocks = scales.to(torch.float16)
    size = codes.shape[1] // scales.shape[1]
    if numbers.groups is not None or size % _BLOCK or (numbers.zeros != _MIDDLE).any() or (blocks != scales).any():
        return None
    low, high = codes.unflatten(1, (-1, 2, _BLOCK // 2)).unbind(2)  # [rows, blocks, 16] each
    factors = blocks.repeat_interleave(size // _BLOCK, dim=1)[..., None].contiguous().view(torch.uint8)
    return torch.cat((factors, low | high << 4), dim=-1).flatten(1)


def _along_rows(words: Tensor, packing: Packing) -> Tensor:
    """Words [n, m], in bytes, that hold numbers of one row each: [n, 8 m]"""
    numbers = unpack_nibbles(words)  # whose bytes begin with the lowest
    places = _PLACES.get(packing)
    return numbers.unflatten(1, (-1, 8))[..., places].flatten(1) if places else numbers


def _along_columns(words: Tensor) -> Tensor:
    """Words [n, m], in bytes, that hold numbers of one column each: [8 n, m]"""
    eights: Tensor = unpack_nibbles(words).unflatten(1, (-1, 8))  # [n, m, 8]
    return eights.transpose(1, 2).flatten(0, 1)
