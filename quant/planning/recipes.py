"""llama.cpp's stock mixes as data: which type a tensor gets, by what it does and where it stands.

A recipe has a base type and, for some kinds of tensor, rules of which the first that applies decides. They restate
what `llama-quantize` of October 2026 does for dense models and for those with more than 8 experts; tests compare
whole-model sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from difflib import get_close_matches

from ...archs.weights import Role
from ...errors import BadInput
from ..formats.table import format_named


@dataclass(frozen=True)
class Position:
    """What a rule may ask about a tensor.

    Attributes:
        layer, layers: index of its layer and number of layers (0 of n for tensors outside the layers); in a dense model
            llama.cpp counts the tensors of a kind instead, which differs where only some layers have one.
        ordinal: how many tensors of its kind came before it.
        heads_per_group: attention heads that share one key-value head.
        experts: how many its model's mixtures have, 0 in a dense model.
        calibrated: whether an importance matrix is there.
    """

    layer: int
    layers: int
    ordinal: int
    heads_per_group: int
    experts: int
    calibrated: bool


Condition = Callable[[Position], bool]


def _always(position: Position) -> bool:
    return True


def _more_bits(position: Position) -> bool:
    """The first and last eighth of the layers and every third one between."""
    eighth = position.layers // 8
    return position.layer < eighth or position.layer >= 7 * position.layers // 8 or (position.layer - eighth) % 3 == 2


def _early(divisor: int) -> Condition:
    return lambda position: position.layer < position.layers // divisor


def _first(count: int) -> Condition:
    return lambda position: position.layer < count


def _first_eighth_of_kind(position: Position) -> bool:
    return position.ordinal < position.layers // 8


def _grouped(position: Position) -> bool:
    return position.heads_per_group >= 4


def _grouped_or_mixture(position: Position) -> bool:
    return _grouped(position) or position.experts >= 4


def _middle(position: Position) -> bool:
    return position.layers // 8 <= position.layer < 7 * position.layers // 8


def _without_importance(condition: Condition = _always) -> Condition:
    return lambda position: not position.calibrated and condition(position)


def _with_importance(condition: Condition) -> Condition:
    return lambda position: position.calibrated and condition(position)


Rules = tuple[tuple[str, Condition], ...]


@dataclass(frozen=True)
class Recipe:
    """Types for a whole model; `file_type` is llama.cpp's number for it, `base` serves where no rule applies.

    `native` asks for what the checkpoint itself holds, wherever the file format has a form for it. What is `ours`
    llama-quantize does not have. What is `outdone` by other mixes of its size is there for those who ask for it alone.
    """

    name: str
    file_type: int
    base: str
    rules: Mapping[Role, Rules] = field(default_factory=dict)
    native: bool = False
    ours: bool = False
    outdone: bool = False

    @property
    def quantized(self) -> bool:
        return format_named(self.base).block_size > 1

    @property
    def wants_importance(self) -> bool:
        """Whether it rounds anything so coarsely that knowing which inputs of a weight matter pays."""
        return not self.native and any(format_named(name).bits_per_weight < 8 for name in self.types)

    @property
    def of_experts(self) -> bool:
        """Whether it tells nothing but routed experts apart."""
        return bool(self.rules) and {*self.rules} <= {Role.EXPERT_GATE, Role.EXPERT_UP, Role.EXPERT_DOWN}

    @property
    def types(self) -> set[str]:
        """All that it gives to some tensor of some model."""
        return {self.base, *(name for rules in self.rules.values() for name, _ in rules)}

    def type_of(self, role: Role, position: Position) -> str:
        """The type of a tensor of that role, before any fallback for its row length."""
        if role in LEFT_ALONE and self.quantized:
            return "BF16"
        name = next((name for name, applies in self.rules.get(role, ()) if applies(position)), self.base)
        if role in SENSITIVE and format_named(name).bits_per_weight < format_named(LEAST_SENSITIVE).bits_per_weight:
            return LEAST_SENSITIVE
        return UNREPACKED.get(name, name) if role is Role.ATTENTION_OUTPUT_DOWN else name

    def bits_of_experts(self) -> float:
        """Bits per weight of routed experts, which are nearly all of a large mixture, with an importance matrix."""
        layers = 48  # of a typical model; rules may spend more on the first and the last
        positions = [Position(layer, layers, layer, 8, 128, calibrated=True) for layer in range(layers)]
        roles = (Role.EXPERT_GATE, Role.EXPERT_UP, Role.EXPERT_DOWN)
        bits = [format_named(self.type_of(role, place)).bits_per_weight for role in roles for place in positions]
        return sum(bits) / len(bits)


# What decides where attention looks is small, and its errors are not averaged out.
SENSITIVE = (Role.COMPRESSOR, Role.INDEXER)
LEAST_SENSITIVE = "Q8_0"

# What llama-quantize leaves as checkpoints have it: small beside the table that it goes with.
LEFT_ALONE = (Role.PER_LAYER_PROJECTION,)

# llama.cpp aborts on machines with AMX when the grouped output projection, which it reshapes to three dimensions, has a
# type that it repacks for them; these take their place, none with fewer bits.
UNREPACKED: Mapping[str, str] = {
    "Q4_0": "IQ4_NL",
    "IQ4_XS": "IQ4_NL",
    "Q4_1": "Q5_0",
    "Q4_K": "Q5_0",
    "Q5_K": "Q5_1",
    **dict.fromkeys(("Q6_K", "Q8_0", "F16"), "BF16"),
}

# Routed experts, the shared expert and dense layers are alike to llama.cpp's rules, and counted together.
GATE_UP_PROJECTIONS = (
    Role.EXPERT_GATE,
    Role.EXPERT_UP,
    Role.SHARED_GATE,
    Role.SHARED_UP,
    Role.DENSE_GATE,
    Role.DENSE_UP,
)
VALUE_PROJECTIONS = (Role.ATTENTION_V, Role.DELTA_INPUT)  # what is fused with a value counts as one
DOWN_PROJECTIONS = (Role.EXPERT_DOWN, Role.SHARED_DOWN, Role.DENSE_DOWN)


def _recipe(
    name: str,
    file_type: int,
    base: str,
    *,
    head: str = "Q6_K",
    embedding: str | None = None,
    query_key: str | None = None,
    value: Rules = (),
    output: str | None = None,
    gate_up: Rules = (),
    down: Rules = (),
) -> Recipe:
    def fixed(type_name: str | None) -> Rules:
        return ((type_name, _always),) if type_name else ()

    rules = {
        Role.HEAD: fixed(head),
        Role.EMBEDDING: fixed(embedding),
        Role.PER_LAYER_TABLE: fixed(head),  # a table of tokens, of models whose embedding is the head
        Role.ATTENTION_Q: fixed(query_key),
        Role.ATTENTION_K: fixed(query_key),
        **dict.fromkeys(VALUE_PROJECTIONS, value),
        Role.ATTENTION_OUTPUT: fixed(output),
        **dict.fromkeys(GATE_UP_PROJECTIONS, gate_up),
        **dict.fromkeys(DOWN_PROJECTIONS, down),
    }
    return Recipe(name, file_type, base, rules)


def _two_bit(name: str, file_type: int, base: str, low: str, output: str | None = None) -> Recipe:
    """The mixes around 2 bits and below: `low` serves the embedding, the first down projections and narrow values."""
    value, down = (("Q4_K", _grouped_or_mixture), (low, _always)), ((low, _first_eighth_of_kind),)
    return _recipe(name, file_type, base, head="Q5_K", embedding=low, value=value, output=output, down=down)


_GROUPED_Q4 = (("Q4_K", _grouped),)
_GROUPED_Q5 = (("Q5_K", _grouped),)
_EARLY_Q5_UNCALIBRATED = (("Q5_K", _without_importance(_early(8))),)


def _experts_low(name: str, file_type: int, gate_up: str, down: str) -> Recipe:
    """Routed experts, which are nearly all of a large mixture and of which a token meets few, low; the rest in Q8_0."""
    rules = {
        Role.EXPERT_GATE: ((gate_up, _always),),
        Role.EXPERT_UP: ((gate_up, _always),),
        Role.EXPERT_DOWN: ((down, _always),),
    }
    return Recipe(name, file_type, "Q8_0", rules, ours=True)


GUESSED = 1024  # llama.cpp's file type for "see the tensors"

_ALL = (
    Recipe("F32", 0, "F32"),
    Recipe("F16", 1, "F16"),
    Recipe("BF16", 32, "BF16"),
    Recipe("NATIVE", GUESSED, "BF16", native=True),
    Recipe("Q8_0", 7, "Q8_0"),
    _recipe("Q6_K", 18, "Q6_K"),
    _recipe("Q5_K_M", 17, "Q5_K", value=(("Q6_K", _more_bits),), down=(("Q6_K", _more_bits),)),
    _recipe("Q5_K_S", 16, "Q5_K"),
    _recipe("Q4_K_M", 15, "Q4_K", value=(("Q6_K", _more_bits),), down=(("Q6_K", _more_bits),)),
    _recipe("Q4_K_S", 14, "Q4_K", value=(("Q5_K", _first(4)),), down=(("Q5_K", _early(8)),)),
    _recipe("Q3_K_L", 13, "Q3_K", value=(("Q5_K", _always),), output="Q5_K", down=(("Q5_K", _always),)),
    _recipe(
        "Q3_K_M",
        12,
        "Q3_K",
        value=(("Q5_K", _first(2)), ("Q4_K", _always)),
        output="Q4_K",
        down=(("Q5_K", _early(16)), ("Q4_K", _always)),
    ),
    _recipe("Q3_K_S", 11, "Q3_K"),
    _recipe("Q2_K", 10, "Q2_K", value=(*_GROUPED_Q4, ("Q3_K", _always)), output="Q3_K", down=(("Q3_K", _always),)),
    _recipe("Q2_K_S", 21, "Q2_K", value=_GROUPED_Q4, down=(("Q4_K", _early(8)),)),
    _recipe("Q4_0", 2, "Q4_0", down=(("Q4_1", _with_importance(_early(8))),)),
    replace(_recipe("Q4_1", 3, "Q4_1"), outdone=True),
    _recipe("Q5_0", 8, "Q5_0", down=(("Q5_1", _with_importance(_early(8))),)),
    replace(_recipe("Q5_1", 9, "Q5_1"), outdone=True),
    _recipe("IQ4_NL", 25, "IQ4_NL", value=_GROUPED_Q5, down=_EARLY_Q5_UNCALIBRATED),
    _recipe("IQ4_XS", 30, "IQ4_XS", value=_GROUPED_Q5, down=_EARLY_Q5_UNCALIBRATED),
    _recipe("IQ3_M", 27, "IQ3_S", value=(("Q4_K", _always),), output="Q4_K", down=(("Q4_K", _early(8)),)),
    _recipe("IQ3_S", 26, "IQ3_S", value=_GROUPED_Q4),
    _recipe("IQ3_XS", 22, "IQ3_S", query_key="IQ3_XXS", value=_GROUPED_Q4, gate_up=(("IQ3_XXS", _middle),)),
    _recipe(
        "IQ3_XXS",
        23,
        "IQ3_XXS",
        head="Q5_K",
        embedding="IQ3_S",
        query_key="IQ2_S",
        value=(*_GROUPED_Q4, ("IQ3_S", _without_importance())),
        output="IQ3_S",
        down=(("Q4_K", _without_importance(_early(8))), ("Q3_K", _without_importance())),
    ),
    _two_bit("IQ2_M", 29, "IQ2_S", "IQ3_S", output="IQ3_S"),
    _two_bit("IQ2_S", 28, "IQ2_XS", "IQ3_S", output="IQ3_S"),
    _two_bit("IQ2_XS", 20, "IQ2_XS", "Q2_K"),
    _two_bit("IQ2_XXS", 19, "IQ2_XXS", "Q2_K"),
    _two_bit("IQ1_M", 31, "IQ1_M", "Q2_K", output="IQ2_XXS"),
    _two_bit("IQ1_S", 24, "IQ1_S", "Q2_K", output="IQ2_XXS"),
    Recipe(
        "MXFP4_MOE",
        38,
        "Q8_0",
        dict.fromkeys((Role.EXPERT_GATE, Role.EXPERT_UP, Role.EXPERT_DOWN), (("MXFP4", _always),)),
    ),
    _recipe("Q2_0", 41, "Q2_0", embedding="Q4_K"),
    replace(_recipe("TQ2_0", 37, "TQ2_0", embedding="Q4_K"), outdone=True),
    replace(_recipe("TQ1_0", 36, "TQ1_0", embedding="Q4_K"), outdone=True),
    _experts_low("EXPERTS_Q4", 15, "Q4_K", "Q4_K"),
    _experts_low("EXPERTS_Q3", 23, "IQ3_XXS", "Q3_K"),
    _experts_low("EXPERTS_Q2", 19, "IQ2_XXS", "Q2_K"),
)

RECIPES: Mapping[str, Recipe] = {recipe.name: recipe for recipe in _ALL}

# What llama.cpp takes instead when rows are not a multiple of the type's block.
FALLBACKS: Mapping[str, str] = {
    **dict.fromkeys(
        ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_XS"),
        "IQ4_NL",
    ),
    **dict.fromkeys(("Q2_K", "Q3_K", "TQ1_0", "TQ2_0", "Q2_0"), "Q4_0"),
    "Q4_K": "Q5_0",
    "Q5_K": "Q5_1",
    "Q6_K": "Q8_0",
}
LAST_RESORT = "F16"  # any row length


ALIASES: Mapping[str, str] = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M", "COPY": "NATIVE"}
"""Other names that llama-quantize takes."""


def recipe_named(name: str) -> Recipe:
    """The recipe of that name or alias, whatever its case. Raises BadInput for an unknown one."""
    known = ALIASES.get(name.upper(), name.upper())
    if known not in RECIPES:
        close = get_close_matches(name.upper(), [*RECIPES, *ALIASES])
        hint = f"did you mean {' or '.join(close)}? " if close else ""
        raise BadInput(f"--quant is {name!r}, which is no recipe: {hint}`moecast recipes` lists them")
    return RECIPES[known]
