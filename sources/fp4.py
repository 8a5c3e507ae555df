"""4-bit floats: decoding, and repacking into ggml's blocks without touching a code or a scale."""

from __future__ import annotations

import torch
from torch import Tensor

GROUP = 16  # columns that share one E4M3 scale
# Value of every E2M1 code (OCP Microscaling Formats 1.0, 5.3.3): sign, two bits of exponent, one of mantissa.
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_CODES = torch.tensor([*_MAGNITUDES, *(-value for value in _MAGNITUDES)], device="cpu")


def unpack_nibbles(codes: Tensor) -> Tensor:
    """uint8 [rows, columns / 2], even columns in the low nibbles -> uint8 [rows, columns]."""
    return torch.stack((codes & 15, codes >> 4), dim=-1).flatten(-2)


def decode_nvfp4(codes: Tensor, scales: Tensor) -> Tensor:
    """`e2m1(code) * e4m3(scale)`, exact in float32.

    Args:
        codes: uint8 [rows, columns / 2], even columns in the low nibbles.
        scales: uint8 [rows, columns / 16], bits of E4M3 numbers.

    Returns:
        float32 [rows, columns].
    """
    values = _CODES.to(codes.device)[unpack_nibbles(codes).int()].view(*scales.shape, GROUP)
    factors = scales.view(torch.float8_e4m3fn).float()[..., None]
    return torch.mul(values, factors).flatten(-2)


def repack_nvfp4(codes: Tensor, scales: Tensor) -> Tensor:
    """The same codes and scales in ggml's NVFP4 layout, uint8 [rows, columns / 64 * 36].

    A block of 64 columns holds its four scales, then four groups of eight bytes; byte j of a group holds column j
    in its low and column j + 8 in its high nibble. Arguments are those of `decode_nvfp4`; columns divide by 64.
    """
    rows, blocks = scales.shape[0], scales.shape[1] // 4
    groups = unpack_nibbles(codes).view(rows, blocks, 4, 2, GROUP // 2)
    packed = (groups[..., 0, :] | groups[..., 1, :] << 4).flatten(-2)
    return torch.cat((scales.view(rows, blocks, 4), packed), dim=-1).flatten(-2)


def repack_mxfp4(codes: Tensor, scales: Tensor) -> Tensor:
    """The same codes and scales in ggml's MXFP4 layout, uint8 [rows, columns / 32 * 17].

    A block of 32 columns holds its scale, then sixteen bytes; byte j holds column j in its low and column j + 16 in
    its high nibble.

    Args:
        codes: uint8 [rows, columns / 2], even columns in the low nibbles.
        scales: uint8 [rows, columns / 32], bits of E8M0 numbers.
    """
    first, second = codes.view(*scales.shape, 2, 8).unbind(-2)  # columns 0 to 15 and 16 to 31, two in a byte
    packed = torch.empty(*scales.shape, 17, dtype=torch.uint8, device=scales.device)
    packed[..., 0] = scales
    packed[..., 1::2] = first & 15 | second << 4
    packed[..., 2::2] = first >> 4 | second & 240
    return packed.flatten(-2)
