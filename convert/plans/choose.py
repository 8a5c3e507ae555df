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
from ...quant.formats.table import LARGEST_BLOCK
from ...quant.planning.allocation import Damage, Key, plan_within, typical_damage
from ...quant.planning.file_formats import plan_format
from ...quant.planning.fit import Machine, MachinePlan, fit
from ...quant.planning.knapsack import BudgetTooSmall
from ...quant.planning.padding import changed_widths
from ...quant.planning.plan import Form, Plan, override_types, plan_tensors
from ...quant.planning.plan_file import StoredTypes, plan_like, read_plan_file
from ...quant.planning.recipes import recipe_named
from ...runner.texts import beyond_context
from ...sources.gguf import read_gguf
from ...sources.model import Model
from ..gguf.metadata import gguf_metadata
from ..gguf.writer import header_bytes
from ..settings import NO_CALIBRATION, Calibration, Goal, require_sound

_MOST_BITS = 64
_HEADER_SLACK = 4096  # bytes; the header's names of files and plans are not final when a plan is made
_HEADER_PER_WORD = 32  # bytes of a header for each word of a vocabulary that is not here
_UNMEASURED = "`convert` measures the model first, unless --no-measure: `plan --measure` shows what that leads to"


def plan_for(
    model: Model,
    goal: Goal,
    form: Form = Form(),
    calibration: Calibration = Calibration(),
    file_format: str = "gguf",
) -> Plan:
    """The plan that a conversion to this goal follows, which `plan`, `--dry-run` and `convert` have in common.

    Where it would measure the model first, this is what it does without: a budget is shared out by
    what is typical of each role. Raises BadInput for a budget that is too small, a recipe that is unknown, a file that
    does not belong to this model, and what the file format cannot hold.
    """
    require_sound(goal, calibration, file_format)
    if file_format == "gguf":
        model.architecture.gguf_metadata(model.graph)  # which refuses what llama.cpp cannot run
    if goal.tensor_types:
        without = plan_for(model, replace(goal, tensor_types=()), form, calibration)
        return override_types(without, goal.tensor_types)
    if goal.is_recipe:
        return plan_format(file_format, model.graph, goal.recipe, form, calibration.weighs)
    if goal.machine:
        return fit_machine(model.graph, goal.machine, form).plan
    if isinstance(goal.plan, Plan):
        return goal.plan
    if goal.plan is not None:
        return plan_like(model.graph, read_plan_file(Path(goal.plan)))
    if goal.like is not None:
        return plan_like(model.graph, types_of_gguf(Path(goal.like)))
    budget, damage = budget_of(model, goal), typical_damage(model.graph)
    plan = plan_for_budget(model.graph, budget, damage, form, calibration.weighs)
    return replace(plan, notes=(*plan.notes, _UNMEASURED)) if goal.measures else plan


def with_error_feedback(calibration: Calibration, goal: Goal) -> Calibration:
    """The same, with error feedback decided: as asked, or else where a text runs, unless for a recipe."""
    if calibration.error_feedback is not None:
        return calibration
    return replace(calibration, error_feedback=calibration.runs and not goal.is_recipe)


def calibration_of_all(goals: Sequence[Goal], calibration: Calibration) -> Calibration:
    """The same for files of one pass. Raises BadInput where they would not agree."""
    decided = {with_error_feedback(calibration, goal) for goal in goals}
    if len(decided) > 1:
        raise BadInput(
            "recipes are rounded without error feedback unless asked, all else with it: give --error-feedback or "
            "--no-error-feedback for files of one pass"
        )
    return decided.pop()


