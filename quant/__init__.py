"""Block formats of ggml, their quantizers, and the choice of types.

Importing this package loads no torch; `quantize` and `dequantize` load it when first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .formats.table import FORMATS, Format, format_named, format_with_id

if TYPE_CHECKING:
    from .formats.quantize import dequantize, quantize

__all__ = ["FORMATS", "Format", "dequantize", "format_named", "format_with_id", "quantize"]


def __getattr__(name: str) -> Any:
    if name in ("dequantize", "quantize"):
        from .formats import quantize as module

        return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
