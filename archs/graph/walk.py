"""Walks over the dataclasses of a graph: its weights, the same graph with other weights, its picture as JSON."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass, replace
from enum import Enum
from typing import Any, TypeVar

from ..weights import Weight

Node = TypeVar("Node")


def weights_in(node: Any) -> Iterator[Weight]:
    """Every weight of a block, a layer or a whole graph once, in file order; blocks may share one."""
    return iter({weight.name: weight for weight in parts_in(node, Weight)}.values())


def parts_in(node: Any, kind: type[Node]) -> Iterator[Node]:
    """Every part of a kind in a block, a layer or a whole graph, in file order."""
    if isinstance(node, kind):
        yield node
    elif isinstance(node, tuple):
        for item in node:
            yield from parts_in(item, kind)
    elif is_dataclass(node) and not isinstance(node, Weight):
        for field in fields(node):
            yield from parts_in(getattr(node, field.name), kind)


def with_weights(node: Node, change: Callable[[Weight], Weight]) -> Node:
    """The same block with each of its weights changed."""
    changed: Any = node
    if isinstance(node, Weight):
        changed = change(node)
    elif isinstance(node, tuple):
        changed = tuple(with_weights(item, change) for item in node)
    elif is_dataclass(node) and not isinstance(node, type):
        changed = replace(
            node, **{field.name: with_weights(getattr(node, field.name), change) for field in fields(node)}
        )
    return changed  # type: ignore[no-any-return]


def graph_as_json(node: Any) -> Any:
    """A JSON-able picture of a graph or any part of it; weights appear as name, role and shape."""
    if isinstance(node, Weight):
        return {"name": node.name, "role": node.role.value, "shape": list(node.shape)}
    if isinstance(node, Enum):
        return node.value
    if isinstance(node, tuple):
        return [graph_as_json(item) for item in node]
    if is_dataclass(node):
        values = {field.name: graph_as_json(getattr(node, field.name)) for field in fields(node)}
        return {"kind": type(node).__name__} | values
    return node
