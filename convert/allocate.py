"""The best plan under a byte budget: measure what each weight's rounding does, solve, compare whole plans, choose."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ..archs.errors import BadInput
from ..archs.graph import Graph
from ..archs.weights import Weight
from ..quant.allocation import Damage, Key
from ..quant.importance import Importance
from ..quant.plan import Plan, plan_file
from ..quant.recipes import RECIPES
from ..runner.evaluate import CALIBRATION_TEXT, chunk_tokens
from ..runner.probe import measure_damage
from ..runner.rivals import divergences
from ..sources.imatrix import read_imatrix
from ..sources.model import Model
from ..sources.progress import Progress
from .choose import Budget, Goal, budget_of, plan_for_budget, refuse_mixed_types, variants
from .encode import MeasuredImportance

_EXPONENTS = (1.0, 0.8, 1.25)  # of the error in the damage: how much more low bits hurt than high ones
PROBE_CHUNKS, HELD_OUT_CHUNKS = 8, 24  # of text at most; hundreds of lanes are probes, seven compare plans
ROLES = "one type a role"  # the name of that plan
_EDGE = 8  # the first and last of so many parts of the layers are the edges


@dataclass(frozen=True)
class Rival:
    """A plan that took part: its size, and its mean KL divergence in nats on text that no plan was made from.

    Positions count by how probable the model finds what follows, see `Divergence.trusted_kld`.
    """

    name: str
    bytes: int
    mean_kld: float


@dataclass(frozen=True)
class Allocation:
    """The plan that won, the damages it was made from, and all that took part, the winner first."""

    plan: Plan
    damage: Damage
    rivals: tuple[Rival, ...]


def allocate(
    model: Model,
    budget: Budget,
    probes: Tensor,
    held_out: Tensor,
    calibration: Tensor | None,
    importance: Importance | None,
    progress: Progress,
    *,
    padding: bool = True,
    mtp: bool | None = None,
) -> Allocation:
    """The plan with the least measured divergence within a budget.

    Args:
        probes: tokens [chunks, context] on which single weights are measured.
        held_out: tokens on which whole plans are compared.
        calibration: tokens that show which inputs of a weight matter; without, `importance` does.

    The largest stock mix within the budget takes part; unless another plan is better than it beyond doubt (one
    standard error of the difference), it wins. Raises BadInput for a budget that is too small.
    """
    damage = measure_damage(model, probes, calibration, importance, variants(model.graph, padding, mtp), progress)
    weighed = importance is not None or calibration is not None
    plans = rivals_within(model.graph, budget, damage, padding=padding, mtp=mtp, importance=weighed)
    measured = divergences(model, list(plans.values()), held_out, calibration, importance, progress)
    klds = {name: divergence.trusted_kld for name, divergence in zip(plans, measured, strict=True)}
    best = winner(klds)
    order = sorted(plans, key=lambda name: (name != best, float(klds[name].mean())))
    rivals = tuple(Rival(name, plans[name].bytes, float(klds[name].mean())) for name in order)
    plan = replace(plans[best], expected_kld=rivals[0].mean_kld)
    return Allocation(replace(plan, notes=(*plan.notes, _verdict(rivals))), damage, rivals)


def winner(klds: Mapping[str, Tensor]) -> str:
    """The plan with the least divergence [positions]; a stock mix, unless the best is better beyond doubt."""
    best = min(klds, key=lambda name: float(klds[name].mean()))
    stock = next((name for name in klds if name in RECIPES), best)
    gain = klds[stock] - klds[best]
    return best if float(gain.mean()) > float(gain.std()) / math.sqrt(len(gain)) else stock


def rivals_within(
    graph: Graph, budget: Budget, damage: Damage, *, padding: bool = True, mtp: bool | None = None, importance: bool
) -> dict[str, Plan]:
    """The plans to compare, by name: from several exponents of the error, role by role, and the stock mix."""
    solve = partial(plan_for_budget, graph, budget, padding=padding, mtp=mtp, importance=importance)
    plans = {f"exponent {x:g}": solve(replace(damage, exponent=x)) for x in _EXPONENTS}
    plans["drawn to roles"] = solve(damage.drawn_to_roles(graph.weights()))
    plans["edges apart"] = solve(damage, together=_by_edge(graph))
    plans[ROLES] = solve(damage, together=_by_role)
    stock = stock_within(graph, budget.bytes, padding, mtp, importance)
    if stock:
        plans[stock.recipe.name] = stock
    return _distinct(plans)


def allocate_for(
    model: Model,
    goal: Goal,
    target: str = "gguf",
    *,
    calibration: Path | None,
    imatrix: Path | None,
    context: int,
    padding: bool = True,
    mtp: bool | None = None,
    progress: Progress,
) -> Allocation:
    """`allocate` with what `convert` knows: texts and files.

    Probes and comparisons take parts of the calibration text, of the bundled one where columns are not weighed by any.
    """
    refuse_mixed_types(target)
    text = chunk_tokens(model.tokenizer, calibration or CALIBRATION_TEXT, context, None)
    probes, held_out = split_tokens(text, PROBE_CHUNKS, HELD_OUT_CHUNKS)
    return allocate(
        model,
        budget_of(model, goal),
        probes,
        held_out,
        text if calibration and not imatrix else None,
        MeasuredImportance(read_imatrix(imatrix)) if imatrix else None,
        progress,
        padding=padding,
        mtp=mtp,
    )


def _distinct(plans: dict[str, Plan]) -> dict[str, Plan]:
    """Of plans that are alike, the last: the stock mix must stay."""
    unlike = {
        tuple((tensor.weight.shape, tensor.type.id) for tensor in plan.tensors): name for name, plan in plans.items()
    }
    return {name: plans[name] for name in unlike.values()}


def stock_within(graph: Graph, size: int, padding: bool, mtp: bool | None, importance: bool) -> Plan | None:
    """The largest of llama.cpp's mixes whose data section is within a size; None where none is."""
    recipes = (recipe for recipe in RECIPES.values() if recipe.quantised and not (recipe.native or recipe.ours))
    plans = (plan_file(graph, recipe, padding, mtp, importance) for recipe in recipes)
    return max((plan for plan in plans if plan.bytes <= size), key=lambda plan: plan.bytes, default=None)


