"""The adapter: real tensor lists are consumed exactly once, sizes are those of llama.cpp, configs are asserted."""

from __future__ import annotations

import dataclasses
import json
import re
from functools import cache
from math import prod
from typing import Any

import pytest
import real_deepseek
import real_models
from moecast.archs.config import Config
from moecast.archs.deepseek_v4 import ARCHITECTURE
from moecast.archs.graph import CompressedAttention, Graph, HashRouter, MoE
from moecast.archs.weights import Role
from moecast.errors import BadInput
from moecast.quant.formats.table import format_named
from moecast.quant.planning.plan import ALIGNMENT, Plan, plan_file, plan_tensors
from moecast.quant.planning.recipes import recipe_named

GIB = 2**30


@cache
def graph(name: str) -> Graph:
    return ARCHITECTURE.from_checkpoint(real_models.config(real_deepseek.CONFIGS[name]), real_deepseek.tensors(name))


@cache
def wide_graph(name: str) -> Graph:
    """Experts of 16 bits, as `llama-quantize` would find them: no recipe is capped by what the source has."""
    model = dataclasses.replace(real_deepseek.MODELS[name], experts_dtype="BF16")
    return ARCHITECTURE.from_checkpoint(real_models.config(real_deepseek.CONFIGS[name]), real_deepseek.listed(model))


@pytest.mark.parametrize(
    ("name", "count", "size"),
    [("flash", 69_187, 159_609_485_896), ("flash-0731", 72_317, 166_878_536_440), ("pro", 145_116, 864_704_792_696)],
)
def test_list_has_the_published_totals(name: str, count: int, size: int) -> None:
    tensors = real_deepseek.tensors(name)
    assert len(tensors) == count
    assert sum(tensor.length for tensor in tensors) == size


def test_generated_list_is_that_of_the_shard_headers() -> None:
    """The headers are data of a real upload; the generator, told of 160 experts, gives the same tensors."""
    real = real_deepseek.pruned_0731()
    assert len(real) == 45_821 and sum(tensor.length for tensor in real) == 107_803_320_952
    generated = real_deepseek.listed(dataclasses.replace(real_deepseek.MODELS["flash-0731"], experts=160))
    assert {(t.name, t.dtype, t.shape) for t in real} == {(t.name, t.dtype, t.shape) for t in generated}


@pytest.mark.whole
@pytest.mark.parametrize(
    ("name", "parameters", "active"),
    [("flash", 284_332_240_471, 13e9), ("flash-0731", 284_332_240_471, 13e9), ("flash-base", 284_332_240_471, 13e9),
     ("pro", 1_572_997_201_763, 49e9), ("pro-base", 1_572_997_201_763, 49e9)],
)  # fmt: skip
def test_real_model(name: str, parameters: int, active: float) -> None:
    """Parameters as published, drafts left out, the cards' active parameters."""
    assert graph(name).parameters() == parameters
    assert graph(name).active_parameters() == pytest.approx(active, rel=0.05)
    plan = plan_tensors(graph(name), recipe_named("IQ2_XXS"))
    assert plan.problems == ()
    assert [weight.name for weight in graph(name).weights()] == [tensor.weight.name for tensor in plan.tensors]


@pytest.mark.parametrize("name", ["flash", "flash-0731", "flash-base", "pro"])
def test_draft(name: str) -> None:
    """All that the list has under mtp. is in it but scales; embedding, norm and head come again, if not for blocks."""
    model, tensors = graph(name), real_deepseek.tensors(name)
    assert model.draft
    of_draft = [tensor for tensor in tensors if tensor.name.startswith("mtp.") and not tensor.name.endswith(".scale")]
    elements = sum(prod(tensor.shape) * (2 if tensor.dtype == "I8" else 1) for tensor in of_draft)
    again = 0 if model.draft.block else sum(w.elements for w in (model.embedding, model.head, model.final_norm.weight))
    assert model.draft.parameters() == elements + again
    assert plan_tensors(model.draft, recipe_named("Q4_K_M")).problems == ()


