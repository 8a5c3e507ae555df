"""Plans under a byte budget: which types a weight may take, what each does to the output, and the best choice.

The damage of storing one weight in one type is taken as `sensitivity * error ** exponent`: how much the output suffers
for each unit of the weight's relative squared error, and that error. Over weights damages are added, which the
linearity theorem justifies above 3 bits (Malinovskii et al. 2024); below, exponents other than 1 give plans of other
shapes, and the joint result of each is measured before one is chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from math import exp, log
from statistics import fmean

from ...archs.graph import Graph
from ...archs.weights import Role, Weight
from ..formats.table import LARGEST_BLOCK, Format, format_named
from .exact import exact_format
from .knapsack import Option, solve_knapsack
from .plan import Plan, PlannedTensor
from .recipes import GUESSED, LEAST_SENSITIVE, SENSITIVE, UNREPACKED, Recipe

# What weights may become, in llama.cpp's names. Types of about one bit do more harm than their
# error tells, so they are for budgets that nothing else fits, and for those who know which columns matter.
TYPES = (
    "IQ2_XXS",
    "IQ2_XS",
    "IQ2_S",
    "Q2_K",
    "IQ3_XXS",
    "IQ3_S",
    "Q3_K",
    "IQ4_XS",
    "Q4_K",
    "Q5_K",
    "Q6_K",
    "Q8_0",
    "BF16",
)
ONE_BIT_TYPES = ("IQ1_S", "IQ1_M")
TYPES_FOR_SHORT_ROWS = ("Q2_0", "MXFP4", "IQ4_NL", "Q5_0", "Q5_1")  # worse than others where blocks of 256 fit
_SCALE_BITS = 0.5  # what ggml's block scales cost: Q8_0 is not more than the 8 bits of an FP8 source
_SAMPLE = (32, 2048)  # rows and columns of random numbers that typical errors are measured on

# KL divergence for each unit of a weight's relative squared error, of all weights of a role together: rounded from
# what probes of two of the trained examples gave. What is not listed counts like `_OTHER`.
TYPICAL_SENSITIVITY: Mapping[Role, float] = {
    Role.EMBEDDING: 0.39,
    Role.HEAD: 0.6,
    Role.ATTENTION_Q: 0.06,
    Role.ATTENTION_K: 0.1,
    Role.ATTENTION_V: 0.1,
    Role.ATTENTION_OUTPUT: 0.1,
    Role.EXPERT_GATE: 0.3,
    Role.EXPERT_UP: 0.2,
    Role.EXPERT_DOWN: 0.3,
    Role.SHARED_UP: 0.2,
    Role.SHARED_DOWN: 0.15,
    Role.LATENT_DOWN: 0.1,
    Role.LATENT_UP: 0.1,
    Role.MAMBA_INPUT: 0.8,
    Role.MAMBA_OUTPUT: 0.4,
}
_OTHER = 0.3


@dataclass(frozen=True)
class Damage:
    """What storing a weight in a type does to the output, in nats of KL divergence.

    Attributes:
        sensitivity: by weight name, damage for each unit of relative squared error.
        errors: by weight name and type, the relative squared error; where there is none, that of random numbers.
        exponent: of the error.
        probe: by weight name, the error at which the sensitivity was measured; the exponent turns about it.
        measured: whether the sensitivities come from this model.
    """

    sensitivity: Mapping[str, float]
    errors: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    exponent: float = 1.0
    probe: Mapping[str, float] = field(default_factory=dict)
    measured: bool = False

    def shrunk_to_roles(self, weights: Iterable[Weight]) -> Damage:
        """The same with each measured sensitivity half way (of its logarithm) to the mean of its role."""
        roles: dict[Role, list[float]] = {}
        measured = [weight for weight in weights if weight.name in self.probe and self.sensitivity[weight.name] > 0]
        for weight in measured:
            roles.setdefault(weight.role, []).append(log(self.sensitivity[weight.name]))
        drawn = {w.name: exp((log(self.sensitivity[w.name]) + fmean(roles[w.role])) / 2) for w in measured}
        return replace(self, sensitivity={**self.sensitivity, **drawn})

    def of(self, weight: Weight, type: Format) -> float:
        """Damage of one weight in that type; none where the type loses nothing."""
        if exact_format(weight.source) == type:
            return 0.0
        error = self.errors.get(weight.name, {}).get(type.name)
        if error is None:
            error = typical_error(type.name)
        probe = self.probe.get(weight.name, 1.0)
        return self.sensitivity.get(weight.name, 0.0) * probe * float((error / probe) ** self.exponent)


def typical_damage(graph: Graph) -> Damage:
    """What to expect of a model that was not measured: sensitivities by role, shared evenly by the role's weights."""
    weights = [weight for weight in graph.weights() if weight.may_be_quantized]
    count = {role: sum(weight.role is role for weight in weights) for role in {weight.role for weight in weights}}
    return Damage({w.name: TYPICAL_SENSITIVITY.get(w.role, _OTHER) / count[w.role] for w in weights})


