"""The adapter: real tensor lists are consumed exactly once, sizes are those of llama.cpp, configs are asserted."""

from __future__ import annotations

import dataclasses
import json
from functools import cache
from typing import Any

import pytest
import real_models
import real_nemotron
from moecast.archs.config import Config
from moecast.archs.encodings import Nvfp4, Scaled
from moecast.archs.expressions import Stack, TensorInfo, stored_tensors
from moecast.archs.graph import MLP, Attention, Graph, Mamba2, MoE, graph_as_json
from moecast.archs.nemotron_h import MIXTURE
from moecast.errors import BadInput
from moecast.quant.planning.plan import Form, plan_file, plan_tensors
from moecast.quant.planning.recipes import recipe_named
from real_nemotron import CONFIGS, ENCODINGS

GIB = 2**30


@cache
def real_graph(model: str, encoding: str = "bf16") -> Graph:
    return MIXTURE.from_checkpoint(real_models.config(CONFIGS[model]), real_nemotron.tensors(model, encoding))


def without_drafting(graph: Graph) -> Graph:
    return dataclasses.replace(graph, predictions=())


@pytest.mark.whole
@pytest.mark.parametrize(
    ("model", "encoding", "count", "total"),
    [  # as the headers of the published files say
        ("nano", "bf16", 6_243, 63_171_713_408), ("nano", "nvfp4", 24_147, 19_339_781_632),
        ("nano", "fp8", 18_191, None), ("lightning", "bf16", 6_513, None),
        ("super", "bf16", 42_683, 247_222_108_160), ("super", "nvfp4", 165_860, 80_297_329_824),
        ("super", "fp8", 124_939, 128_334_890_304), ("ultra", "bf16", 51_023, 1_121_049_257_984),
    ],
)  # fmt: skip
def test_lists_have_the_published_totals(model: str, encoding: str, count: int, total: int | None) -> None:
    tensors = real_nemotron.tensors(model, encoding)
    assert len(tensors) == count
    assert total is None or sum(tensor.length for tensor in tensors) == total


@pytest.mark.whole
@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize(
    ("model", "parameters"),
    [
        ("nano", 31_577_940_288),
        ("lightning", 32_913_266_240),
        ("super", 123_611_033_088),
        ("ultra", 560_524_603_904),
    ],
)
def test_every_real_list_is_consumed(model: str, encoding: str, parameters: int) -> None:
    """`from_checkpoint` raises for a tensor that is missing, unknown or used twice."""
    graph = real_graph(model, encoding)
    assert graph.parameters() == parameters
    read = {tensor.name for weight in graph.weights() for tensor in stored_tensors(weight.source)}
    left = {tensor.name for tensor in real_nemotron.tensors(model, encoding)} - read
    assert all(name.endswith(("input_scale", "k_scale", "v_scale")) for name in left)


def test_real_model() -> None:
    """The geometry and the active parameters of the model cards; they count the embedding."""
    graph = real_graph("super")
    assert 12.7e9 < graph.active_parameters() + graph.embedding.elements < 12.8e9
    mamba, experts, attention = (graph.layers[index].operations[0] for index in (0, 1, 7))
    assert isinstance(mamba, Mamba2) and isinstance(experts, MoE) and isinstance(attention, Attention)
    assert (mamba.heads, mamba.inner_size, mamba.input.shape) == (128, 8192, (18560, 4096))
    assert (experts.experts, experts.router.top_k, experts.router.scale, experts.expert_size) == (512, 22, 5.0, 2688)
    assert isinstance(experts.shared, MLP) and experts.latent_down and experts.latent_down.shape == (1024, 4096)
    assert attention.rope is None and attention.query_norm is None
    assert graph.state_bytes_per_token() == 8 * 2 * 2 * 128 * 2
    json.dumps(graph_as_json(graph))


def test_mixed_encodings_are_read_tensor_by_tensor() -> None:
    """Super in NVFP4: FP8 in_proj beside BF16 out_proj in layer 6, NVFP4 experts, and no map of it is consulted."""
    graph = real_graph("super", "nvfp4")
    mamba, experts = (graph.layers[index].operations[0] for index in (6, 1))
    assert isinstance(mamba, Mamba2) and isinstance(experts, MoE) and experts.shared
    assert isinstance(mamba.input.source, Scaled) and not isinstance(mamba.output.source, Scaled)
    assert isinstance(experts.up.source, Stack) and isinstance(experts.up.source.experts[511], Nvfp4)
    assert isinstance(experts.shared.down.source, Nvfp4) and isinstance(experts.shared.up.source, Scaled)


