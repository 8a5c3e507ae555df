"""Walks over a graph's dataclasses: its weights, the same with other weights or operations, its picture as JSON."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass, replace
from enum import Enum
from typing import Any, TypeVar

from ..weights import Weight
from .operation import Operation

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
    changed: Node = _with(node, Weight, change)
    return changed


def with_operations(node: Node, change: Callable[[Operation], Operation]) -> Node:
    """The same layer or graph with each of its operations changed."""
    changed: Node = _with(node, Operation, change)
    return changed


def _with(node: Any, kind: type, change: Callable[[Any], Any]) -> Any:
    """The same block with everything of a kind in it changed."""
    if isinstance(node, kind):
        return change(node)
    if isinstance(node, tuple):
        return tuple(_with(item, kind, change) for item in node)
    if is_dataclass(node) and not isinstance(node, type | Weight):
        return replace(node, **{field.name: _with(getattr(node, field.name), kind, change) for field in fields(node)})
    return node


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
