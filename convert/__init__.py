"""Converting: one streaming pass from a checkpoint to a file that somebody else's engine runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .pipeline import convert

__all__ = ["convert"]


def __getattr__(name: str) -> Any:
    """`moecast.convert.convert`, imported only when somebody asks for it."""
    if name in __all__:
        from . import pipeline

        return getattr(pipeline, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
