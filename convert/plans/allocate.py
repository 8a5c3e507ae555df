"""Finds the best plan under a byte budget: probe every weight, solve, compare whole plans on held-out text."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial

import torch
from torch import Tensor

from ...archs.graph import Graph
from ...errors import BadInput
from ...quant.planning.allocation import Damage
from ...quant.planning.padding import changed_widths
from ...quant.planning.plan import Form, Plan, plan_file
from ...quant.planning.recipes import RECIPES
from ...runner.activations import Workspace
from ...runner.measure.compare_plans import divergences
from ...runner.measure.probe import measure_damage, probes_of, types_of
from ...runner.memory import comparing, workspace
from ...runner.passes import Measuring, packed, unpacked
from ...runner.settings import Compute
from ..resume.journal import Journal
from ..resume.states import MeasurementCache
from .choose import Budget, plan_for_budget, variants

_EXPONENTS = (1.0, 1.25)  # of the error in the damage: how much more low bits hurt than high ones
DAMAGE = "damage"  # the name by which a journal keeps what probes found
HELD_OUT_CHUNKS = 12  # of text at most
_PROBE_CHUNKS, _LEAST_PROBE_CHUNKS = 4, 2  # of text that one probe takes
_ALL_PROBE_CHUNKS = 256  # that all probes take together, unless that leaves too few to one
_MOST_PLANS = 5  # that `candidates_within` gives
_PADDED = " with padded rows"  # what the name of a stock mix in that form ends in


@dataclass(frozen=True)
class PlanResult:
    """A plan that took part: its size, and its mean KL divergence in nats on text that no plan was made from.

    Positions count by how probable the model finds what follows, see `Divergence.probability_weighted_kld`.
    """

    name: str
    bytes: int
    mean_kld: float


@dataclass(frozen=True)
class Allocation:
    """The plan that won, the damages it was made from, and all that took part, the winner first."""

    plan: Plan
    damage: Damage
    candidate_plans: tuple[PlanResult, ...]


def choose_measured_plan(
    measuring: Measuring,
    budget: Budget,
    probes: Tensor,
    held_out: Tensor,
    form: Form = Form(),
    compute: Compute = Compute(),
    journal: Journal | None = None,
) -> Allocation:
    """The plan with the least measured divergence within a budget.

    Args:
        probes: tokens [chunks, context] on which single weights are measured.
        held_out: tokens on which whole plans are compared.
        compute: the device, and most bytes of its memory and of this process; activations that do not fit go to scratch
            files beside the journal.
        journal: keeps what is measured, and what an earlier run has measured.

    The largest stock mix within the budget takes part; unless another plan is better than it beyond doubt (one
    standard error of the difference), it wins. Raises BadInput for a budget or a memory that is too small.
    """
    graph, forms = measuring.model.graph, variants(measuring.model.graph, form)
    probed = len(probes_of(graph, types_of(forms, measuring.wants_importance)))
    probing, side_by_side = (_calibrated_without(measuring, part) for part in (probes, held_out))
    probing_room = _room(probing, compute, journal, probes, 1 + probed, comparing(1))
    comparing_room = _room(side_by_side, compute, journal, held_out, 1 + _MOST_PLANS, comparing(_MOST_PLANS))
    cache = MeasurementCache(journal, graph.layers)
    with probing_room:
        probing = replace(probing, workspace=probing_room)
        (found,) = cache.get(
            DAMAGE, lambda states: [packed(asdict(measure_damage(replace(probing, states=states), probes, forms)))]
        )
    damage = Damage(**unpacked(found))
    plans = candidates_within(graph, budget, damage, form, measuring.wants_importance)
    with comparing_room:
        side_by_side = replace(side_by_side, workspace=comparing_room)
        measured = cache.get(
            "divergences",
            lambda states: [
                divergence.probability_weighted_kld
                for divergence in divergences(replace(side_by_side, states=states), list(plans.values()), held_out)
            ],
        )
    klds = dict(zip(plans, measured, strict=True))
    best = winner(klds)
    order = sorted(plans, key=lambda name: (name != best, float(klds[name].mean())))
    candidate_plans = tuple(PlanResult(name, plans[name].bytes, float(klds[name].mean())) for name in order)
    plan = replace(plans[best], expected_kld=candidate_plans[0].mean_kld)
    return Allocation(replace(plan, notes=(*plan.notes, _verdict(candidate_plans))), damage, candidate_plans)


def _calibrated_without(measuring: Measuring, tokens: Tensor) -> Measuring:
    """The same without these chunks in calibration: rounding is judged by text that it has not seen."""
    if measuring.calibration is None:
        return measuring
    return replace(measuring, calibration=without(measuring.calibration, tokens))


def without(calibration: Tensor, tokens: Tensor) -> Tensor:
    """Chunks that are not among `tokens`; all of them if none is left."""
    same = (calibration[:, None] == tokens).all(-1).any(1)
    return calibration[~same] if not same.all() else calibration


def _room(
    measuring: Measuring, compute: Compute, journal: Journal | None, tokens: Tensor, streams: int, copies: int
) -> Workspace:
    """A workspace for so many streams of `tokens`, and for calibration."""
    calibrating = measuring.calibration.numel() if measuring.calibration is not None else 0
    total, folder = calibrating + streams * tokens.numel(), journal.folder.parent if journal else None
    graph, context = measuring.model.graph, tokens.shape[1]
    return workspace(compute, graph, total, context, folder, copies, measuring.error_feedback)


def winner(klds: Mapping[str, Tensor]) -> str:
    """The plan with the least divergence [positions]; a stock mix, unless the best is better beyond doubt."""
    order = sorted(klds, key=lambda name: float(klds[name].mean()))
    best = order[0]
    stock = next(filter(_is_stock, order), best)
    gain = klds[stock] - klds[best]
    return best if float(gain.mean()) > float(gain.std()) / math.sqrt(len(gain)) else stock


def candidates_within(graph: Graph, budget: Budget, damage: Damage, form: Form, calibrated: bool) -> dict[str, Plan]:
    """The plans to compare, by name: from two exponents of the error, from damages drawn to their roles, and stock.

    Each further one takes as long as rounding all that no other has in the same type. An exponent of 0.8, one type a
    role, and the first and last layers apart won at none of 18 points (docs/allocation.md).

    Where rows may be padded or not, the stock mix takes part in both forms: in the one that llama-quantize writes, and
    in the smallest, for which a larger mix may fit.
    """
    solve = partial(plan_for_budget, graph, budget, form=form, calibrated=calibrated)
    plans = {f"error exponent {x:g}": solve(replace(damage, exponent=x)) for x in _EXPONENTS}
    plans["shrunk to role means"] = solve(damage.shrunk_to_roles(graph.weights()))
    for padding in (None, False) if form.padding is None else (form.padding,):
        stock = stock_within(graph, budget.bytes, replace(form, padding=padding), calibrated)
        if stock:
            plans[stock.recipe.name + (_PADDED if changed_widths(graph, stock.graph) else "")] = stock
    return _distinct(plans)


def probe_chunks(graph: Graph) -> int:
    """How many chunks of text a probe takes: the fewer the more probes there are, for the time that all take."""
    share = _ALL_PROBE_CHUNKS // len(probes_of(graph, types_of([graph], calibrated=True)))
    return min(max(share, _LEAST_PROBE_CHUNKS), _PROBE_CHUNKS)


def _distinct(plans: dict[str, Plan]) -> dict[str, Plan]:
    """Of plans that are alike, the last: the stock mix must stay."""
    unlike = {
        tuple((tensor.weight.shape, tensor.type.id) for tensor in plan.tensors): name for name, plan in plans.items()
    }
    return {name: plans[name] for name in unlike.values()}


def stock_within(graph: Graph, size: int, form: Form, calibrated: bool) -> Plan | None:
    """The largest of llama.cpp's mixes whose data section is within a size; None where none is."""
    others = (recipe for recipe in RECIPES.values() if not (recipe.native or recipe.ours or recipe.outdone))
    recipes = (recipe for recipe in others if recipe.quantized)
    plans = (plan_file(graph, recipe, form, calibrated) for recipe in recipes)
    return max((plan for plan in plans if plan.bytes <= size), key=lambda plan: plan.bytes, default=None)


