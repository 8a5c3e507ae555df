"""The smallest ggml type that holds a weight exactly as its source stores it."""

from __future__ import annotations

from ..archs.weights import BlockScaled, Expression, Mxfp4, Read, Rows, SideBySide, Stack
from .formats import Format, format_named


def native_format(expression: Expression) -> Format:
    """The type that loses nothing, F32 where no smaller one can be named.

    E4M3 has 4 significant bits and an E8M0 scale is a power of two: their product fits BF16. A float32 scale needs
    float32. 4-bit floats keep their codes.
    """
    match expression:
        case Read(tensor):
            return format_named("I32" if tensor.dtype == "I64" else tensor.dtype)
        case BlockScaled(scale=scale) if scale.dtype == "F8_E8M0":
            return format_named("BF16")
        case Mxfp4():
            return format_named("MXFP4")
        case Rows(source):
            return native_format(source)
        case Stack(parts) | SideBySide(parts):
            formats = {native_format(part) for part in parts}
            return formats.pop() if len(formats) == 1 else format_named("F32")
    return format_named("F32")