@pytest.mark.whole
@pytest.mark.parametrize(
    ("quant", "nano", "super_", "ultra"),
    [  # as `llama-quantize --dry-run` prints them for these models without drafting; the last digit is rounded
        ("Q8_0", 31.3, 119.6, 544.1), ("Q6_K", 31.2, 105.2, 420.3), ("Q5_K_M", 24.2, 89.1, 369.4),
        ("Q4_K_M", 22.8, 80.1, 321.4), ("Q4_K_S", 20.4, 70.6, 292.5), ("IQ4_XS", 16.95, 63.0, 277.5),
        ("Q3_K_M", 18.5, 62.6, 255.3), ("IQ3_M", 16.9, 56.6, 225.1), ("IQ3_XXS", 16.8, 53.8, 212.3),
        ("Q2_K", 16.7, 49.8, 193.9), ("IQ2_M", 16.7, 49.3, 169.0), ("IQ2_XXS", 16.65, 45.5, 135.6),
        ("MXFP4_MOE", 16.7, 63.9, 289.1), ("Q2_0", 8.7, 32.3, 145.4),
    ],
)  # fmt: skip
def test_planned_size_is_that_of_llama_quantize(quant: str, nano: float, super_: float, ultra: float) -> None:
    for model, gibibytes in (("nano", nano), ("super", super_), ("ultra", ultra)):
        plan = plan_tensors(without_drafting(real_graph(model)), recipe_named(quant))
        assert plan.bytes / GIB == pytest.approx(gibibytes, abs=0.055)


@pytest.mark.parametrize("spelling", ["pattern", "words", "transformers"])
def test_three_spellings_of_the_layer_list(spelling: str) -> None:
    published = real_models.config("nemotron-3-nano")
    pattern = published.text("hybrid_override_pattern")
    words = {
        "words": {"M": "mamba", "E": "moe", "*": "attention"},
        "transformers": {"M": "linear_attention", "E": "moe", "*": "full_attention"},
    }
    changes: dict[str, Any] = {"num_hidden_layers": None}
    if spelling != "pattern":
        changes |= {"hybrid_override_pattern": None}
        changes |= {"layers_block_type": [words[spelling][letter] for letter in pattern]}
    graph = MIXTURE.from_checkpoint(changed(published, changes), real_nemotron.tensors("nano", "bf16"))
    assert graph == real_graph("nano")


@pytest.mark.parametrize("limit", [None, [0.0, float("inf")], [0.0, 1e308], [0.0, {"__float__": "Infinity"}]])
def test_no_limit_on_the_step_in_all_spellings(limit: object) -> None:
    config = changed(real_models.config("nemotron-3-nano"), {"time_step_limit": limit})
    assert MIXTURE.from_checkpoint(config, real_nemotron.tensors("nano", "bf16")) == real_graph("nano")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("mlp_hidden_act", "silu"), ("mamba_hidden_act", "relu"), ("norm_topk_prob", False), ("n_shared_experts", 2),
        ("sliding_window", 4096), ("use_bias", True), ("attention_bias", True), ("time_step_limit", [0.001, 0.1]),
        ("time_step_limit", "none"), ("time_step_limit", []), ("time_step_limit", [0.0]),
        ("hybrid_override_pattern", "ME?M"), ("hybrid_override_pattern", 52),
        ("hybrid_override_pattern", None), ("num_hidden_layers", 51), ("hybrid_override_pattern", "MEME" * 13),
        ("num_experts_per_tok", 129), ("n_group", 3), ("topk_group", 2), ("n_group", 128), ("num_key_value_heads", 3),
        ("n_groups", 7), ("hidden_size", "2688"), ("ssm_state_size", None),
    ],
)  # fmt: skip
def test_unknown_config_values_are_named(key: str, value: object) -> None:
    tensors = real_nemotron.tensors("lightning" if key.startswith("mtp") else "nano", "bf16")
    with pytest.raises(BadInput, match=r"config\.json") as error:
        MIXTURE.from_checkpoint(changed(real_models.config("nemotron-3-nano"), {key: value}), tensors)
    named = {
        "num_key_value_heads": "key-value heads",
        "topk_group": "topk_group",
        "mtp_hybrid_override_pattern": "drafting",
    }
    assert named.get(key, key) in str(error.value) or "layers are" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("missing", [0, 3, 5000, -1])
def test_missing_tensor_is_named(encoding: str, missing: int) -> None:
    unread = ("input_scale", "k_scale", "v_scale")
    tensors = [tensor for tensor in real_nemotron.tensors("nano", encoding) if not tensor.name.endswith(unread)]
    name = tensors.pop(missing).name
    stem = name.rsplit(".", 1)[0]
    with pytest.raises(BadInput, match=rf"{stem}"):
        MIXTURE.from_checkpoint(real_models.config("nemotron-3-nano"), tensors)