def _is_stock(name: str) -> bool:
    return name.removesuffix(_PADDED) in RECIPES


def _verdict(candidate_plans: tuple[PlanResult, ...]) -> str:
    winner, *others = candidate_plans
    compared = ", ".join(f"{r.name} {r.mean_kld:.5f} ({r.mean_kld / max(winner.mean_kld, 1e-12):.2f}x)" for r in others)
    kept = "the stock mix stays; " if _is_stock(winner.name) else ""
    return f"{kept}KL divergence on held-out text: {winner.name} {winner.mean_kld:.5f}; {compared}"


def split_tokens(tokens: Tensor, probes: int, held_out: int) -> tuple[Tensor, Tensor]:
    """Calibration chunks for probes and for comparing plans, at most so many; spread evenly, and none is in both.

    At most half compare plans, so that these are rounded by others. Raises BadInput when there are fewer than two.
    """
    if len(tokens) < 2:
        raise BadInput("the calibration text has one chunk, expected two or more: use more text or less --context")
    probing = _spread(len(tokens), min(probes, len(tokens) // 2))
    unused = torch.ones(len(tokens), dtype=torch.bool)
    unused[probing] = False
    rest = tokens[unused]
    return tokens[probing], rest[_spread(len(rest), min(held_out, max(1, len(tokens) // 2)))]


def _spread(length: int, count: int) -> Tensor:
    """So many of the numbers below `length`, evenly apart."""
    return torch.arange(count) * length // count
