"""NVIDIA's 4-bit floats: decoding, and repacking into ggml's blocks without touching a code or a scale."""

from __future__ import annotations

import torch
from torch import Tensor

from ..archs.errors import BadInput
from ..archs.weights import Expression, Nvfp4, of_expert
from .storage import Storage

_E4M3_NAN = 0x7F  # the bits above it have the sign set
GROUP = 16  # columns that share one E4M3 scale
# Value of every E2M1 code (OCP Microscaling Formats 1.0, 5.3.3): sign, two bits of exponent, one of mantissa.
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_E2M1 = torch.tensor([*_MAGNITUDES, *(-value for value in _MAGNITUDES)])


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
    values = _E2M1[unpack_nibbles(codes).int()].view(*scales.shape, GROUP)
    factors = scales.view(torch.float8_e4m3fn).float()[..., None]
    return torch.mul(values, factors).flatten(-2)


def repack(
    expression: Expression, type_name: str, storage: Storage, expert: int | None, rows: tuple[int, int] | None
) -> Tensor | None:
    """Rows of a weight in blocks of a ggml type, where its stored codes and scales can be moved there unchanged.

    Arguments are those of `decode.evaluate`.

    Returns:
        uint8 [rows, row bytes]; None where the numbers must be quantised.
    """
    source = of_expert(expression, expert)
    if type_name != "NVFP4" or not isinstance(source, Nvfp4) or source.global_scale:
        return None
    start, stop = rows or (0, source.shape[0])
    scales = storage.read(source.scale, start, stop)
    if (scales >= _E4M3_NAN).any():
        raise BadInput(
            f"{source.scale.name} in {source.scale.file} holds NaN or a negative scale: fetch the file again"
        )
    return repack_nvfp4(storage.read(source.codes, start, stop), scales)


def repack_nvfp4(codes: Tensor, scales: Tensor) -> Tensor:
    """The same codes and scales in ggml's NVFP4 layout, uint8 [rows, columns / 64 * 36].

    A block of 64 columns holds its four scales, then four groups of eight bytes; byte j of a group holds column j
    in its low and column j + 8 in its high nibble. Arguments are those of `decode_nvfp4`; columns divide by 64.
    """
    rows, blocks = scales.shape[0], scales.shape[1] // 4
    groups = unpack_nibbles(codes).view(rows, blocks, 4, 2, GROUP // 2)
    packed = (groups[..., 0, :] | groups[..., 1, :] << 4).flatten(-2)
    return torch.cat((scales.view(rows, blocks, 4), packed), dim=-1).flatten(-2)
