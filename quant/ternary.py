"""Formats of one or two bits around a single scale: TQ1_0, TQ2_0, Q1_0 and Q2_0. Read only."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from .lanes import Codec, half_from_bytes, unpack


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
    "TQ1_0": Codec(_decode_tq1_0),
    "TQ2_0": Codec(_decode_tq2_0),
    "Q1_0": Codec(_decode_q1_0),
    "Q2_0": Codec(_decode_q2_0),
}
