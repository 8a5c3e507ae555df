"""Plans for ONNX: types that ONNX Runtime has kernels for, and where their numbers lie in its external data."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod

from ...archs.graph import Graph
from ...archs.weights import Role, StackKind, Weight
from ...errors import BadInput
from ..formats.table import LARGEST_BLOCK, Format, format_named
from .exact import exact_format
from .onnx_packing import PACKINGS, PLAIN, row_bytes, storable
from .plan import Plan, PlannedTensor, plan_tensors
from .recipes import Recipe, recipe_named

ONNX_RECIPES = ("Q4_0", "Q8_0", "Q6_K", "Q5_0", "Q3_K_S", "Q2_0", "F32")
ALIGNMENT = 4096  # bytes: a page, so that weights can be mapped
SHARD_BYTES = 4 << 30  # a single array may exceed it


@dataclass(frozen=True)
class StoredArray:
    """One array of the external data, `bytes` long at `offset` of `file`; `dtype` is numpy's name."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    offset: int

    @property
    def bytes(self) -> int:
        return prod(self.shape) * _ITEM_BYTES[self.dtype]

    @property
    def row_bytes(self) -> int:
        return self.shape[-1] * _ITEM_BYTES[self.dtype]

    def rows(self, first: int, last: int) -> StoredArray:
        """Rows `first` to before `last` of a matrix."""
        if (first, last) == (0, self.shape[0]):
            return self
        offset = self.offset + first * self.row_bytes
        return replace(self, name=f"{self.name}.{first}", shape=(last - first, *self.shape[1:]), offset=offset)


_ITEM_BYTES = {"uint8": 1, "float32": 4, "int32": 4}


@dataclass(frozen=True)
class Placement:
    """Where a weight lies: its row r is row `stride * r + offset`, for every offset, of each array.

    `arrays` are numbers and scales, or the values alone. Rows count over all leading dimensions.
    """

    type: Format
    arrays: tuple[StoredArray, ...]
    stride: int
    offsets: tuple[int, ...]


@dataclass(frozen=True)
class OnnxPlan(Plan):
    """A plan whose types all have a form in ONNX Runtime, with the layout of its external data."""

    @cached_property
    def placements(self) -> dict[str, Placement]:
        """Where every weight lies, by its name."""
        return dict(_place(self))

    @property
    def bytes(self) -> int:
        return sum(self.files.values())

    @property
    def files(self) -> dict[str, int]:
        """The files of the external data and their sizes."""
        arrays = [array for placement in self.placements.values() for array in placement.arrays]
        return {array.file: array.offset + _aligned(array.bytes) for array in sorted(arrays, key=_end)}

    def bytes_of(self, tensor: PlannedTensor) -> int:
        copies = len(self.placements[tensor.weight.name].offsets)
        return copies * prod(tensor.weight.shape[:-1]) * row_bytes(tensor.type, tensor.weight.columns)


def _end(array: StoredArray) -> tuple[str, int]:
    return array.file, array.offset


def onnx_recipe_named(name: str) -> Recipe:
    """The recipe of that name. Raises BadInput for one whose types ONNX Runtime does not have."""
    recipe = recipe_named(name)
    if recipe.name not in ONNX_RECIPES:
        raise BadInput(
            f"--quant {recipe.name} has types that ONNX Runtime cannot multiply with, expected one of "
            f"{', '.join(ONNX_RECIPES)}"
        )
    return recipe


def plan_onnx(graph: Graph, recipe: Recipe) -> OnnxPlan:
    """The recipe's types as far as ONNX Runtime has them; all experts of a layer get one. No multi-token prediction."""
    notes = list(graph.notes)
    if graph.predictions or graph.draft:
        notes.append("left out multi-token prediction, which the ONNX model has no use for")
    graph = replace(graph, predictions=(), draft=None)
    chosen = plan_tensors(graph, recipe).tensors
    tensors = {tensor.weight.name: _stored(tensor, recipe) for tensor in chosen}
    if any(tensors[old.weight.name].type != old.type == exact_format(old.weight.source) for old in chosen):
        notes.append(
            f"rounded the source's 4-bit floats once more, to {recipe.base}: --quant Q8_0 keeps them, in 8 bits"
        )
    if recipe.quantized and any(old.weight.stack is StackKind.HEADS for old in chosen):
        notes.append("matrices of heads stay in float32: ONNX Runtime has no product of packed ones")
    for operation in graph.operations():
        stacks = [tensors[stack.name] for stack in operation.stacks]
        if stacks:
            shared = _type_of_all(stacks)
            changed = (stack for stack in stacks if stack.type != shared)
            tensors |= {stack.weight.name: replace(stack, type=shared, wanted=shared) for stack in changed}
    return OnnxPlan(recipe, graph, tuple(tensors.values()), tuple(notes))


