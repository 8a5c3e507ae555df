"""The adapter: published tensor lists are consumed exactly once, sizes are llama.cpp's, configurations are asserted."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import real_models
import real_qwen3
from moecast.archs.config import Config
from moecast.archs.graph import Attention, Graph, MoE, Router
from moecast.archs.harmless import refuse_unread
from moecast.archs.qwen3_moe import ARCHITECTURE
from moecast.errors import BadInput
from moecast.quant.planning.allocation import typical_damage
from moecast.quant.planning.fit import Machine, fit
from moecast.quant.planning.plan import plan_tensors
from moecast.quant.planning.recipes import recipe_named

MIB, GIB = 2**20, 2**30
RELEASES = ["qwen3-30b-a3b", "qwen3-235b-a22b", "qwen3-coder-480b-a35b"]


def graph_of(name: str, encoding: str = "BF16", **changes: Any) -> Graph:
    """Of a published list, with some keys of its config.json changed."""
    config = Config(dict(real_models.config(name)._values) | changes, "config.json")
    graph = ARCHITECTURE.from_checkpoint(config, real_qwen3.tensors(name, encoding))
    refuse_unread(config, ARCHITECTURE.name, ARCHITECTURE.harmless, ())
    return graph


_published = cache(graph_of)


@pytest.mark.parametrize(
    ("name", "count", "size"),
    [
        ("qwen3-30b-a3b", 18_867, 61_064_245_248),
        ("qwen3-235b-a22b", 36_945, 470_187_269_120),
        ("qwen3-coder-480b-a35b", 30_321, 960_309_750_784),
    ],
)
def test_list_has_the_published_totals(name: str, count: int, size: int) -> None:
    tensors = real_qwen3.tensors(name)
    assert (len(tensors), sum(tensor.length for tensor in tensors)) == (count, size)


@pytest.mark.parametrize(
    ("name", "total", "active", "state"),
    [  # in billions; bytes of keys and values for a token
        ("qwen3-30b-a3b", 30.5, 3.3, 98_304), ("qwen3-235b-a22b", 235.1, 22.1, 192_512),
        ("qwen3-coder-480b-a35b", 480.2, 35.4, 253_952),
    ],
)  # fmt: skip
def test_real_model(name: str, total: float, active: float, state: int) -> None:
    """As the model cards say, which count the whole embedding as active."""
    graph = graph_of(name)
    assert graph.parameters() / 1e9 == pytest.approx(total, abs=0.06)
    assert (graph.active_parameters() + graph.embedding.elements) / 1e9 == pytest.approx(active, abs=0.1)
    assert graph.state_bytes_per_token() == state and graph.fixed_state_bytes() == 0
    attention, experts = graph.layers[-1].operations
    assert isinstance(attention, Attention) and isinstance(experts, MoE) and isinstance(experts.router, Router)
    assert attention.head_size == 128 and attention.query_norm.weight.shape == (128,)
    assert experts.router.normalize and experts.router.top_k == 8


@pytest.mark.parametrize("encoding", ["FP8", "NVFP4", "GPTQ", "AWQ"])
@pytest.mark.parametrize("name", RELEASES[:2])
def test_quantized_releases_hold_the_same_weights(name: str, encoding: str) -> None:
    quantization = {"quant_method": encoding.lower(), "bits": 4} if encoding in ("GPTQ", "AWQ") else None
    plain, quantized = graph_of(name), graph_of(name, encoding, quantization_config=quantization)
    assert [(w.name, w.shape) for w in quantized.weights()] == [(w.name, w.shape) for w in plain.weights()]
    assert quantized.notes == ()


@pytest.mark.parametrize("encoding", ["GPTQ", "AWQ"])
def test_whole_numbers_of_other_tools_are_refused_by_name(encoding: str) -> None:
    with pytest.raises(BadInput, match=r"self_attn\.q_proj is not in a form that can be read: .*GPTQ nor AWQ") as error:
        graph_of("qwen3-30b-a3b", encoding, quantization_config={"quant_method": "auto-round", "bits": 4})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("quant", "smaller", "larger"),
    [  # MiB of 30B-A3B and 235B-A22B, as `llama-quantize --dry-run` prints them
        ("Q8_0", 30973.40, 238355.73), ("Q6_K", 23924.41, 184068.19), ("Q5_K_M", 20713.44, 159080.65),
        ("Q4_K_M", 17691.34, 135562.96), ("Q4_K_S", 16641.65, 127488.24), ("IQ4_XS", 15784.38, 120794.32),
        ("Q3_K_M", 14024.62, 107232.45), ("IQ3_M", 12881.37, 98285.95), ("IQ3_XXS", 11879.71, 90690.06),
        ("Q2_K", 10731.35, 81715.58), ("IQ2_M", 9692.71, 73572.06), ("IQ2_XXS", 7796.57, 58929.04),
        ("MXFP4_MOE", 16285.40, 123299.73),
    ],
)  # fmt: skip
def test_planned_size_is_that_of_llama_quantize(quant: str, smaller: float, larger: float) -> None:
    for name, size in zip(RELEASES, (smaller, larger), strict=False):
        plan = plan_tensors(_published(name), recipe_named(quant))
        assert plan.bytes / MIB == pytest.approx(size, abs=0.01)
        assert plan.problems == ()


def test_fits_into_a_machine() -> None:
    """Keys and values of 32,768 tokens are 3 GiB; weights take the rest of both memories, and no more."""
    graph = _published("qwen3-30b-a3b")
    found = fit(graph, Machine(ram=16 * GIB, vram=16 * GIB, context=32_768), typical_damage(graph))
    taken = found.plan.bytes + found.state_bytes + found.working_bytes
    assert found.state_bytes == 3 * GIB and 24 * GIB < taken <= 32 * GIB and 0 < found.layers_in_ram < 48


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("hidden_act", "gelu", "hidden_act"), ("qkv_bias", True, "qkv_bias"), ("use_qk_norm", False, "use_qk_norm"),
        ("shared_expert_intermediate_size", 512, "shared_expert_intermediate_size"),
        ("use_sliding_window", True, "sliding_window is missing"), ("mlp_only_layers", [48], "mlp_only_layers"),
        ("mlp_only_layers", 3, "mlp_only_layers"), ("decoder_sparse_step", 0, "decoder_sparse_step"),
        ("rope_scaling", {"rope_type": "linear", "factor": 2.0}, "rope type is 'linear'"),
        ("rope_scaling", {"rope_type": "yarn"}, "factor is missing"),
        ("rope_scaling", {"rope_type": "yarn", "factor": 4.0, "beta_fast": 16}, "beta_fast"),
        ("rope_scaling", {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.0}, "attention_factor"),
        ("rope_scaling", {"rope_type": "yarn", "factor": 4.0, "mscale": 1.0}, "mscale"),
        ("partial_rotary_factor", 0.5, "partial_rotary_factor"), ("num_experts", 4, "num_experts_per_tok"),
        ("num_attention_heads", 30, "attention heads"), ("head_dim", 127, "head_dim"), ("norm_topk_prob", 1, "norm_"),
    ],
)  # fmt: skip
def test_unknown_config_values_are_named(key: str, value: object, named: str) -> None:
    with pytest.raises(BadInput, match=rf"^config\.json.*{named}") as error:
        graph_of("qwen3-30b-a3b", **{key: value})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("missing", [0, 9_000, -1])
def test_missing_tensor_is_named(missing: int) -> None:
    tensors = list(real_qwen3.tensors("qwen3-30b-a3b"))
    name = tensors.pop(missing).name
    with pytest.raises(BadInput, match=name):
        ARCHITECTURE.from_checkpoint(real_models.config("qwen3-30b-a3b"), tensors)


def test_dense_layers_take_the_width_of_their_own() -> None:
    """As configured and as listed: a list without them does not fit."""
    with pytest.raises(BadInput, match=r"model\.layers\.3\.mlp\.gate_proj\.weight is missing"):
        graph_of("qwen3-30b-a3b", mlp_only_layers=[3])