def test_geometry() -> None:
    """Of the model card: two sliding layers, then both compressors in turn; three hash-routed layers."""
    attentions = [op for op in graph("flash").operations() if isinstance(op, CompressedAttention)]
    ratios = [attention.compressor.ratio if attention.compressor else 0 for attention in attentions]
    assert ratios == [0, 0, *20 * [4, 128], 4]
    assert [attention.indexer is not None for attention in attentions] == [ratio == 4 for ratio in ratios]
    assert attentions[1].rope.base == 10000 and attentions[1].rope.yarn is None
    assert attentions[2].rope.base == 160000 and attentions[2].rope.yarn and attentions[2].rope.yarn.factor == 16
    hashed = [isinstance(op.router, HashRouter) for op in graph("pro").operations() if isinstance(op, MoE)]
    assert hashed == [True] * 3 + [False] * 58


def test_pruned_derivative() -> None:
    tensors = real_deepseek.pruned_0731()
    pruned = ARCHITECTURE.from_checkpoint(real_models.config("deepseek-v4-flash-0731-reap"), tensors)
    experts = next(op for op in pruned.operations() if isinstance(op, MoE))
    assert experts.experts == 160
    (note,) = plan_file(pruned, recipe_named("Q4_K_M")).problems
    assert note.startswith("left out multi-token prediction, which takes a file of its own")
    draft = pruned.draft
    assert draft and draft.block and draft.block.sources == (40, 41, 42) and draft.block.mask == 128799
    missing = [tensor for tensor in tensors if not tensor.name.startswith("mtp.1.")]
    without = ARCHITECTURE.from_checkpoint(real_models.config("deepseek-v4-flash-0731-reap"), missing)
    assert without.draft is None and without.notes[0].startswith("multi-token prediction is left out: ")


@pytest.mark.parametrize(
    ("key", "value", "problem"),
    [
        ("dspark_noise_token_id", 129280, "a draft's mask is token 129280, expected one of the 129280"),
        ("dspark_target_layer_ids", [40, 43], "dspark_target_layer_ids is [40, 43], expected layers from 0 to 42"),
        ("dspark_target_layer_ids", [], "dspark_target_layer_ids is [], expected layers from 0 to 42"),
        ("dspark_block_size", 0, "dspark_block_size is 0, expected a positive whole number"),
        ("dspark_markov_rank", 128, "gives shape [129280, 256], expected [129280, 128] from the configuration"),
    ],
)
def test_blocks_that_cannot_be(key: str, value: object, problem: str) -> None:
    """The model does without, and says why."""
    config = real_models.config("deepseek-v4-flash-0731-reap")
    changed = Config(dict(config._values) | {key: value}, config.origin)
    read = ARCHITECTURE.from_checkpoint(changed, real_deepseek.pruned_0731())
    assert read.draft is None and len([*read.weights()]) > 1000
    assert read.notes[0].startswith("multi-token prediction is left out: ") and problem in read.notes[0]


STOCK_SIZES = {  # GiB, as `llama-quantize --dry-run` prints them; the last digit is rounded
    "flash": {
        "Q8_0": 281.4, "Q6_K": 217.3, "Q5_K_M": 187.8, "Q4_K_M": 160.0, "Q4_K_S": 150.4, "IQ4_XS": 142.5,
        "Q3_K_M": 126.0, "IQ3_M": 115.4, "IQ3_XXS": 107.0, "Q2_K": 96.0, "IQ2_M": 85.8, "IQ2_XXS": 69.0,
        "MXFP4_MOE": 144.3, "Q2_0": 75.0,
    },
    "pro": {
        "Q8_0": 1556.7, "Q6_K": 1201.9, "Q5_K_M": 1039.0, "Q4_K_M": 885.6, "Q4_K_S": 831.4, "IQ4_XS": 787.4,
        "Q3_K_M": 697.0, "IQ3_M": 637.4, "IQ3_XXS": 591.3, "Q2_K": 530.3, "IQ2_M": 473.4, "IQ2_XXS": 380.6,
        "MXFP4_MOE": 791.1, "Q2_0": 413.0,
    },
}  # fmt: skip
SPARED = (Role.HYPER_CONNECTION, Role.COMPRESSOR, Role.COMPRESSOR_POSITION, Role.INDEXER, Role.ATTENTION_OUTPUT_DOWN)


