"""Executes a graph in torch, layer by layer, and measures what comes out."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .measure.acceptance import acceptance
    from .measure.candidates import compare
    from .measure.evaluate import parity, perplexity
    from .settings import Compute, Evaluation

__all__ = ["Compute", "Evaluation", "acceptance", "compare", "parity", "perplexity"]

_MODULES = {
    "Compute": ".settings",
    "Evaluation": ".settings",
    "acceptance": ".measure.acceptance",
    "compare": ".measure.candidates",
}


def __getattr__(name: str) -> Any:
    """`moecast.runner.parity`, what else is public and its settings, imported only when somebody asks for them."""
    if name in __all__:
        return getattr(import_module(_MODULES.get(name, ".measure.evaluate"), __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
