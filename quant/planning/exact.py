"""Finds the ggml type that loses nothing of a weight, and the bits that its source takes."""

from __future__ import annotations

from math import prod

from ...archs.weights import (
    BlockScaled,
    Expression,
    GlobalScales,
    Mxfp4,
    NegativeExponential,
    Nvfp4,
    Padded,
    Read,
    Reshape,
    Rows,
    Scaled,
    SideBySide,
    Stack,
    Zeros,
)
from ..formats.table import Format, format_named


def exact_format(expression: Expression) -> Format | None:
    """The type that loses nothing; None where that would take 32 bits for numbers that are stored in fewer.

    E4M3 has 4 significant bits and an E8M0 scale is a power of two, so their product fits BF16; with a float32 scale it
    does not. 4-bit floats with E8M0 scales keep their codes.
    """
    match expression:
        case Read(tensor):
            return format_named("I32" if tensor.dtype == "I64" else tensor.dtype)
        case BlockScaled(scale=scale) if scale.dtype == "F8_E8M0":
            return format_named("BF16")
        case Mxfp4():
            return format_named("MXFP4")
        case Rows(source):
            return exact_format(source)
        case Stack(parts) | SideBySide(parts):
            formats = {exact_format(part) for part in parts}
            return formats.pop() if len(formats) == 1 else None
    return None


def source_bits(expression: Expression) -> float:
    """Bits that a weight's stored form takes for each number, coarse scales of FP8 left out; the most of its parts."""
    match expression:
        case Read(tensor) | Reshape(tensor):
            return 8 * tensor.length / max(prod(tensor.shape), 1)
        case BlockScaled(codes) | Scaled(codes):
            return 8 * codes.length / prod(codes.shape)
        case Nvfp4(codes, scale) | Mxfp4(codes, scale):
            return 8 * (codes.length + scale.length) / prod(expression.shape)
        case Rows(source) | Padded(source) | NegativeExponential(source):
            return source_bits(source)
        case Stack(parts) | SideBySide(parts):
            return max(source_bits(part) for part in parts)
        case GlobalScales() | Zeros():
            return 32.0
