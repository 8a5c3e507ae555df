"""The adapters of Qwen3-Next and Qwen3.5: published tensor lists are consumed exactly once, sizes are llama.cpp's,
configurations are asserted."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import real_deltanet
import real_models
from moecast.archs.config import Config
from moecast.archs.graph import Attention, GatedDeltaNet, Graph, MoE, Router, graph_as_json
from moecast.archs.harmless import refuse_unread
from moecast.archs.registry import architecture_of
from moecast.archs.weights import Role
from moecast.errors import BadInput
from moecast.quant.formats.table import format_named
from moecast.quant.planning.allocation import typical_damage
from moecast.quant.planning.fit import Machine, fit
from moecast.quant.planning.plan import plan_tensors
from moecast.quant.planning.recipes import recipe_named
from real_deltanet import RELEASES

MIB, GIB = 2**20, 2**30
PLAIN = ("Qwen3-Next", "Qwen3.5-35B-A3B", "Qwen3.5-122B-A10B", "Qwen3.5-397B-A17B", "Qwen3.5-27B")
VISION = "333 tensors of the vision tower are left out: the model reads text alone"


def graph_of(name: str, nested: bool = False, **changes: Any) -> Graph:
    """Of a published list, with some keys of its config.json changed, `nested` those of the language model."""
    values = json.loads(json.dumps(real_models.config(RELEASES[name].config)._values))
    (values["text_config"] if nested else values).update(changes)
    config = Config(values, "config.json")
    architecture = architecture_of(config)
    graph = architecture.from_checkpoint(config, real_deltanet.tensors(name))
    refuse_unread(config, architecture.name, architecture.harmless, ())
    return graph


_published = cache(graph_of)


@pytest.mark.parametrize(
    ("name", "count", "size"),
    [
        ("Qwen3.5-27B", 1_199, 55_562_872_800), ("Qwen3.6-35B-A3B", 1_045, 71_903_645_408),
        ("Qwen3.6-35B-A3B FP8", 64_196, 37_454_789_472), ("Qwen3.5-35B-A3B GPTQ", 124_611, 24_403_162_208),
    ],
)  # fmt: skip
def test_list_has_the_published_totals(name: str, count: int, size: int) -> None:
    tensors = real_deltanet.tensors(name)
    assert (len(tensors), sum(tensor.length for tensor in tensors)) == (count, size)


@pytest.mark.parametrize("name", [name for name in RELEASES if "GPTQ" not in name])
def test_every_list_is_consumed(name: str) -> None:
    """`from_checkpoint` raises for a tensor that is missing, unknown or used twice."""
    graph = _published(name)
    assert len(graph.predictions) == 1
    assert graph.notes == (() if "Next" in name else (VISION,))


@pytest.mark.parametrize(
    ("name", "total", "active", "state", "fixed"),
    [  # in billions; bytes of keys and values for a token, of what does not grow
        ("Qwen3-Next", 80, 3, 24_576, 36 * (4 * 32 * 128 * 128 + 4 * 3 * 8192)),
        ("Qwen3.5-27B", 27, 27, 65_536, 48 * (4 * 48 * 128 * 128 + 4 * 3 * 10240)),
        ("Qwen3.5-35B-A3B", 35, 3, 20_480, 30 * (4 * 32 * 128 * 128 + 4 * 3 * 8192)),
        ("Qwen3.5-122B-A10B", 122, 10, 24_576, 36 * (4 * 64 * 128 * 128 + 4 * 3 * 12288)),
        ("Qwen3.5-397B-A17B", 397, 17, 30_720, 45 * (4 * 64 * 128 * 128 + 4 * 3 * 12288)),
    ],
)  # fmt: skip
def test_real_model(name: str, total: float, active: float, state: int, fixed: int) -> None:
    """As the names say, which count no drafting block."""
    graph = _published(name)
    assert graph.state_bytes_per_token() == state and graph.fixed_state_bytes() == fixed
    drafted = sum(weight.elements for weight in graph.weights() if weight.layer == len(graph.layers))
    assert (graph.parameters() - drafted) / 1e9 == pytest.approx(total, rel=0.02)
    assert graph.active_parameters() / 1e9 == pytest.approx(active, rel=0.2)
    delta, attention = graph.layers[0].operations[0], graph.layers[3].operations[0]
    assert isinstance(delta, GatedDeltaNet) and isinstance(attention, Attention) and attention.rope
    assert attention.gated and attention.rope.size == 64 and attention.rope.base == 1e7
    assert attention.rope.sections == (() if "Next" in name else (11, 11, 10))
    json.dumps(graph_as_json(graph))


def test_mixture() -> None:
    experts = _published("Qwen3-Next").layers[0].operations[1]
    assert isinstance(experts, MoE) and isinstance(experts.router, Router) and experts.shared_gate
    assert experts.router.normalize and experts.router.top_k == 10 and experts.experts == 512


def test_quantized_releases_hold_the_same_weights() -> None:
    for name, others in {
        "Qwen3-Next": ["Qwen3-Next FP8"],
        "Qwen3.5-35B-A3B": ["Qwen3.6-35B-A3B", "Qwen3.6-35B-A3B FP8", "Qwen3.6-35B-A3B NVFP4"],
        "Qwen3.5-397B-A17B": ["Qwen3.5-397B-A17B NVFP4"],
        "Qwen3.5-27B": ["Qwen3.6-27B NVFP4"],
    }.items():
        weights = [(weight.name, weight.shape) for weight in _published(name).weights()]
        assert all([(w.name, w.shape) for w in _published(other).weights()] == weights for other in others)


def test_whole_numbers_are_refused_by_name() -> None:
    with pytest.raises(BadInput, match=r"experts\.0\.gate_proj is not in a form that can be read: .*GPTQ") as error:
        graph_of("Qwen3.5-35B-A3B GPTQ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("quant", "sizes"),
    [  # MiB of Qwen3-Next and Qwen3.5-35B, 122B, 397B, 27B, as a dry run of llama.cpp's quantizer prints them
        ("Q8_0", (82552.92, 36040.46, 126404.49, 408659.34, 27690.97)),
        ("Q6_K", (63781.69, 27845.14, 97627.16, 315622.89, 21381.38)),
        ("Q5_K_M", (55269.71, 24162.81, 84590.09, 273050.04, 18620.21)),
        ("Q4_K_M", (47258.42, 20697.09, 72319.90, 232981.48, 16021.46)),
        ("Q4_K_S", (44266.80, 19412.87, 67772.73, 218647.92, 15081.70)),
        ("IQ4_XS", (42036.07, 18481.32, 64418.69, 207446.65, 14695.60)),
        ("Q3_K_M", (37248.36, 16360.92, 57028.10, 183708.04, 12864.82)),
        ("IQ3_M", (34122.27, 15063.89, 52326.85, 168209.85, 12166.34)),
        ("IQ3_XXS", (31660.70, 13956.44, 48494.15, 156025.09, 11160.35)),
        ("Q2_K", (28481.36, 12623.02, 43679.22, 140304.77, 10350.80)),
        ("IQ2_M", (25491.96, 11369.65, 39168.32, 125494.09, 9664.96)),
        ("IQ2_XXS", (20620.05, 9257.08, 31716.71, 101267.95, 8138.06)),
        ("MXFP4_MOE", (42568.92, 19312.46, 66428.49, 209555.34, 27690.97)),
    ],
)  # fmt: skip
def test_planned_size_is_that_of_llama_quantize(quant: str, sizes: tuple[float, ...]) -> None:
    """But for what sets decay and strength, of which llama.cpp rounds every bit that it does not need."""
    recipe = recipe_named(quant)
    for name, size in zip(PLAIN, sizes, strict=True):
        plan = plan_tensors(_published(name), recipe)
        rates = [tensor for tensor in plan.tensors if tensor.weight.role is Role.DELTA_RATE]
        assert {tensor.type.name for tensor in rates} == {"F32"}
        rounded = sum(format_named(recipe.base).row_bytes(t.weight.columns) * t.weight.shape[0] for t in rates)
        kept = sum(tensor.bytes for tensor in rates)
        assert (plan.bytes - kept + rounded) / MIB == pytest.approx(size, abs=0.01)
        assert kept / plan.bytes < 0.011
        assert plan.problems == ()


def test_fits_into_a_machine() -> None:
    """Of 262,144 tokens only every fourth layer keeps keys and values; weights take the rest of both memories."""
    graph = _published("Qwen3.5-35B-A3B")
    found = fit(graph, Machine(ram=16 * GIB, vram=16 * GIB, context=262_144), typical_damage(graph))
    taken = found.plan.bytes + found.state_bytes + found.working_bytes
    assert found.state_bytes == 5 * GIB + graph.fixed_state_bytes()
    assert 24 * GIB < taken <= 32 * GIB and 0 < found.layers_in_ram < 40


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("hidden_act", "gelu", "hidden_act"), ("attention_bias", True, "attention_bias"),
        ("attn_output_gate", False, "attn_output_gate"), ("output_gate_type", "sigmoid", "output_gate_type"),
        ("mlp_only_layers", [3], "mlp_only_layers"), ("norm_topk_prob", False, "norm_topk_prob"),
        ("mtp_num_hidden_layers", 2, "mtp_num_hidden_layers"), ("linear_num_key_heads", 12, "linear_num_value_heads"),
        ("mtp_use_dedicated_embeddings", True, "mtp_use_dedicated_embeddings"),
        ("layer_types", ["linear_attention"], "layer_types"), ("layer_types", ["mamba"] * 40, "layer_types"),
        ("rope_parameters", {"rope_type": "linear", "factor": 2.0}, "rope type is 'linear'"),
        ("rope_parameters", {"mrope_interleaved": False}, "mrope_interleaved"),
        ("rope_parameters", {"mrope_section": [1.5, 2, 3]}, "mrope_section"),
        ("rope_parameters", {"partial_rotary_factor": 0.25390625}, "partial_rotary_factor"),
        ("num_experts_per_tok", 257, "num_experts_per_tok"), ("num_key_value_heads", 3, "key-value heads"),
        ("something_new", 1, "text_config.something_new"), ("hidden_size", "2048", "hidden_size"),
    ],
)  # fmt: skip
def test_unknown_values_are_named(key: str, value: object, named: str) -> None:
    with pytest.raises(BadInput, match=named) as error:
        graph_of("Qwen3.5-35B-A3B", nested=True, **{key: value})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("key", ["use_sliding_window", "decoder_sparse_step", "mlp_only_layers", "attention_bias"])
def test_unknown_values_of_qwen3_next_are_named(key: str) -> None:
    value = {"decoder_sparse_step": 2, "mlp_only_layers": [1]}.get(key, True)
    with pytest.raises(BadInput, match=key):
        graph_of("Qwen3-Next", **{key: value})


@pytest.mark.parametrize("missing", [400, 9_000, 60_000])
def test_missing_tensor_is_named(missing: int) -> None:
    tensors = list(real_deltanet.tensors("Qwen3.6-35B-A3B FP8"))
    name = tensors.pop(missing).name
    config = real_models.config("qwen3.5-35b-a3b")
    with pytest.raises(BadInput, match=name.removesuffix("_scale_inv")):
        architecture_of(config).from_checkpoint(config, tensors)


@pytest.mark.parametrize("suffix", ["0.linear_attn.in_proj_qkvz.weight", "0.linear_attn.A_log"])
@pytest.mark.parametrize("name", ["Qwen3-Next", "Qwen3.6-35B-A3B"])
def test_tensors_of_another_length_are_named(name: str, suffix: str) -> None:
    """Also those of which rows are taken one by one."""
    suffix = suffix if "Next" in name else suffix.replace("qkvz", "z")
    config = real_models.config(RELEASES[name].config)
    longer = [
        replace(t, shape=(t.shape[0] + 128, *t.shape[1:])) if t.name.endswith(suffix) else t
        for t in real_deltanet.tensors(name)
    ]
    with pytest.raises(BadInput, match=rf"{suffix} in hub gives shape .*, expected .* from the configuration"):
        architecture_of(config).from_checkpoint(config, longer)


def test_drafting_block_that_is_not_whole_is_left_out() -> None:
    tensors = [tensor for tensor in real_deltanet.tensors("Qwen3.6-35B-A3B") if tensor.name != "mtp.fc.weight"]
    config = real_models.config("qwen3.5-35b-a3b")
    graph = architecture_of(config).from_checkpoint(config, tensors)
    assert not graph.predictions and graph.notes[1] == VISION
    assert "multi-token prediction is left out" in graph.notes[0] and "mtp.fc.weight is missing" in graph.notes[0]
