"""Which type every tensor of a graph gets, and what that costs, to the byte."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from ..archs.errors import BadInput
from ..archs.graph import Attention, Graph
from ..archs.weights import Role, Weight
from .formats import Format, format_named
from .recipes import FALLBACKS, LAST_RESORT, Position, Recipe

ALIGNMENT = 32  # bytes; GGUF's default, every tensor starts at a multiple of it


@dataclass(frozen=True)
class PlannedTensor:
    """A weight and the type it will be stored in; `wanted` differs where the row length forced a fallback."""

    weight: Weight
    type: Format
    wanted: Format

    @property
    def row_bytes(self) -> int:
        return self.type.row_bytes(self.weight.columns)

    @property
    def bytes(self) -> int:
        return prod(self.weight.shape[:-1]) * self.row_bytes

    @property
    def aligned_bytes(self) -> int:
        return -(-self.bytes // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True)
class Plan:
    """Types for all tensors of a graph, in file order."""

    recipe: Recipe
    tensors: tuple[PlannedTensor, ...]

    @property
    def bytes(self) -> int:
        """Size of the data section of a GGUF file; its header comes on top."""
        return sum(tensor.aligned_bytes for tensor in self.tensors)

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.bytes / sum(tensor.weight.elements for tensor in self.tensors)

    @property
    def problems(self) -> tuple[str, ...]:
        """What the user should know before starting: one line for each kind of fallback."""
        fallen = [tensor for tensor in self.tensors if tensor.type != tensor.wanted]
        counts = Counter((tensor.wanted, tensor.type, tensor.weight.columns) for tensor in fallen)
        total = sum(tensor.weight.elements for tensor in self.tensors)
        lines = []
        for (wanted, used, columns), count in counts.items():
            share = sum(
                tensor.weight.elements
                for tensor in fallen
                if (tensor.wanted, tensor.type, tensor.weight.columns) == (wanted, used, columns)
            )
            lines.append(
                f"{count} tensors ({share / total:.0%} of all weights) have rows of {columns}, not a multiple of "
                f"{wanted.block_size}: stored as {used.name} instead of {wanted.name}"
            )
        return tuple(lines)


def plan_tensors(graph: Graph, recipe: Recipe, importance: bool = False) -> Plan:
    """The stock plan: the recipe's types, protected weights in float32, fallbacks where rows do not fit.

    Args:
        importance: whether an importance matrix will be used; llama.cpp's mixes depend on it.
    """
    attention = next((op for op in graph.operations() if isinstance(op, Attention)), None)
    heads_per_group = attention.heads // attention.key_value_heads if attention else 0
    seen: Counter[Role] = Counter()
    tensors = []
    for weight in graph.weights():
        position = Position(weight.layer or 0, len(graph.layers), seen[weight.role], heads_per_group, importance)
        seen[weight.role] += 1
        tensors.append(_plan_tensor(weight, recipe, position))
    return Plan(recipe, tuple(tensors))


def _plan_tensor(weight: Weight, recipe: Recipe, position: Position) -> PlannedTensor:
    if weight.role.protected or len(weight.shape) == 1:
        return PlannedTensor(weight, format_named("F32"), format_named("F32"))
    wanted = format_named(recipe.type_of(weight.role, position))
    if weight.role is Role.HEAD and weight.columns % format_named(recipe.base).block_size:
        return PlannedTensor(weight, _fitting("Q8_0", weight.columns), wanted)
    return PlannedTensor(weight, _fitting(wanted.name, weight.columns), wanted)


def _fitting(name: str, columns: int) -> Format:
    """The type itself, or the first of its fallbacks whose blocks divide the row."""
    while columns % format_named(name).block_size:
        name = FALLBACKS.get(name, LAST_RESORT)
    return format_named(name)


def override_types(plan: Plan, overrides: Sequence[tuple[str, str]]) -> Plan:
    """A plan with other types for the tensors whose names match; protected weights stay in float32.

    Args:
        overrides: regular expressions searched in GGUF tensor names, and type names; the first match counts.

    Raises BadInput for a bad expression, an unknown type, one that rows do not fit, and an override without effect.
    """
    compiled = [(pattern, _compiled(pattern), format_named(name)) for pattern, name in overrides]
    used: set[str] = set()
    tensors = []
    for tensor in plan.tensors:
        found = next(((text, wanted) for text, regex, wanted in compiled if regex.search(tensor.weight.name)), None)
        if found and not tensor.weight.role.protected and len(tensor.weight.shape) > 1:
            pattern, wanted = found
            used.add(pattern)
            wanted.row_bytes(tensor.weight.columns)
            tensor = PlannedTensor(tensor.weight, wanted, wanted)
        tensors.append(tensor)
    for pattern, _, _ in compiled:
        if pattern not in used:
            raise BadInput(
                f"--tensor-type {pattern!r} matches no tensor that may be quantised: see the names in `plan`"
            )
    return Plan(plan.recipe, tuple(tensors))


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern, re.IGNORECASE)
    except re.error as error:
        raise BadInput(f"--tensor-type {pattern!r} is not a regular expression: {error}") from None
