"""Drafting blocks within a model: kept as long as they are whole, because the model runs without."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from ..errors import BadInput
from .graph import Graph


def with_draft(there: bool, read: Callable[[bool], Graph]) -> Graph:
    """What `read` makes of a checkpoint with its drafting block, if one is there; with a note why, without it."""
    if not there:
        return read(False)
    try:
        return read(True)
    except BadInput as error:
        graph = read(False)
        return replace(graph, notes=(f"multi-token prediction is left out: {error}", *graph.notes))