def test_unknown_and_misshapen_tensors_are_named() -> None:
    config = real_models.config("nemotron-3-nano")
    tensors = real_nemotron.tensors("nano", "nvfp4")
    stranger = dataclasses.replace(tensors[0], name="backbone.layers.99.norm.weight")
    with pytest.raises(BadInput, match=r"backbone\.layers\.99\.norm\.weight in hub: unknown tensor"):
        MIXTURE.from_checkpoint(config, (*tensors, stranger))
    for suffix, change, message in (
        ("up_proj.weight_scale", {"shape": (1856, 100)}, r"up_proj\.weight_scale in hub has shape \[1856, 100\]"),
        ("up_proj.weight_scale", {"dtype": "F32"}, r"up_proj\.weight_scale in hub has dtype F32"),
        ("up_proj.weight_scale_2", {"shape": (2,)}, r"up_proj\.weight_scale_2 in hub has shape \[2\]"),
        ("up_proj.weight", {"shape": (1856, 1000)}, r"up_proj\.weight_scale in hub"),
        ("up_proj.weight", {"dtype": "I8"}, r"up_proj is not in a form .* 8-bit whole numbers"),
        ("conv1d.weight", {"shape": (6144, 4, 2)}, r"conv1d\.weight in hub has shape \[6144, 4, 2\]"),
    ):
        with pytest.raises(BadInput, match=message):
            MIXTURE.from_checkpoint(config, damaged(tensors, suffix, change))


def damaged(tensors: tuple[TensorInfo, ...], suffix: str, change: dict[str, Any]) -> list[TensorInfo]:
    """The list with its first tensor of that name changed."""
    position = next(index for index, tensor in enumerate(tensors) if tensor.name.endswith(suffix))
    return [dataclasses.replace(t, **change) if i == position else t for i, t in enumerate(tensors)]


def changed(config: Config, values: dict[str, Any]) -> Config:
    return Config(dict(config._values) | values, "config.json")


@pytest.mark.whole
@pytest.mark.parametrize(
    ("quant", "nano", "super_"),
    [  # measured with llama-quantize on padded files of the real shapes
        ("Q6_K", 27.8, 96.6), ("Q4_K_M", 21.1, 73.6), ("Q4_K_S", 19.3, 67.3), ("IQ4_XS", 18.3, 63.9),
        ("Q3_K_M", 16.9, 58.7), ("Q2_K", 12.9, 44.7), ("IQ2_M", 11.3, 39.1), ("IQ2_XXS", 9.1, 31.4),
    ],
)  # fmt: skip
def test_padded_sizes(quant: str, nano: float, super_: float) -> None:
    for model, gibibytes in (("nano", nano), ("super", super_)):
        plan = plan_file(real_graph(model), recipe_named(quant), Form(padding=True, mtp=False))
        assert plan.bytes / GIB == pytest.approx(gibibytes, abs=0.06)
        assert not any("instead of" in problem for problem in plan.problems)
    assert plan_file(real_graph("ultra"), recipe_named(quant)).problems == ()


def test_padding_and_drafting_of_lightning() -> None:
    """The hidden size of 2688 may not grow while a LayerNorm of the drafting block looks at it."""
    graph = real_graph("lightning")
    dropped = plan_file(graph, recipe_named("IQ2_XXS"))
    assert dropped.graph.predictions == () and dropped.graph.hidden_size == 2816
    assert "left out multi-token prediction" in dropped.problems[0]
    kept = plan_file(graph, recipe_named("IQ2_XXS"), Form(mtp=True))
    assert kept.graph.predictions and kept.graph.hidden_size == 2688
    assert any("rows of 2688, not a multiple of 256" in problem for problem in kept.problems)
    without = plan_file(graph, recipe_named("IQ2_XXS"), Form(padding=False))
    for unpadded in (without, plan_file(graph, recipe_named("Q8_0"))):
        assert unpadded.graph == graph


@pytest.mark.parametrize(
    ("quant", "nano", "widths"),
    [  # the first two pad everything, which has the size above; then some widths, then none
        ("Q4_K_M", 21.1, (2816, 2048, 3840)), ("IQ2_XXS", 9.1, (2816, 2048, 3840)),
        ("Q3_K_L", 18.1, (2816, 1856, 3840)), ("Q5_K_M", 24.2, (2688, 1856, 3840)),
        ("IQ4_XS", 16.9, (2688, 1856, 3712)),
    ],
)  # fmt: skip
def test_widths_are_padded_where_that_saves_bytes(quant: str, nano: float, widths: tuple[int, ...]) -> None:
    plan = plan_file(real_graph("nano"), recipe_named(quant))
    assert plan.bytes / GIB == pytest.approx(nano, abs=0.06)
    experts = next(operation for operation in plan.graph.operations() if isinstance(operation, MoE))
    assert experts.shared
    assert (plan.graph.hidden_size, experts.expert_size, experts.shared.up.shape[0]) == widths


@pytest.mark.whole
@pytest.mark.parametrize(("model", "excess"), [("nano", 0.001), ("lightning", 0.01), ("super", 0.01), ("ultra", 0.01)])
def test_native_is_as_large_as_the_checkpoint(model: str, excess: float) -> None:
    """NVFP4 costs 4.5 bits in both; FP8 grows to the 8.5 bits of Q8_0, routers and scalars to float32."""
    plan = plan_file(real_graph(model, "nvfp4"), recipe_named("native"))
    stored = sum(tensor.length for tensor in real_nemotron.tensors(model, "nvfp4"))
    assert 1 <= plan.bytes / stored < 1 + excess
    kept = [tensor for tensor in plan.tensors if tensor.type.name == "NVFP4"]
    assert len(kept) == {"nano": 126, "lightning": 46, "super": 81, "ultra": 96}[model]