def _by_role(weight: Weight) -> object:
    return weight.role


def _by_edge(graph: Graph) -> Key:
    count = len(graph.layers)
    edge = max(1, count // _EDGE)

    def key(weight: Weight) -> object:
        return weight.role, weight.layer is not None and not edge <= weight.layer < count - edge

    return key


def _verdict(rivals: tuple[Rival, ...]) -> str:
    winner, *others = rivals
    compared = ", ".join(f"{r.name} {r.mean_kld:.5f} ({r.mean_kld / max(winner.mean_kld, 1e-12):.2f}x)" for r in others)
    kept = "the stock mix stays; " if winner.name in RECIPES else ""
    return f"{kept}KL divergence on held-out text: {winner.name} {winner.mean_kld:.5f}; {compared}"


def split_tokens(tokens: Tensor, probes: int, held_out: int) -> tuple[Tensor, Tensor]:
    """Calibration chunks for probes and for comparing plans, at most so many; spread evenly, and none is in both.

    Raises BadInput when there are fewer than two.
    """
    if len(tokens) < 2:
        raise BadInput("the calibration text has one chunk, expected two or more: use more text or less --context")
    probing = _spread(len(tokens), min(probes, len(tokens) // 2))
    unused = torch.ones(len(tokens), dtype=torch.bool)
    unused[probing] = False
    rest = tokens[unused]
    return tokens[probing], rest[_spread(len(rest), min(held_out, len(rest)))]


def _spread(length: int, count: int) -> Tensor:
    """So many of the numbers below `length`, evenly apart."""
    return torch.arange(count) * length // count