def calibration_for(plan: Plan, goal: Goal, calibration: Calibration) -> Calibration:
    """What of a calibration is carried out: none where all types are so fine that it would change nothing."""
    wanted = plan.recipe.wants_importance if goal.is_recipe and not goal.tensor_types else plan.wants_importance
    return calibration if wanted or calibration.imatrix or calibration.save_to else NO_CALIBRATION


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
    form: Form = Form(),
    calibrated: bool = False,
    together: Key | None = None,
) -> Plan:
    """The plan of least damage under a budget, with rows padded where that does less; see `plan_within`.

    Types of less than two bits are used with `calibrated` only, and only where nothing else fits.
    """
    found: list[tuple[float, Plan]] = []
    refusals: list[BadInput] = []
    for one_bit in (False, True) if calibrated else (False,):
        for variant in variants(graph, form) if not found else ():
            try:
                plan = plan_within(
                    variant,
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
            own = {weight.name for weight in replace(variant, predictions=()).weights()}
            found.append((sum(damage.of(t.weight, t.type) for t in plan.tensors if t.weight.name in own), plan))
    if not found:
        raise _least_of(refusals, budget)
    best = min(found, key=lambda pair: pair[0])[1]
    return replace(best, notes=_notes(graph, best, damage, form))


def _least_of(refusals: Sequence[BadInput], budget: Budget) -> BadInput:
    """Of what was refused, what would come closest."""
    sizes = [refusal.least for refusal in refusals if isinstance(refusal, BudgetTooSmall)]
    if not sizes:
        return refusals[-1]
    return BadInput(f"{budget.name} is too little for this model: ask for at least {budget.in_words(min(sizes))}")


def _notes(graph: Graph, plan: Plan, damage: Damage, form: Form) -> tuple[str, ...]:
    notes = list(graph.notes)
    if not damage.measured:
        notes.append("types follow from what is typical of each role: this model was not measured")
    if graph.predictions and not plan.graph.predictions:
        notes.append("left out multi-token prediction")
    if changed := changed_widths(graph, plan.graph):
        notes.append(f"padded rows with zeros, which changes no result: {changed}")
    elif possible := changed_widths(graph, variants(graph, form)[-1]):
        notes.append(f"no rows padded with zeros ({possible}): at this size that costs more than it gains")
    return tuple(notes)


def _header_bytes(model: Model) -> int:
    """Bytes of a file before its first tensor; an estimate where the tokenizer is not on this machine."""
    plan = plan_tensors(model.graph, recipe_named("F32"))
    try:
        metadata = model.metadata or gguf_metadata(model, plan, model.path.resolve().name, None, {}, NoProgress())
    except BadInput:
        return _HEADER_SLACK + _HEADER_PER_WORD * model.graph.vocabulary_size
    with tempfile.TemporaryDirectory() as folder:
        return header_bytes(Path(folder, "header"), metadata, plan.stored) + _HEADER_SLACK


def fit_machine(graph: Graph, machine: Machine, form: Form = Form()) -> MachinePlan:
    """The plan for a machine's memory, by what is typical of each role. Raises BadInput when the model cannot fit."""
    damage = typical_damage(graph)
    found: list[MachinePlan] = []
    refusal: BadInput | None = None
    for variant in variants(graph, form):
        try:
            found.append(fit(variant, machine, damage))
        except BadInput as error:
            refusal = error
    if not found:
        assert refusal
        raise refusal
    best = min(found, key=lambda fit: sum(damage.of(t.weight, t.type) for t in fit.plan.tensors))
    notes = (*_notes(graph, best.plan, damage, form), *beyond_context(machine.context, graph.context_length))
    return replace(best, plan=replace(best.plan, notes=notes))


def variants(graph: Graph, form: Form = Form()) -> list[Graph]:
    """The graphs that a file may hold: the model's as it is, and with rows padded so that more types fit them."""
    if form.mtp and not graph.predictions:
        raise BadInput("--mtp: this model keeps no blocks for multi-token prediction in the same file; leave it out")
    return form.graphs(graph, LARGEST_BLOCK)


def types_of_gguf(path: Path) -> StoredTypes:
    """The types of another file's tensors."""
    _, tensors = read_gguf(path)
    return StoredTypes(
        path.as_posix(), f"like-{path.stem}", {tensor.name: (tensor.dtype, tensor.shape) for tensor in tensors}
    )
