"""What a conversion has decided, and why, in lines for those who want to know."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from ..quant.planning.plan import Plan
from ..sources.locate import Source
from .settings import Calibration, Goal


def decisions(opened: Source, goal: Goal, plan: Plan, asked: Calibration, calibration: Calibration) -> Iterator[str]:
    """Where the source is, which types it gets, what calibrates: `asked` is before, `calibration` after the choice."""
    model = opened.model
    where = "shards are fetched when they are read" if opened.checkpoint else "all of it is on this machine"
    yield f"Source: {model.path}, {model.graph.architecture}, {len(model.tensors)} tensors; {where}"
    types = Counter(tensor.type.name for tensor in plan.tensors)
    yield f"Types: {plan.recipe.name} ({_reason(goal)}), {', '.join(f'{n} {name}' for name, n in types.most_common())}"
    if calibration.imatrix:
        yield f"Calibration: by {calibration.imatrix}"
    elif calibration.runs:
        count = "all" if calibration.chunks is None else calibration.chunks
        yield f"Calibration: on {calibration.text}, {count} chunks of {calibration.context} tokens"
    else:
        reason = "no type here is so coarse that it would pay" if asked.weighs else "as asked"
        yield f"Calibration: none, {reason}"
    if calibration.runs:
        reason = "for a recipe only where asked" if goal.is_recipe else "the default where types follow from a budget"
        yield f"Error feedback: {'on' if calibration.error_feedback else 'off'}; {reason}"


def _reason(goal: Goal) -> str:
    if goal.plan is not None:
        return "by the given plan"
    if goal.like is not None:
        return f"like {goal.like}"
    if goal.machine is not None:
        return f"for {goal.machine.ram} bytes of RAM, {goal.machine.vram} of VRAM, {goal.machine.context} tokens"
    if goal.is_budget:
        return "by what measuring this model shows" if goal.measures else "by what is typical of each role"
    return "as asked" if goal.recipe else "the default"
