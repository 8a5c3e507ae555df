"""Which type every tensor of a graph gets, and what that costs, to the byte."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from math import prod

from ..archs.graph import Attention, Graph
from ..archs.weights import Role, Weight
from .formats import Format, format_named
from .native import native_format
from .recipes import DOWN_PROJECTIONS, FALLBACKS, LAST_RESORT, Position, Recipe

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
    layers = len(graph.layers) + len(graph.predictions)
    heads_per_group = _heads_per_group(graph)
    values = sum(weight.role is Role.ATTENTION_V for weight in graph.weights())
    seen: Counter[Role] = Counter()
    tensors = []
    for weight in graph.weights():
        kind = Role.EXPERT_DOWN if weight.role in DOWN_PROJECTIONS else weight.role
        if kind is Role.ATTENTION_V:  # where only some layers have attention, llama.cpp counts these alone
            position = Position(seen[kind], values, seen[kind], heads_per_group, importance)
        else:
            position = Position(weight.layer or 0, layers, seen[kind], heads_per_group, importance)
        seen[kind] += 1
        tensors.append(_plan_tensor(weight, recipe, position))
    return Plan(recipe, tuple(tensors))


def _heads_per_group(graph: Graph) -> int:
    """What llama.cpp's mixes call grouped-query attention: that of the first layer alone, 0 if it has none."""
    operations = (sublayer.operation for sublayer in graph.layers[0].sublayers)
    return next((op.heads // op.key_value_heads for op in operations if isinstance(op, Attention)), 0)


def _plan_tensor(weight: Weight, recipe: Recipe, position: Position) -> PlannedTensor:
    if weight.role.protected or len(weight.shape) == 1:
        return PlannedTensor(weight, format_named("F32"), format_named("F32"))
    native = native_format(weight.source)
    if weight.role is Role.HASH_TABLE or recipe.lossless:
        return PlannedTensor(weight, native, native)
    wanted = format_named(recipe.type_of(weight.role, position))
    if recipe.quantised and native.bits_per_weight < wanted.bits_per_weight:
        return PlannedTensor(weight, native, native)  # more bits than the source has would buy nothing
    if weight.role is Role.HEAD and weight.columns % format_named(recipe.base).block_size:
        return PlannedTensor(weight, _fitting("Q8_0", weight.columns), wanted)
    return PlannedTensor(weight, _fitting(wanted.name, weight.columns), wanted)


def _fitting(name: str, columns: int) -> Format:
    """The type itself, or the first of its fallbacks whose blocks divide the row."""
    while columns % format_named(name).block_size:
        name = FALLBACKS.get(name, LAST_RESORT)
    return format_named(name)