_COMMON = tuple(map(format_named, ("Q2_0", "Q4_0", "Q8_0")))


def _stored(tensor: PlannedTensor, recipe: Recipe) -> PlannedTensor:
    """With the type that the recipe chose for GGUF, or the nearest one that ONNX Runtime has."""
    type, base = tensor.type, format_named(recipe.base)
    if tensor.weight.stack is StackKind.HEADS:
        return replace(tensor, type=format_named("F32"), wanted=format_named("F32"))  # see `plan_onnx`
    if not storable(type):
        type = min(_COMMON, key=lambda other: abs(other.bits_per_weight - type.bits_per_weight))
    elif type.name in PACKINGS and type == exact_format(tensor.weight.source):
        type = min(type, base, key=lambda type: row_bytes(type, LARGEST_BLOCK))  # 4-bit floats take 9 bits here
    if type.fits(tensor.weight.columns):
        return replace(tensor, type=type, wanted=tensor.wanted if type == tensor.type else type)
    return replace(tensor, type=format_named("F32"))


def _type_of_all(stacks: Sequence[PlannedTensor]) -> Format:
    """The largest of the stacks' types that fits them all: an operator takes experts of one type only."""
    fitting = [s.type for s in stacks if all(s.type.fits(other.weight.columns) for other in stacks)]
    return max(fitting, key=lambda type: row_bytes(type, LARGEST_BLOCK), default=format_named("F32"))


def _place(plan: OnnxPlan) -> Iterator[tuple[str, Placement]]:
    """Weights in file order, except that an expert's gate and up projection share one array."""
    types = {tensor.weight.name: tensor.type for tensor in plan.tensors}
    partners = _partners(plan.graph)
    shelf = DataLayout()
    for tensor in plan.tensors:
        weight = tensor.weight
        if weight.name not in partners:
            yield weight.name, Placement(types[weight.name], shelf.put(weight, weight.name, tensor.type, 1), 1, (0,))
        elif partners[weight.name]:
            gate_and_up = partners[weight.name]
            arrays = shelf.put(weight, f"{weight.name}.interleaved", tensor.type, 2)
            for partner, offsets in gate_and_up:
                yield partner.name, Placement(types[partner.name], arrays, 2, offsets)


def _partners(graph: Graph) -> dict[str, tuple[tuple[Weight, tuple[int, ...]], ...]]:
    """What shares the array of a stack of experts, and the rows that each takes of every two; () for the second one.

    ONNX Runtime wants the rows of gate and up by turns. It has no squared ReLU, but up serves as its own gate:
    u * sigmoid(a * u) * u is max(u, 0)^2 for a large a.
    """
    result: dict[str, tuple[tuple[Weight, tuple[int, ...]], ...]] = {}
    for operation in graph.operations():
        by_role = {stack.role: stack for stack in operation.stacks}
        gate, up = by_role.get(Role.EXPERT_GATE), by_role.get(Role.EXPERT_UP)
        if gate and up:
            result |= {gate.name: ((gate, (0,)), (up, (1,))), up.name: ()}
        elif up:
            result[up.name] = ((up, (0, 1)),)
    return result


class DataLayout:
    """Puts arrays one after another, into further files where one is full."""

    def __init__(self) -> None:
        self._number, self._used = 1, 0

    def put(self, weight: Weight, name: str, type: Format, stride: int) -> tuple[StoredArray, ...]:
        """The arrays that hold `stride` times the rows of a weight."""
        *leading, columns = weight.shape
        if leading:
            leading[-1] *= stride
        packing = PACKINGS.get(type.name)
        if not packing:
            return (self._array(name, PLAIN[type.name], (*leading, columns)),)
        numbers = self._array(f"{name}.numbers", "uint8", (*leading, packing.number_bytes(columns)))
        return numbers, self._array(f"{name}.scales", "float32", (*leading, packing.scales(columns)))

    def _array(self, name: str, dtype: str, shape: tuple[int, ...]) -> StoredArray:
        size = _aligned(prod(shape) * _ITEM_BYTES[dtype])
        if self._used and self._used + size > SHARD_BYTES:
            self._number, self._used = self._number + 1, 0
        array = StoredArray(name, dtype, shape, f"model-{self._number:05d}.onnx_data", self._used)
        self._used += size
        return array


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
