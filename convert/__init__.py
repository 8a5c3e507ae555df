"""Converting: one streaming pass from a checkpoint to a file that somebody else's engine runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .pipeline import convert as convert


def __getattr__(name: str) -> Any:
    """`moecast.convert.convert`, imported only when somebody asks for it."""
    if name == "convert":
        from .pipeline import convert

        return convert
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
