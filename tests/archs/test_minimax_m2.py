"""The adapter: real tensor lists are consumed exactly once, sizes are those of llama.cpp, configs are asserted."""

from __future__ import annotations

import dataclasses

import pytest
import real_models
from moecast.archs.config import Config
from moecast.archs.graph import Attention, Graph, MoE
from moecast.archs.minimax_m2 import ARCHITECTURE
from moecast.errors import BadInput
from moecast.quant.planning.plan import plan_tensors
from moecast.quant.planning.recipes import recipe_named

GIB = 2**30


@pytest.fixture(scope="module")
def real_graph() -> Graph:
    return ARCHITECTURE.from_checkpoint(real_models.config("minimax-m2.7"), real_models.minimax_m2())


def test_list_has_the_published_totals() -> None:
    tensors = real_models.minimax_m2()
    assert len(tensors) == 96_103
    assert sum(tensor.length for tensor in tensors) == 230_121_630_720


def test_real_model(real_graph: Graph) -> None:
    """Parameter counts as published; the geometry of the model card."""
    assert real_graph.parameters() == 228_689_764_864
    assert 9.7e9 < real_graph.active_parameters() - real_graph.head.elements < 9.9e9
    attention, experts = real_graph.layers[61].operations
    assert isinstance(attention, Attention) and isinstance(experts, MoE)
    assert (attention.heads, attention.key_value_heads, attention.rope.size, attention.rope.base) == (48, 8, 64, 5e6)
    assert (experts.experts, experts.router.top_k, experts.expert_size) == (256, 8, 1536)
    assert real_graph.state_bytes_per_token() == 62 * 2 * 8 * 128 * 2


def test_both_published_configs_give_the_same_weights(real_graph: Graph) -> None:
    older = ARCHITECTURE.from_checkpoint(real_models.config("minimax-m2.5"), real_models.minimax_m2())
    assert older.context_length == 196_608
    assert dataclasses.replace(older, context_length=real_graph.context_length) == real_graph


@pytest.mark.parametrize(
    ("quant", "gibibytes"),
    [  # as `llama-quantize --dry-run` prints them for this model; the last digit is rounded
        ("Q8_0", 226.4), ("Q6_K", 174.9), ("Q5_K_M", 151.2), ("Q4_K_M", 128.8), ("Q4_K_S", 121.1), ("IQ4_XS", 114.7),
        ("Q3_K_M", 101.8), ("IQ3_M", 93.1), ("IQ3_XXS", 86.2), ("Q2_K", 77.6), ("IQ2_M", 69.7), ("IQ2_XXS", 56.0),
        ("MXFP4_MOE", 115.3), ("Q2_0", 60.5),
    ],
)  # fmt: skip
def test_planned_size_is_that_of_llama_quantize(real_graph: Graph, quant: str, gibibytes: float) -> None:
    plan = plan_tensors(real_graph, recipe_named(quant))
    assert plan.bytes / GIB == pytest.approx(gibibytes, abs=0.05, rel=1e-3)
    assert plan.problems == ()


@pytest.mark.parametrize("missing", [0, 50_000, -1])
def test_missing_tensor_is_named(missing: int) -> None:
    tensors = list(real_models.minimax_m2())
    name = tensors.pop(missing).name
    stem = name.removesuffix("_scale_inv")
    with pytest.raises(BadInput, match=rf"{stem}|{name}"):
        ARCHITECTURE.from_checkpoint(real_models.config("minimax-m2.7"), tensors)


def test_unknown_and_doubled_tensors_are_named() -> None:
    tensors = real_models.minimax_m2()
    stranger = dataclasses.replace(tensors[0], name="model.layers.3.surprise.weight")
    with pytest.raises(BadInput, match=r"model\.layers\.3\.surprise\.weight in hub: unknown tensor"):
        ARCHITECTURE.from_checkpoint(real_models.config("minimax-m2.7"), (*tensors, stranger))
    with pytest.raises(BadInput, match=r"model\.norm\.weight appears twice"):
        ARCHITECTURE.from_checkpoint(real_models.config("minimax-m2.7"), (*tensors, tensors[1]))


def test_wrong_shape_and_dtype_are_named() -> None:
    tensors = list(real_models.minimax_m2())
    config = real_models.config("minimax-m2.7")
    for change, message in (
        ({"shape": (200064, 3000)}, r"model\.embed_tokens\.weight in hub gives shape \[200064, 3000\], expected"),
        ({"dtype": "I8"}, r"model\.embed_tokens\.weight in hub has dtype I8"),
        ({"dtype": "F8_E4M3"}, r"model\.embed_tokens\.weight in hub has dtype F8_E4M3.*weight_scale_inv"),
    ):
        with pytest.raises(BadInput, match=message):
            ARCHITECTURE.from_checkpoint(config, [dataclasses.replace(tensors[0], **change), *tensors[1:]])


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_act", "gelu"), ("scoring_func", "softmax"), ("use_qk_norm", False), ("qk_norm_type", "per_head"),
        ("shared_intermediate_size", 1024), ("rope_scaling", {"type": "yarn"}), ("num_experts_per_tok", 300),
        ("hidden_size", "3072"), ("hidden_size", -1), ("num_hidden_layers", None), ("head_dim", True),
        ("rotary_dim", 63), ("attn_type_list", [1] * 61 + [0]), ("num_attention_heads", 47), ("rms_norm_eps", "tiny"),
        ("quantization_config", {"weight_block_size": [128]}), ("rope_parameters", {"rope_type": "longrope"}),
    ],
)  # fmt: skip
def test_unknown_config_values_are_named(key: str, value: object) -> None:
    published = real_models.config("minimax-m2.7")
    changed = Config(dict(published._values) | {key: value}, "config.json")
    with pytest.raises(BadInput, match=r"config\.json") as error:
        ARCHITECTURE.from_checkpoint(changed, real_models.minimax_m2())
    named = {"num_attention_heads": "attention heads", "quantization_config": "weight_block_size"}.get(key, key)
    assert named.replace("rope_parameters", "rope_type") in str(error.value) or key in str(error.value)
    assert "\n" not in str(error.value)
