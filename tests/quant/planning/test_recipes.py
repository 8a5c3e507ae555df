"""The recipes are llama-quantize's: what it calls them, and which type it gives each tensor."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest
from llama_library import load_library
from moecast.quant.planning.plan import plan_tensors
from moecast.quant.planning.recipes import GUESSED, RECIPES, recipe_named
from moecast.sources.model import open_model

EXAMPLES = Path(__file__).parents[3] / "examples"
STOCK = sorted(name for name, recipe in RECIPES.items() if not recipe.ours and recipe.file_type != GUESSED)
OTHERWISE = {"Q2_K": "Q2_K_M", "IQ3_M": "IQ3_S_mix", "F32": "all_F32", "MXFP4_MOE": "MXFP4_MoE"}


@pytest.mark.parametrize("name", STOCK)
def test_file_type_is_what_llama_cpp_calls_so(name: str) -> None:
    called = load_library().llama_ftype_name(RECIPES[name].file_type).decode()
    called = re.sub(r" - ([SML])(mall|edium|arge)$", r"_\1", called)
    called = re.sub(r" - [\d.]+ bpw( ternary)?$", "", called).replace(" ", "_")
    assert called == OTHERWISE.get(name, name)


@pytest.mark.parametrize(
    ("example", "base", "counts"),
    [  # llama_model_quantize wrote these for files of the examples without padding
        ("minimax-m2-tiny", "Q4_1", {"Q4_1": 15, "F32": 13, "Q6_K": 1}),
        ("minimax-m2-tiny", "Q5_1", {"Q5_1": 15, "F32": 13, "Q6_K": 1}),
        ("minimax-m2-tiny", "TQ1_0", {"F32": 13, "TQ1_0": 10, "Q4_0": 4, "Q6_K": 1, "Q4_K": 1}),
        ("minimax-m2-tiny", "TQ2_0", {"F32": 13, "TQ2_0": 10, "Q4_0": 4, "Q6_K": 1, "Q4_K": 1}),
        ("nemotron-3-tiny", "Q4_1", {"F32": 22, "Q4_1": 21, "Q6_K": 1}),
        ("nemotron-3-tiny", "Q5_1", {"F32": 22, "Q5_1": 21, "Q6_K": 1}),
        ("nemotron-3-tiny", "TQ1_0", {"F32": 22, "TQ1_0": 12, "Q4_0": 8, "Q6_K": 1, "Q4_K": 1}),
        ("nemotron-3-tiny", "TQ2_0", {"F32": 22, "TQ2_0": 12, "Q4_0": 8, "Q6_K": 1, "Q4_K": 1}),
    ],
)
def test_types_are_those_that_llama_quantize_gives(example: str, base: str, counts: dict[str, int]) -> None:
    plan = plan_tensors(open_model(EXAMPLES / example).graph, recipe_named(base))
    types = {tensor.weight.name: tensor.type.name for tensor in plan.tensors}
    assert Counter(types.values()) == counts
    assert types["output.weight"] == "Q6_K"
    assert types["token_embd.weight"] == ("Q4_K" if base.startswith("TQ") else base)
