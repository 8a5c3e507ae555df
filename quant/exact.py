"""The smallest ggml type that holds every number of a weight as its source stores it."""

from __future__ import annotations

from ..archs.weights import BlockScaled, Expression, Mxfp4, Read, Rows, SideBySide, Stack
from .formats import Format, format_named


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