@cache
def typical_error(name: str) -> float:
    """Relative squared error of normally distributed numbers in that type."""
    import torch

    from ..formats.quantize import dequantize, quantize

    rows = torch.randn(_SAMPLE, generator=torch.Generator().manual_seed(0), device="cpu")
    return float((dequantize(quantize(rows, name), name) - rows).square().sum() / rows.square().sum())


def allowed_types(weight: Weight, one_bit: bool = False) -> tuple[Format, ...]:
    """The types that a weight may take, the smallest first.

    Blocks divide its rows, no type has more bits than the source, and weights that decide where attention looks keep
    8 bits. A weight that is never quantized has one.
    """
    if weight.role is Role.HASH_TABLE:
        return (format_named("I32"),)
    if not weight.may_be_quantized:
        return (format_named("F32"),)
    exact = exact_format(weight.source)
    most = weight.source.bits + _SCALE_BITS
    names = [*TYPES, *(ONE_BIT_TYPES if one_bit else ()), *((exact.name,) if exact else ())]
    if weight.columns % LARGEST_BLOCK or weight.role is Role.ATTENTION_OUTPUT_DOWN:
        names += TYPES_FOR_SHORT_ROWS
    formats = {format_named(name) for name in names if _engine_takes(weight.role, name)}
    fitting = [format for format in formats if format.fits(weight.columns) and format.bits_per_weight <= most]
    if weight.role in SENSITIVE:
        least = min(format_named(LEAST_SENSITIVE).bits_per_weight, most)
        fitting = [format for format in fitting if format.bits_per_weight >= least] or fitting
    return tuple(sorted(fitting or [format_named("F16")], key=lambda format: format.bits_per_weight))


def _engine_takes(role: Role, name: str) -> bool:
    return role is not Role.ATTENTION_OUTPUT_DOWN or name not in UNREPACKED


Key = Callable[[Weight], Hashable]


def plan_within(
    graph: Graph,
    budget: int,
    damage: Damage,
    *,
    name: str = "SIZE",
    one_bit: bool = False,
    together: Key | None = None,
    active_budget: float | None = None,
) -> Plan:
    """The plan of least damage whose data section takes at most `budget` bytes.

    Args:
        name: what the plan calls itself.
        one_bit: allow types of less than two bits.
        together: weights for which this gives the same key take the same type; by default each has its own.
        active_budget: most bytes that one token may touch.

    Raises BadInput when a budget is too small.
    """
    weights = tuple(graph.weights())
    types = types_within(weights, budget, damage, graph.active_shares(), one_bit, together, active_budget)
    return replace(plan_with(graph, types, name), expected_kld=_expected(weights, types, damage))


def types_within(
    weights: Sequence[Weight],
    budget: int,
    damage: Damage,
    shares: Mapping[str, float],
    one_bit: bool = False,
    together: Key | None = None,
    active_budget: float | None = None,
) -> dict[str, Format]:
    """The same choice for some of a graph's weights, by name; `shares` are those of `Graph.active_shares`."""
    groups: dict[Hashable, list[Weight]] = {}
    for weight in weights:
        groups.setdefault(together(weight) if together else weight.name, []).append(weight)
    items = [_options(members, damage, shares, one_bit) for members in groups.values()]
    chosen = solve_knapsack([[option for _, option in options] for options in items], budget, active_budget)
    return {
        weight.name: options[number][0]
        for members, options, number in zip(groups.values(), items, chosen, strict=True)
        for weight in members
    }


def bytes_per_token(plan: Plan) -> float:
    """Bytes of weights that one token touches on average, which bound the speed of decoding."""
    shares = plan.graph.active_shares()
    return sum(plan.bytes_of(tensor) * shares.get(tensor.weight.name, 1.0) for tensor in plan.tensors)


def _expected(weights: Sequence[Weight], types: Mapping[str, Format], damage: Damage) -> float | None:
    return sum(damage.of(weight, types[weight.name]) for weight in weights) if damage.measured else None


def plan_with(graph: Graph, types: Mapping[str, Format], name: str) -> Plan:
    """A plan from a type for every weight."""
    tensors = tuple(PlannedTensor(weight, types[weight.name], types[weight.name]) for weight in graph.weights())
    sizes: dict[str, int] = {}
    for tensor in tensors:
        sizes[tensor.type.name] = sizes.get(tensor.type.name, 0) + tensor.bytes
    return Plan(Recipe(name, GUESSED, max(sizes, key=lambda type: sizes[type])), graph, tensors)


def _options(
    weights: list[Weight], damage: Damage, shares: Mapping[str, float], one_bit: bool
) -> list[tuple[Format, Option]]:
    """What weights that go together may become: each option costs more than the one before and does less damage."""
    common = [c for c in allowed_types(weights[0], one_bit) if all(c in allowed_types(w, one_bit) for w in weights[1:])]
    options: list[tuple[Format, Option]] = []
    for type in common:
        sizes = [(PlannedTensor(weight, type, type).aligned_bytes, shares.get(weight.name, 1.0)) for weight in weights]
        option = Option(
            bytes=sum(size for size, _ in sizes),
            damage=sum(damage.of(weight, type) for weight in weights),
            active_bytes=sum(size * share for size, share in sizes),
        )
        if not options or option.damage < options[-1][1].damage:
            options.append((type, option))
    return options
