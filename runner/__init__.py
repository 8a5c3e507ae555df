"""Executes a graph in torch, layer by layer, and measures what comes out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .measure.evaluate import parity, perplexity

__all__ = ["parity", "perplexity"]


def __getattr__(name: str) -> Any:
    """`moecast.runner.parity` and `perplexity`, imported only when somebody asks for them."""
    if name in __all__:
        from .measure import evaluate

        return getattr(evaluate, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
