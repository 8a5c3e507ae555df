"""The adapter: published tensor lists are consumed exactly once, configurations asserted, files refused."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import pytest
import real_deepseek_v3
import real_models
from moecast.archs.config import Config
from moecast.archs.deepseek_v3 import ARCHITECTURE
from moecast.archs.expressions import TensorInfo
from moecast.archs.graph import MLP, Graph, LatentAttention, MoE, Router
from moecast.archs.harmless import refuse_unread
from moecast.errors import BadInput
from moecast.quant.planning.allocation import typical_damage
from moecast.quant.planning.fit import Machine, fit
from moecast.quant.planning.plan import Plan, plan_tensors
from moecast.quant.planning.recipes import recipe_named

GIB = 2**30
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}


def graph_of(name: str, encoding: str | None = None, **changes: Any) -> Graph:
    """Of a published list, with some keys of its language model's configuration changed."""
    values = dict(real_models.config(name)._values)
    text = {**values.get("text_config", values), **changes}
    config = Config({**values, "text_config": text} if "text_config" in values else text, "config.json")
    graph = ARCHITECTURE.from_checkpoint(config, real_deepseek_v3.tensors(name, encoding))
    refuse_unread(config, ARCHITECTURE.name, ARCHITECTURE.harmless, ())
    return graph


_published = cache(graph_of)


@pytest.mark.parametrize(
    ("name", "count", "size"),
    [
        ("deepseek-v3", 91_991, 688_574_839_360),
        ("kimi-k2", 139_583, 1_029_173_249_888),
        ("kimi-k2.5", 208_550, 595_148_192_736),
    ],
)
def test_list_has_the_published_totals(name: str, count: int, size: int) -> None:
    tensors = real_deepseek_v3.tensors(name)
    assert (len(tensors), sum(tensor.length for tensor in tensors)) == (count, size)


@pytest.mark.parametrize(
    ("name", "total", "active", "state"),
    [  # in billions, with V3's drafting block of 11.6, whose embedding and head are the model's; a token's bytes
        ("deepseek-v3", 671.0 + 11.6, 36.6, 70_272), ("kimi-k2", 1026.4, 31.7, 70_272),
        ("kimi-k2.5", 1026.4, 31.7, 70_272), ("kimi-k2.7-nvfp4", 1026.4, 31.7, 70_272),
    ],
)  # fmt: skip
def test_real_model(name: str, total: float, active: float, state: int) -> None:
    graph = _published(name)
    assert graph.parameters() / 1e9 == pytest.approx(total, abs=0.1)
    assert graph.active_parameters() / 1e9 == pytest.approx(active, abs=0.1)
    assert graph.state_bytes_per_token() == state and graph.fixed_state_bytes() == 0
    attention, experts = graph.layers[-1].operations
    assert isinstance(attention, LatentAttention) and isinstance(experts, MoE) and isinstance(experts.router, Router)
    assert (attention.latent_size, attention.key_size, attention.value_size) == (512, 128, 128)
    factor = attention.rope.yarn.factor if attention.rope.yarn else 1.0
    assert attention.scale == pytest.approx(192**-0.5 * (0.1 * math.log(factor) + 1) ** 2)
    assert experts.router.top_k == 8 and experts.router.normalize
    dense = [index for index, layer in enumerate(graph.layers) if isinstance(layer.operations[1], MLP)]
    assert dense == ([0, 1, 2] if name == "deepseek-v3" else [0])
    assert len(graph.predictions) == (name == "deepseek-v3")


def test_what_is_left_out_is_said() -> None:
    (draft,), (tower,) = _published("deepseek-v3").notes, _published("kimi-k2.5").notes
    assert "embedding and head" in draft and "vision tower, 335 tensors" in tower
    (limits,) = _published("kimi-k2").notes
    assert "--yarn-beta-fast 1 --yarn-beta-slow 1" in limits


@pytest.mark.parametrize("encoding", ["NVFP4", "BF16"])
def test_other_releases_hold_the_same_weights(encoding: str) -> None:
    plain, other = _published("deepseek-v3"), graph_of("deepseek-v3", encoding, quantization_config=None)
    assert [(w.name, w.shape) for w in other.weights()] == [(w.name, w.shape) for w in plain.weights()]


def _types(plan: Plan, layer: int) -> dict[str, str]:
    stem = f"blk.{layer}."
    return {t.weight.name.removeprefix(stem): t.type.name for t in plan.tensors if t.weight.name.startswith(stem)}