def stock_bytes(plan: Plan) -> int:
    """Size with the recipe's base type where we spare what stock llama-quantize does not."""
    base = format_named(plan.recipe.base)
    total = 0
    for tensor in plan.tensors:
        weight = tensor.weight
        if weight.role in SPARED and len(weight.shape) > 1 and weight.columns % base.block_size == 0:
            size = weight.elements // base.block_size * base.block_bytes
            total += -(-size // ALIGNMENT) * ALIGNMENT
        else:
            total += tensor.aligned_bytes
    return total


@pytest.mark.whole
@pytest.mark.parametrize(("name", "quant"), [(name, quant) for name in STOCK_SIZES for quant in STOCK_SIZES[name]])
def test_planned_size_is_that_of_llama_quantize(name: str, quant: str) -> None:
    """To 0.5 %, and within 1.1 % for all that we spare."""
    plan = plan_tensors(wide_graph(name), recipe_named(quant))
    assert stock_bytes(plan) / GIB == pytest.approx(STOCK_SIZES[name][quant], rel=0.005)
    assert plan.bytes / GIB == pytest.approx(STOCK_SIZES[name][quant], rel=0.011)
    assert plan.problems == ()


def test_no_tensor_gets_more_bits_than_its_source_has() -> None:
    """Q8_0 keeps experts of 4.25 bits as they are."""
    plan = plan_tensors(graph("flash"), recipe_named("Q8_0"))
    assert {t.type.name for t in plan.tensors if t.weight.experts} == {"MXFP4"}
    assert plan.bytes < 160e9


@pytest.mark.parametrize(
    ("quant", "gigabytes"), [("EXPERTS_Q2", 87.3), ("EXPERTS_Q3", 119.8), ("EXPERTS_Q4", 156.5), ("NATIVE", 162.0)]
)
def test_experts_low_and_the_rest_high(quant: str, gigabytes: float) -> None:
    """The two-bit mix is as large as the published one of its kind, 86.7 GB."""
    plan = plan_tensors(graph("flash"), recipe_named(quant))
    assert plan.bytes / 1e9 == pytest.approx(gigabytes, abs=0.1)
    low = {tensor.type.name for tensor in plan.tensors if tensor.type.bits_per_weight < 8}
    assert low == {t.type.name for t in plan.tensors if t.weight.role in (Role.EXPERT_GATE, Role.EXPERT_DOWN)}


def test_missing_and_unknown_tensors_are_named() -> None:
    tensors = list(real_deepseek.tensors("flash"))
    config = real_models.config("deepseek-v4-flash")
    for number in (0, 100, 40_000):
        missing = tensors[number].name.removesuffix("weight").removesuffix("scale")
        with pytest.raises(BadInput, match=re.escape(missing)):
            ARCHITECTURE.from_checkpoint(config, tensors[:number] + tensors[number + 1 :])
    stranger = dataclasses.replace(tensors[0], name="layers.3.attn.surprise.weight")
    with pytest.raises(BadInput, match=r"layers\.3\.attn\.surprise\.weight in hub: unknown tensor"):
        ARCHITECTURE.from_checkpoint(config, (*tensors, stranger))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("scoring_func", "sigmoid"), ("hc_mult", 2), ("num_key_value_heads", 2), ("num_hash_layers", 44),
        ("compress_ratios", [8] * 43), ("compress_ratios", [4] * 42), ("norm_topk_prob", False),
        ("rope_scaling", {"type": "linear", "factor": 2}), ("topk_method", "greedy"), ("q_lora_rank", 0),
    ],
)  # fmt: skip
def test_variants_nobody_implemented_stop(key: str, value: Any) -> None:
    values = json.loads((real_models.DATA / "deepseek-v4-flash-config.json").read_text())
    wrong = Config(values | {key: value}, "config.json")
    name = "rope type" if key == "rope_scaling" else key
    with pytest.raises(BadInput, match=rf"config\.json.*{name}"):
        ARCHITECTURE.from_checkpoint(wrong, ())
