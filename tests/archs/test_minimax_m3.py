"""The adapter: published tensor lists are consumed exactly once, configurations are asserted."""

from __future__ import annotations

import copy
from functools import cache
from math import prod
from typing import Any

import pytest
import real_minimax_m3
import real_models
from moecast.archs.config import Config
from moecast.archs.graph import MLP, Attention, Graph, MoE, Router
from moecast.archs.harmless import refuse_unread
from moecast.archs.minimax_m3 import ARCHITECTURE
from moecast.archs.registry import architecture_of
from moecast.errors import BadInput
from moecast.quant.planning.plan import plan_tensors
from moecast.quant.planning.recipes import recipe_named


def graph_of(encoding: str = "BF16", sparse: dict[str, Any] | None = None, **changes: Any) -> Graph:
    """Of a published list, with some keys of the language model's configuration changed."""
    values = copy.deepcopy(dict(real_minimax_m3.config()._values))
    values["text_config"] |= changes
    values["text_config"]["sparse_attention_config"] |= sparse or {}
    config = Config(values, "config.json")
    graph = architecture_of(config).from_checkpoint(config, real_minimax_m3.tensors(encoding))
    refuse_unread(config, ARCHITECTURE.name, ARCHITECTURE.harmless, ())
    return graph


_published = cache(graph_of)


def test_list_has_the_published_totals() -> None:
    tensors = real_minimax_m3.tensors()
    assert (len(tensors), sum(tensor.length for tensor in tensors)) == (23_416, 854_172_958_720)
    assert sum(prod(tensor.shape) for tensor in tensors) == 427_040_140_160
    assert len(real_minimax_m3.tensors("NVFP4")) == 89_614


def test_real_model() -> None:
    """428B-A23B without the head, as llama.cpp names it; keys and values of 60 layers, index keys of 57."""
    graph = _published()
    language_model = (t for t in real_minimax_m3.tensors() if t.name.startswith("language_model."))
    assert graph.parameters() == sum(prod(tensor.shape) for tensor in language_model)
    assert 23e9 < graph.active_parameters() - graph.head.elements < 24e9
    assert graph.state_bytes_per_token() == 2 * (60 * 2 * 4 * 128 + 57 * 128) and graph.fixed_state_bytes() == 0
    assert any("of the vision tower are left out" in note for note in graph.notes)
    attention, dense = graph.layers[2].operations
    assert isinstance(attention, Attention) and attention.selection is None and isinstance(dense, MLP)
    attention, experts = graph.layers[3].operations
    assert isinstance(attention, Attention) and attention.selection and isinstance(experts, MoE)
    assert (attention.selection.top_k, attention.selection.block_size, attention.selection.local) == (16, 128, 1)
    assert isinstance(experts.router, Router) and experts.router.scale == 2 and experts.clamp == 7


@pytest.mark.parametrize("encoding", ["NVFP4", "MXFP8"])
def test_quantized_releases_hold_the_same_weights(encoding: str) -> None:
    plain, quantized = _published(), graph_of(encoding)
    assert [(w.name, w.shape) for w in quantized.weights()] == [(w.name, w.shape) for w in plain.weights()]
    assert quantized.notes == plain.notes
    assert {w.source.exact for w in quantized.weights() if "attn_q.w" in w.name} == {"BF16"}


def test_flattened_configuration() -> None:
    """As it circulates, of the language model alone."""
    config = real_models.config("minimax-m3-flattened")
    language_model = [t for t in real_minimax_m3.tensors() if t.name.startswith("language_model.")]
    graph = architecture_of(config).from_checkpoint(config, language_model)
    refuse_unread(config, ARCHITECTURE.name, ARCHITECTURE.harmless, ())
    assert [*graph.weights()] == [*_published().weights()]
    assert ARCHITECTURE.gguf_metadata(graph) == ARCHITECTURE.gguf_metadata(_published())


def test_planned_size() -> None:
    """Q8_0 takes 34 bytes for 32 numbers; norms, routers and what selects blocks are float32."""
    plan = plan_tensors(_published(), recipe_named("Q8_0"))
    kept = [w for w in _published().weights() if len(w.shape) == 1 or "ffn_gate_inp" in w.name or ".indexer." in w.name]
    floats = sum(weight.elements for weight in kept)
    assert plan.bytes == (_published().parameters() - floats) * 34 // 32 + floats * 4
    assert not any("fall back" in problem for problem in plan.problems)


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("hidden_act", "gelu", "hidden_act"), ("swiglu_alpha", 1.5, "swiglu_alpha"),
        ("n_shared_experts", 2, "n_shared_experts"),
        ("use_gemma_norm", False, "use_gemma_norm"), ("qk_norm_type", "per_layer", "qk_norm_type"),
        ("attention_output_gate", True, "attention_output_gate"), ("scoring_func", "softmax", "scoring_func"),
        ("use_routing_bias", False, "use_routing_bias"), ("moe_layer_freq", [1] * 59, "moe_layer_freq"),
        ("mlp_layer_types", ["moe"] * 60, "mlp_layer_types"), ("layer_types", ["sparse"] * 60, "layer_types"),
        ("first_k_dense_replace", 4, "first_k_dense_replace"), ("num_key_value_heads", 8, "4 index heads, expected"),
        ("num_attention_heads", 62, "attention heads"), ("rotary_dim", 256, "intermediate|rotary|partial"),
        ("moe_intermediate_size", 1536, "moe_intermediate_size"), ("num_experts_per_tok", 129, "num_experts_per_tok"),
        ("rope_scaling", {"rope_type": "yarn", "factor": 4.0}, "rope_type"), ("window", 5, "window"),
    ],
)  # fmt: skip
def test_unknown_config_values_are_named(key: str, value: object, named: str) -> None:
    changes = {key: value} | ({"partial_rotary_factor": None} if key == "rotary_dim" else {})
    _assert_refused(named, **changes)


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("use_sparse_attention", False, "use_sparse_attention"), ("sparse_score_type", "mean", "sparse_score_type"),
        ("sparse_init_block", 1, "sparse_init_block"), ("sparse_local_block", 17, "17 local blocks, expected at most"),
        ("sparse_disable_index_value", [0] * 60, "sparse_disable_index_value is 0 for layer 3"),
        ("sparse_attention_freq", [1] * 61, "sparse_attention_freq"), ("sparse_index_dim", 32, "rotary_dim of index"),
        ("sparse_num_index_heads", 8, "8 index heads, expected one for each"), ("sparse_extra", 1, "sparse_extra"),
    ],
)  # fmt: skip
def test_unknown_values_of_sparse_attention_are_named(key: str, value: object, named: str) -> None:
    _assert_refused(named, sparse={key: value})


def _assert_refused(named: str, **changes: Any) -> None:
    with pytest.raises(BadInput, match=rf"^config\.json.*({named})") as error:
        graph_of(**changes)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("missing", [0, 9_000, 22_800])
def test_missing_tensor_is_named(missing: int) -> None:
    tensors = list(real_minimax_m3.tensors())
    name = tensors.pop(missing).name
    with pytest.raises(BadInput, match=name):
        ARCHITECTURE.from_checkpoint(real_minimax_m3.config(), tensors)