def test_stock_mix_is_llama_quantizes() -> None:
    """Whose rules know none of latent attention but its output: all else has the base type, or what rows allow."""
    plan = plan_tensors(_published("deepseek-v3"), recipe_named("Q4_K_M"))
    found = _types(plan, 40)
    assert {found[f"attn_{kind}.weight"] for kind in ("q_a", "q_b", "kv_a_mqa", "v_b", "output")} == {"Q4_K"}
    assert found["attn_k_b.weight"] == "Q5_0"  # rows of 128
    assert {found[f"{name}.weight"] for name in ("attn_norm", "attn_q_a_norm", "attn_kv_a_norm", "ffn_gate_inp")} == {
        "F32"
    }
    assert found["exp_probs_b.bias"] == "F32" and found["ffn_gate_exps.weight"] == "Q4_K"
    assert _types(plan, 0)["ffn_down.weight"] == _types(plan, 60)["ffn_down_exps.weight"] == "Q6_K"


def test_experts_of_whole_numbers_need_no_rounding() -> None:
    plan = plan_tensors(_published("kimi-k2.5"), recipe_named("NATIVE"))
    types = _types(plan, 1)
    assert {types[f"ffn_{kind}_exps.weight"] for kind in ("gate", "up", "down")} == {"Q4_0"}
    assert types["attn_k_b.weight"] == types["ffn_up_shexp.weight"] == "BF16"


@pytest.mark.slow
def test_fits_into_a_machine() -> None:
    """What all tokens leave is small: 32,768 of them 2.1 GiB."""
    graph = _published("deepseek-v3")
    found = fit(graph, Machine(ram=512 * GIB, vram=24 * GIB, context=32_768), typical_damage(graph))
    taken = found.plan.bytes + found.state_bytes + found.working_bytes
    assert found.state_bytes == 32_768 * 70_272 and 480 * GIB < taken <= 536 * GIB and 0 < found.layers_in_ram <= 61


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("hidden_act", "gelu", "hidden_act"), ("scoring_func", "softmax", "scoring_func"),
        ("topk_method", "greedy", "topk_method"), ("attention_bias", True, "attention_bias"),
        ("moe_layer_freq", 2, "moe_layer_freq"), ("rope_interleave", False, "rope_interleave"),
        ("num_key_value_heads", 8, "num_key_value_heads"), ("n_group", 7, "n_group"), ("n_group", None, "n_group"),
        ("n_group", 256, "groups of at least two"), ("topk_group", 9, "topk_group"),
        ("num_experts_per_tok", 200, "num_experts_per_tok"),
        ("first_k_dense_replace", 61, "first_k_dense_replace"), ("qk_rope_head_dim", 63, "qk_rope_head_dim"),
        ("routed_scaling_factor", None, "routed_scaling_factor"), ("index_topk", 2048, "index_topk"),
        ("rope_scaling", {"rope_type": "linear", "factor": 2.0}, "rope type is 'linear'"),
        ("rope_scaling", {"rope_type": "yarn"}, "factor is missing"),
        ("rope_scaling", {"rope_type": "yarn", "factor": 4.0}, "original_max_position_embeddings is missing"),
        ("rope_scaling", {"rope_type": "yarn", "factor": 1.0}, "factor is 1, expected more"),
        ("rope_scaling", YARN | {"truncate": False}, "truncate"),
        ("rope_scaling", YARN | {"beta_fast": -1}, "beta_fast"),
    ],
)  # fmt: skip
def test_unknown_config_values_are_named(key: str, value: object, named: str) -> None:
    with pytest.raises(BadInput, match=rf"^config\.json.*{named}") as error:
        graph_of("deepseek-v3", **{key: value})
    assert "\n" not in str(error.value)


def test_file_that_does_not_say_how_experts_are_scored_is_refused() -> None:
    """llama.cpp takes the other way without a word."""
    embedding = TensorInfo("token_embd.weight", "F32", (8, 4), "model.gguf", 0, 128)
    with pytest.raises(BadInput, match=r"^model\.gguf: deepseek2\.expert_gating_func is missing"):
        ARCHITECTURE.from_gguf(Config({}, "model.gguf"), [embedding])


@pytest.mark.parametrize("missing", [0, 9_001, 80_001])
def test_missing_tensor_is_named(missing: int) -> None:
    tensors = list(real_deepseek_v3.tensors("deepseek-v3"))
    name = tensors.pop(missing).name
    with pytest.raises(BadInput, match=name):
        ARCHITECTURE.from_checkpoint(real_models.config("deepseek-v3"), tensors)
