"""Plans: the type of every tensor of a graph, and what that costs, to the byte."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod

from ...archs.encodings import GlobalScales, Nvfp4
from ...archs.expressions import Padded, Stack
from ...archs.graph import Graph
from ...archs.weights import Role, Weight, scale_name
from ...errors import BadInput
from ..formats.table import NO_WEIGHTS, Format, format_named
from .exact import exact_format
from .padding import changed_widths, padded_forms
from .recipes import DOWN_PROJECTIONS, FALLBACKS, LAST_RESORT, VALUE_PROJECTIONS, Position, Recipe

_LEAST_GAIN = 0.01  # of a file, for which blocks of the source are rounded anew
ALIGNMENT = 32  # bytes; GGUF's default, every tensor starts at a multiple of it


@dataclass(frozen=True)
class Form:
    """In which form a file holds its model; results do not depend on it.

    Attributes:
        padding: fill rows up with zeros to fit the recipe's blocks, instead of falling back to other types; by default,
            those rows alone that make the file smaller.
        mtp: keep the blocks for multi-token prediction; by default, unless they rule out padding or are a draft of
            their own, which makes a second file.
    """

    padding: bool | None = None
    mtp: bool | None = None

    def graphs(self, graph: Graph, multiple: int) -> list[Graph]:
        """What a file may hold of a model, with rows padded to a multiple or not, as far as this leaves it open.

        Where `padding` does, the first has no row padded and the last all that may be.
        """
        alone = replace(graph, predictions=())
        found = [*padded_forms(alone if self.mtp is False else graph, multiple)]
        if self.mtp is None and graph.predictions:
            found += (form for form in padded_forms(alone, multiple) if form.hidden_size != graph.hidden_size)
        if self.padding is None:
            return found
        return found[-1:] if self.padding else found[:1]


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as a GGUF file knows it."""

    name: str
    shape: tuple[int, ...]
    type: Format

    @property
    def row_bytes(self) -> int:
        return self.type.row_bytes(self.shape[-1])

    @property
    def bytes(self) -> int:
        return prod(self.shape[:-1]) * self.row_bytes

    @property
    def aligned_bytes(self) -> int:
        return -(-self.bytes // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True)
class PlannedTensor:
    """A weight and the type it will be stored in; `wanted` differs where the row length forced a fallback."""

    weight: Weight
    type: Format
    wanted: Format

    @property
    def stored(self) -> StoredTensor:
        return StoredTensor(self.weight.name, self.weight.shape, self.type)

    @property
    def bytes(self) -> int:
        return self.stored.bytes

    @property
    def aligned_bytes(self) -> int:
        return self.stored.aligned_bytes


@dataclass(frozen=True)
class Plan:
    """Types for all tensors of a graph, in file order.

    `notes` tell how the graph came to differ from the model; `expected_kld` is the KL divergence in nats that
    measurements of single weights let expect, None without any.
    """

    recipe: Recipe
    graph: Graph
    tensors: tuple[PlannedTensor, ...]
    notes: tuple[str, ...] = ()
    expected_kld: float | None = None

    @property
    def bytes(self) -> int:
        """Size of the data section of a GGUF file; its header comes on top."""
        return sum(tensor.aligned_bytes for tensor in self.tensors)

    @property
    def stored(self) -> tuple[StoredTensor, ...]:
        """The tensors of a GGUF file, in its order."""
        return tuple(tensor.stored for tensor in self.tensors)

    def bytes_of(self, tensor: PlannedTensor) -> int:
        """What one tensor takes."""
        return tensor.bytes

    @property
    def bits_per_weight(self) -> float:
        """Padding counts as bytes, not as weights."""
        return 8 * self.bytes / sum(_model_elements(tensor.weight) for tensor in self.tensors)

    @property
    def wants_importance(self) -> bool:
        """Whether any tensor is rounded so coarsely that knowing which of its inputs matter pays."""
        return any(tensor.type.block_size > 1 and tensor.type.bits_per_weight < 8 for tensor in self.tensors)

    @property
    def problems(self) -> tuple[str, ...]:
        """What the user should know before starting: the notes, and one line for each kind of fallback."""
        fallen = [tensor for tensor in self.tensors if tensor.type != tensor.wanted]
        counts = Counter((tensor.wanted, tensor.type, tensor.weight.columns) for tensor in fallen)
        elements: Counter[tuple[Format, Format, int]] = Counter()
        for tensor in fallen:
            elements[tensor.wanted, tensor.type, tensor.weight.columns] += tensor.weight.elements
        total = sum(tensor.weight.elements for tensor in self.tensors)
        lines = list(self.notes)
        for (wanted, used, columns), count in counts.items():
            share = elements[wanted, used, columns] / total
            lines.append(
                f"{count} tensors ({share:.0%} of all weights) have rows of {columns}, not a multiple of "
                f"{wanted.block_size}: stored as {used.name} instead of {wanted.name}"
            )
        return tuple(lines)


def plan_file(graph: Graph, recipe: Recipe, form: Form = Form(), calibrated: bool = False) -> Plan:
    """The plan of a file, whose graph may differ from the model's in what the results do not depend on.

    Args:
        calibrated: whether columns will be weighed by importance; llama.cpp's mixes depend on it.

    Raises BadInput when blocks for multi-token prediction are demanded and there are none.
    """
    mtp = form.mtp
    if mtp and not (graph.predictions or graph.draft):
        raise BadInput("--mtp: this model has no blocks for multi-token prediction; leave the option out")
    notes = list(graph.notes)
    if recipe.of_experts and not graph.experts:
        notes.append(f"{recipe.name} is for experts, of which this model has none: all is {recipe.base}")
    if graph.draft and not mtp:
        notes.append("left out multi-token prediction, which takes a file of its own: --mtp writes it")
    elif graph.draft:
        size = plan_tensors(graph.draft, recipe).bytes
        notes.append(f"multi-token prediction takes a file of its own, of {size / 1e9:.3g} GB more")
    multiple = _largest_block(plan_tensors(graph, recipe, calibrated))
    plans = [plan_tensors(form_graph, recipe, calibrated) for form_graph in form.graphs(graph, multiple)]
    plan = _smallest(plans)
    if mtp is None and graph.predictions and not plan.graph.predictions:
        notes.append("left out multi-token prediction, which rules out padding the hidden size; --mtp keeps it")
    if form.padding is not False:
        (unpadded,) = replace(form, padding=False).graphs(graph, multiple)
        notes += _describe_padding(plan_tensors(unpadded, recipe, calibrated), plan, plans[-1])
    return replace(plan, notes=tuple(notes))


def _largest_block(plan: Plan) -> int:
    """The largest block of what a recipe is about: its base, and what it wants of experts."""
    wanted = (tensor.wanted for tensor in plan.tensors if tensor.weight.experts is not None)
    return max(format.block_size for format in (format_named(plan.recipe.base), *wanted))


def _smallest(plans: Sequence[Plan]) -> Plan:
    """The least bytes; neither a block for multi-token prediction is given up for its own, nor for next to nothing
    what is stored as the source has it."""
    best = min(plans, key=_bytes_without_predictions)
    gain = 1 - _bytes_without_predictions(best) / _bytes_without_predictions(plans[0])
    if gain < _LEAST_GAIN and any(map(_keeps_blocks, plans[0].tensors)):
        return plans[0]
    hidden = best.graph.hidden_size
    return min((plan for plan in plans if plan.graph.hidden_size == hidden), key=lambda plan: plan.bytes)


def _keeps_blocks(tensor: PlannedTensor) -> bool:
    """Whether blocks of codes are stored as the source has them, which padding would end."""
    return tensor.type.block_size > 1 and tensor.type == exact_format(tensor.weight.source)


def _bytes_without_predictions(plan: Plan) -> int:
    own = {weight.name for weight in replace(plan.graph, predictions=()).weights()}
    return sum(tensor.aligned_bytes for tensor in plan.tensors if tensor.weight.name in own)


def _describe_padding(unpadded: Plan, plan: Plan, padded: Plan) -> Iterator[str]:
    """What was padded and what that saves, or what padding all rows would cost."""
    changes = changed_widths(unpadded.graph, plan.graph)
    possible = changed_widths(unpadded.graph, padded.graph)
    before, after, all_padded = map(_bytes_without_predictions, (unpadded, plan, padded))
    if changes:
        change = _change(before, after)
        yield f"padded rows with zeros, which changes no result: {changes}; that makes the file {change}"
    elif possible:
        yield f"no rows padded with zeros ({possible}): that would make the file {_change(before, all_padded)}"


def _change(before: int, after: int) -> str:
    return f"{abs(after / before - 1):.1%} {'larger' if after > before else 'smaller'}"


def plan_tensors(graph: Graph, recipe: Recipe, calibrated: bool = False) -> Plan:
    """The stock plan: the recipe's types, protected weights in float32, fallbacks where rows do not fit.

    Args:
        calibrated: as in `plan_file`.
    """
    layers = len(graph.layers) + len(graph.predictions)
    heads_per_group = _heads_per_group(graph)
    experts = graph.experts
    values = sum(weight.role in VALUE_PROJECTIONS for weight in graph.weights())
    seen: Counter[Role] = Counter()
    tensors: list[PlannedTensor] = []
    for weight in graph.weights():
        kind = _counted_as(weight.role)
        if kind is Role.ATTENTION_V:  # where only some layers have attention, llama.cpp counts these alone
            layer, of_layers = seen[kind], values
        else:
            layer, of_layers = (weight.layer or 0) if experts else seen[kind], layers
        position = Position(layer, of_layers, seen[kind], heads_per_group, experts, calibrated)
        seen[kind] += 1
        if recipe.native:
            tensors += _plan_native(weight, graph)
        else:
            tensors.append(_plan_tensor(weight, recipe, position))
    return Plan(recipe, graph, tuple(tensors))


def _counted_as(role: Role) -> Role:
    """One of the kinds whose tensors are counted together."""
    if role in VALUE_PROJECTIONS:
        return Role.ATTENTION_V
    return Role.EXPERT_DOWN if role in DOWN_PROJECTIONS else role


def _heads_per_group(graph: Graph) -> int:
    """What llama.cpp's mixes call grouped-query attention: what a file tells of the first layer."""
    told = (operation.heads_per_group for operation in graph.operations())
    return next((heads for heads in told if heads is not None), 0)


def _plan_tensor(weight: Weight, recipe: Recipe, position: Position) -> PlannedTensor:
    if weight.role.keep_f32 or len(weight.shape) == 1:
        return PlannedTensor(weight, format_named("F32"), format_named("F32"))
    if weight.role is Role.HASH_TABLE:
        return PlannedTensor(weight, format_named("I32"), format_named("I32"))
    exact = exact_format(weight.source)
    wanted = format_named(recipe.type_of(weight.role, position))
    if weight.role in (Role.HEAD, Role.PER_LAYER_TABLE) and not format_named(recipe.base).fits(weight.columns):
        fitting = _fitting("Q8_0", weight.columns)
    else:
        fitting = _fitting(wanted.name, weight.columns)
    if recipe.quantized and exact and exact.bits_per_weight < fitting.bits_per_weight:
        fitting = exact  # more bits than the source has would buy nothing
        wanted = exact if exact.bits_per_weight < wanted.bits_per_weight else wanted
    return PlannedTensor(weight, fitting, wanted)


def _plan_native(weight: Weight, graph: Graph) -> tuple[PlannedTensor, ...]:
    """What is stored as a file of this format can store it; the nearest type where there is no such form."""
    match weight.source:
        case Nvfp4():
            matrices = [weight.source]
        case Stack(experts):
            matrices = [expert for expert in experts if isinstance(expert, Nvfp4)]
        case _:
            matrices = []
    nvfp4 = format_named("NVFP4")
    fits = len(matrices) == weight.matrices and nvfp4.fits(weight.columns)
    if fits and not any(matrix.global_scale for matrix in matrices):
        return (PlannedTensor(weight, nvfp4, nvfp4),)
    if fits and weight.role in graph.scaled_roles:
        codes = tuple(replace(matrix, global_scale=None) for matrix in matrices)
        stored = replace(weight, source=Stack(codes) if weight.stack else codes[0])
        scales = GlobalScales(tuple(matrices))
        f32 = format_named("F32")
        return (
            PlannedTensor(stored, nvfp4, nvfp4),
            PlannedTensor(Weight(scale_name(weight.name), Role.SCALE, scales.shape, scales), f32, f32),
        )
    exact = exact_format(weight.source) or format_named("Q8_0")
    wanted = format_named("F32") if weight.role.keep_f32 or len(weight.shape) == 1 else exact
    return (PlannedTensor(weight, _fitting(wanted.name, weight.columns), wanted),)


def _model_elements(weight: Weight) -> int:
    return prod(weight.source.source.shape) if isinstance(weight.source, Padded) else weight.elements


def _fitting(name: str, columns: int) -> Format:
    """The type itself, or the first of its fallbacks whose blocks divide the row."""
    while not format_named(name).fits(columns):
        name = FALLBACKS.get(name, LAST_RESORT)
    return format_named(name)


def override_types(plan: Plan, overrides: Sequence[tuple[str, str]]) -> Plan:
    """A plan with other types for the tensors whose names match; protected weights stay in float32.

    Args:
        overrides: regular expressions searched in GGUF tensor names, and type names; the first match counts.

    Raises BadInput for a bad expression, an unknown type, one that rows do not fit, and an override without effect.
    """
    compiled = [(pattern, _compiled(pattern), _type_for_weights(name)) for pattern, name in overrides]
    used: set[str] = set()
    tensors = []
    for tensor in plan.tensors:
        found = next(((text, wanted) for text, regex, wanted in compiled if regex.search(tensor.weight.name)), None)
        if found and tensor.weight.may_be_quantized:
            pattern, wanted = found
            used.add(pattern)
            wanted.row_bytes(tensor.weight.columns)
            tensor = PlannedTensor(tensor.weight, wanted, wanted)
        tensors.append(tensor)
    for pattern, _, _ in compiled:
        if pattern not in used:
            raise BadInput(
                f"--tensor-type {pattern!r} matches no tensor that may be quantized: see the names in `plan`"
            )
    return replace(plan, tensors=tuple(tensors))


def _type_for_weights(name: str) -> Format:
    if name in NO_WEIGHTS:
        raise BadInput(f"--tensor-type gives {name}, which holds no weights: choose another type")
    return format_named(name)


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern, re.IGNORECASE)
    except re.error as error:
        raise BadInput(f"--tensor-type {pattern!r} is not a regular expression: {error}") from None
