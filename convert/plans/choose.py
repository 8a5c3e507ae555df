"""From what the user asks for, a recipe, a size, a plan file or another file, to a plan."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path

from ...archs.graph import Graph
from ...errors import BadInput
from ...progress import NoProgress
from ...quant.planning.allocation import Damage, Key, plan_within, typical_damage
from ...quant.planning.file_formats import plan_format
from ...quant.planning.fit import Machine, MachinePlan, fit
from ...quant.planning.knapsack import BudgetTooSmall
from ...quant.planning.padding import pad
from ...quant.planning.plan import Plan, plan_tensors
from ...quant.planning.plan_file import StoredTypes, plan_like, read_plan_file
from ...quant.planning.recipes import recipe_named
from ...sources.gguf import read_gguf
from ...sources.model import Model
from ..gguf.writer import header_bytes
from ..pipeline import gguf_metadata

_BLOCK = 256  # rows are padded to multiples of this
_MOST_BITS = 64
_HEADER_SLACK = 4096  # bytes; the header's names of files and plans are not final when a plan is made
_HEADER_PER_WORD = 32  # bytes of a header for each word of a vocabulary that is not here


@dataclass(frozen=True)
class Goal:
    """What a file should be; the first of the fields that is set counts.

    Attributes:
        plan: a file of `moecast plan -o`.
        like: a GGUF file whose types to take.
        size: bytes of the finished file, all parts together.
        bits_per_weight: average over all weights.
        quant: a recipe name; where nothing is set, the usual one of the file format.
        bytes_per_token: with a size, the most that one token may touch.
    """

    quant: str | None = None
    size: int | None = None
    bits_per_weight: float | None = None
    plan: Path | None = None
    like: Path | None = None
    bytes_per_token: float | None = None

    @property
    def is_recipe(self) -> bool:
        return not (self.plan or self.like or self.is_budget)

    @property
    def is_budget(self) -> bool:
        return not self.plan and not self.like and (self.size is not None or self.bits_per_weight is not None)


def feeds_back(asked: bool | None, goal: Goal, calibrated: bool) -> bool:
    """Whether to round with error feedback: as asked; else where there is calibration text, unless for a recipe."""
    return calibrated and not goal.is_recipe if asked is None else asked


def choose_plan(
    model: Model,
    goal: Goal,
    file_format: str = "gguf",
    padding: bool = True,
    mtp: bool | None = None,
    calibrated: bool = False,
) -> Plan:
    """The plan for a model that nothing is known of: a budget is shared out by what is typical of each role.

    `calibrated` tells whether weights will be rounded with an importance matrix.

    Raises BadInput for a budget that is too small, or a file that does not belong to this model.
    """
    if not goal.is_recipe:
        refuse_mixed_types(file_format)
    if goal.plan:
        return plan_like(model.graph, read_plan_file(goal.plan))
    if goal.like:
        return plan_like(model.graph, types_of_gguf(goal.like))
    if goal.is_budget:
        damage = typical_damage(model.graph)
        return plan_for_budget(
            model.graph, budget_of(model, goal), damage, padding=padding, mtp=mtp, calibrated=calibrated
        )
    return plan_format(file_format, model.graph, goal.quant, padding, mtp, calibrated)


def refuse_mixed_types(file_format: str) -> None:
    """Raises BadInput for a file format that cannot hold whatever a plan says of each weight."""
    if file_format != "gguf":
        raise BadInput(
            f"--to {file_format}: its experts have one width for all projections of a layer, so that types cannot be "
            "chosen weight by weight; use --quant"
        )


@dataclass(frozen=True)
class Budget:
    """What a plan may take: bytes of the data section, bytes that one token touches; and what to call the plan.

    `in_words` says bytes of the data section as the user counts them, rounded up.
    """

    name: str
    bytes: int
    bytes_per_token: float | None = None
    in_words: Callable[[int], str] = "{} bytes".format


def budget_of(model: Model, goal: Goal) -> Budget:
    """What the header leaves of a size, or so many bits for each weight of the model."""
    if goal.size is not None:
        header = _header_bytes(model)
        return Budget(
            f"{goal.size / 1e9:.3g}GB",
            goal.size - header,
            goal.bytes_per_token,
            lambda size: f"--size {ceil((size + header) / 1e4) / 100:.2f}MB",
        )
    assert goal.bits_per_weight is not None
    if not 0 <= goal.bits_per_weight <= _MOST_BITS:
        raise BadInput(f"--bpw is {goal.bits_per_weight}, expected bits for each weight, at most {_MOST_BITS}")
    weights = model.graph.parameters()
    size = int(goal.bits_per_weight * weights / 8)
    return Budget(
        f"{goal.bits_per_weight:.2f}bpw",
        size,
        goal.bytes_per_token,
        lambda size: f"--bpw {ceil(size * 800 / weights) / 100:.2f}",
    )


def plan_for_budget(
    graph: Graph,
    budget: Budget,
    damage: Damage,
    *,
    padding: bool = True,
    mtp: bool | None = None,
    calibrated: bool = False,
    together: Key | None = None,
) -> Plan:
    """The plan of least damage under a budget, with rows padded where that does less; see `plan_within`.

    Types of less than two bits are used with `calibrated` only, and only where nothing else fits.
    """
    found: list[tuple[float, Plan]] = []
    refusals: list[BadInput] = []
    for one_bit in (False, True) if calibrated else (False,):
        for form in variants(graph, padding, mtp) if not found else ():
            try:
                plan = plan_within(
                    form,
                    budget.bytes,
                    damage,
                    name=budget.name,
                    one_bit=one_bit,
                    together=together,
                    active_budget=budget.bytes_per_token,
                )
            except BadInput as error:
                refusals.append(error)
                continue
            own = {weight.name for weight in replace(form, predictions=()).weights()}
            found.append((sum(damage.of(t.weight, t.type) for t in plan.tensors if t.weight.name in own), plan))
    if not found:
        raise _least_of(refusals, budget)
    best = min(found, key=lambda pair: pair[0])[1]
    return replace(best, notes=_notes(graph, best, damage))


def _least_of(refusals: Sequence[BadInput], budget: Budget) -> BadInput:
    """Of what was refused, what would come closest."""
    sizes = [refusal.least for refusal in refusals if isinstance(refusal, BudgetTooSmall)]
    if not sizes:
        return refusals[-1]
    return BadInput(f"{budget.name} is too little for this model: ask for at least {budget.in_words(min(sizes))}")


def _notes(graph: Graph, plan: Plan, damage: Damage) -> tuple[str, ...]:
    notes = list(graph.notes)
    if not damage.measured:
        notes.append("types follow from what is typical of each role: this model was not measured")
    if graph.predictions and not plan.graph.predictions:
        notes.append("left out multi-token prediction")
    unpadded = {weight.name: weight.columns for weight in graph.weights()}
    widths = {(unpadded[t.weight.name], t.weight.columns) for t in plan.tensors}
    changed = ", ".join(f"{old} to {new}" for old, new in sorted(widths) if old != new)
    if changed:
        notes.append(f"padded rows with zeros, which changes no result: {changed}")
    return tuple(notes)


def _header_bytes(model: Model) -> int:
    """Bytes of a file before its first tensor; an estimate where the tokenizer is not on this machine."""
    plan = plan_tensors(model.graph, recipe_named("F32"))
    try:
        metadata = model.metadata or gguf_metadata(model, plan, model.path.resolve().name, None, {}, NoProgress())
    except BadInput:
        return _HEADER_SLACK + _HEADER_PER_WORD * model.graph.vocabulary_size
    with tempfile.TemporaryDirectory() as folder:
        return header_bytes(Path(folder, "header"), metadata, plan.tensors) + _HEADER_SLACK


def fit_machine(graph: Graph, machine: Machine, padding: bool, mtp: bool | None) -> MachinePlan:
    """The plan for a machine's memory, by what is typical of each role. Raises BadInput when the model cannot fit."""
    damage = typical_damage(graph)
    found: list[MachinePlan] = []
    refusal: BadInput | None = None
    for form in variants(graph, padding, mtp):
        try:
            found.append(fit(form, machine, damage))
        except BadInput as error:
            refusal = error
    if not found:
        assert refusal
        raise refusal
    best = min(found, key=lambda fit: sum(damage.of(t.weight, t.type) for t in fit.plan.tensors))
    return replace(best, plan=replace(best.plan, notes=_notes(graph, best.plan, damage)))


def variants(graph: Graph, padding: bool, mtp: bool | None) -> list[Graph]:
    """The forms in which a model may be stored: as it is, and with rows padded so that all types fit them."""
    if mtp and not graph.predictions:
        raise BadInput("--mtp: this model keeps no blocks for multi-token prediction in the same file; leave it out")
    plain = replace(graph, predictions=()) if mtp is False else graph
    forms = [plain]
    padded = pad(plain if mtp else replace(graph, predictions=()), _BLOCK)
    if padding and any(w.shape != p.shape for w, p in zip(padded.weights(), plain.weights(), strict=False)):
        forms.append(padded)
    return forms


def types_of_gguf(path: Path) -> StoredTypes:
    """The types of another file's tensors."""
    _, tensors = read_gguf(path)
    return StoredTypes(
        str(path), f"like-{path.stem}", {tensor.name: (tensor.dtype, tensor.shape) for tensor in tensors}
    )
