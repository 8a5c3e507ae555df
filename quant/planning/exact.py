"""The ggml type that holds a weight without loss."""

from __future__ import annotations

from ...archs.expressions import Expression
from ..formats.table import Format, format_named


def exact_format(expression: Expression) -> Format | None:
    """The type that loses nothing; None where that would take 32 bits for numbers that are stored in fewer."""
    return format_named(expression.exact) if expression.exact else None
