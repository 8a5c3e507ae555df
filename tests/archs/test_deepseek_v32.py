"""The adapter of DeepSeek V3.2 and GLM-5: published lists are consumed exactly once, configurations are asserted."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import real_deepseek_v3
import real_models
from moecast.archs.config import Config
from moecast.archs.deepseek_v32 import DEEPSEEK, GLM, _read_glm_config
from moecast.archs.graph import MLP, Graph, LatentAttention
from moecast.archs.harmless import refuse_unread
from moecast.archs.registry import architecture_of
from moecast.errors import BadInput
from moecast.quant.planning.plan import plan_tensors
from moecast.quant.planning.recipes import recipe_named


def graph_of(name: str, encoding: str | None = None, **changes: Any) -> Graph:
    """Of a published list, with some keys of its config.json changed."""
    config = Config(dict(real_models.config(name)._values) | changes, "config.json")
    architecture = architecture_of(config)
    graph = architecture.from_checkpoint(config, real_deepseek_v3.tensors(name, encoding))
    refuse_unread(config, architecture.name, architecture.harmless, ())
    return graph


_published = cache(graph_of)


def attentions(graph: Graph) -> list[LatentAttention]:
    return [operation for operation in graph.operations() if isinstance(operation, LatentAttention)]


@pytest.mark.parametrize(
    ("name", "encoding", "count", "size"),
    [
        ("deepseek-v3.2", None, 92_425, 689_469_018_240), ("glm-5", None, 59_870, 1_507_728_316_928),
        ("glm-5", "FP8", 119_028, 756_162_687_872), ("glm-5.2", None, 59_585, 1_506_659_919_872),
        ("glm-5.2", "FP8", 118_629, 755_617_140_416),
    ],
)  # fmt: skip
def test_list_has_the_totals_of_the_release(name: str, encoding: str | None, count: int, size: int) -> None:
    tensors = real_deepseek_v3.tensors(name, encoding)
    assert (len(tensors), sum(tensor.length for tensor in tensors)) == (count, size)


@pytest.mark.parametrize(
    ("name", "total", "active", "state"),
    [  # in billions, with drafting blocks of 11.6 and 9.9, but not their copies of embedding and head; a token's bytes
        ("deepseek-v3.2", 672.0 + 11.6, 37.4, 61 * 2 * (576 + 128)),
        ("glm-5", 744.0 + 9.9, 40.0, 78 * 2 * (576 + 128)),
        ("glm-5.2", 743.4 + 9.9, 39.5, 2 * (78 * 576 + 21 * 128)),
        ("glm-5.2-nvfp4", 743.4 + 9.9, 39.5, 2 * (78 * 576 + 21 * 128)),
    ],
)  # fmt: skip
def test_real_model(name: str, total: float, active: float, state: int) -> None:
    graph = _published(name)
    assert graph.parameters() / 1e9 == pytest.approx(total, abs=0.15)
    assert graph.active_parameters() / 1e9 == pytest.approx(active, abs=1.0)
    assert graph.state_bytes_per_token() == state and graph.fixed_state_bytes() == 0
    assert len(graph.predictions) == 1
    first, last = attentions(graph)[0], attentions(graph)[-1]
    assert first.indexer and first.indexer.top_k == 2048 and first.indexer.key_norm.epsilon == 1e-6
    assert (first.indexer.heads, first.indexer.head_size) == (64 if name == "deepseek-v3.2" else 32, 128)
    assert first.indexer.rope.interleaved == (name != "deepseek-v3.2") and not first.indexer.rope.last
    assert last.selection_of == (74 if "5.2" in name else None)
    assert [isinstance(layer.operations[1], MLP) for layer in graph.layers].index(False) == 3


@pytest.mark.parametrize(("name", "encoding"), [("deepseek-v3.2", "BF16"), ("glm-5", "FP8"), ("glm-5.2", "FP8")])
def test_other_releases_hold_the_same_weights(name: str, encoding: str) -> None:
    plain, other = _published(name), graph_of(name, encoding)
    assert [(w.name, w.shape) for w in other.weights()] == [(w.name, w.shape) for w in plain.weights()]


def test_layers_that_pick_are_those_of_the_schedule() -> None:
    """As a list, as a pattern, and as every fourth layer behind the first ones."""
    values = dict(real_models.config("glm-5.2")._values)
    listed = _read_glm_config(Config(values, "config.json"), drafts=False).picking
    assert [layer for layer, picks in enumerate(listed) if picks] == [0, 1, 2, *range(6, 78, 4)]
    without = values | {"indexer_types": None}
    assert _read_glm_config(Config(without, "config.json"), drafts=False).picking == listed
    pattern = "".join("F" if picks else "S" for picks in listed)
    for spelled in (pattern, ["full" if picks else "shared" for picks in listed]):
        config = Config(without | {"index_topk_pattern": spelled, "index_topk_freq": 2}, "config.json")
        assert _read_glm_config(config, drafts=False).picking == listed


def test_indexers_are_spared() -> None:
    """What decides where attention looks keeps 8 bits at least, and its heads' weights are not rounded."""
    plan = plan_tensors(_published("glm-5.2"), recipe_named("Q4_K_M"))
    types = {tensor.weight.name: tensor.type.name for tensor in plan.tensors}
    assert {types[f"blk.6.indexer.{kind}.weight"] for kind in ("attn_k", "attn_q_b")} == {"Q8_0"}
    assert {types[f"blk.6.indexer.{kind}"] for kind in ("proj.weight", "k_norm.weight", "k_norm.bias")} == {"F32"}
    assert not any(name.startswith("blk.7.indexer.") for name in types)
    assert types["blk.7.ffn_gate_exps.weight"] == "Q4_K"


@pytest.mark.parametrize("missing", ["wq_b.weight", "wk.weight", "k_norm.bias", "weights_proj.weight"])
def test_missing_parts_of_an_indexer_are_named(missing: str) -> None:
    name = f"model.layers.5.self_attn.indexer.{missing}"
    tensors = [tensor for tensor in real_deepseek_v3.tensors("deepseek-v3.2") if tensor.name != name]
    with pytest.raises(BadInput, match=name):
        DEEPSEEK.from_checkpoint(real_models.config("deepseek-v3.2"), tensors)


@pytest.mark.parametrize(
    ("name", "key", "value", "named"),
    [
        ("glm-5.2", "indexer_rope_interleave", False, "indexer_rope_interleave"),
        ("deepseek-v3.2", "indexer_rope_interleave", True, "indexer_rope_interleave"),
        ("glm-5.2", "indexer_types", ["shared"] * 78, "layer 0 is 'shared'"),
        ("glm-5.2", "indexer_types", ["full"] * 77, "indexer_types"),
        ("glm-5.2", "indexer_types", ["full"] * 77 + ["half"], "indexer_types"),
        ("glm-5.2", "layer_types", ["full_attention"] * 78, "layer_types"),
        ("glm-5.2", "mlp_layer_types", ["sparse"] * 78, "mlp_layer_types"),
        ("glm-5.2", "moe_router_dtype", "bfloat16", "moe_router_dtype"),
        ("glm-5.2-nvfp4", "num_experts", 128, "num_experts"),
        ("deepseek-v3.2", "scoring_func", "softmax", "scoring_func"),
        ("deepseek-v3.2", "index_topk", 0, "index_topk"),
        ("deepseek-v3.2", "index_head_dim", 32, "qk_rope_head_dim"),
        ("deepseek-v3.2", "mlp_bias", True, "mlp_bias"),
        ("deepseek-v3.2", "index_topk_freq", 4, "index_topk_freq"),
    ],
)  # fmt: skip
def test_variants_nobody_implemented_stop(name: str, key: str, value: Any, named: str) -> None:
    with pytest.raises(BadInput, match=rf"^config\.json.*{named}") as error:
        graph_of(name, **{key: value})
    assert "\n" not in str(error.value)


def test_pattern_of_other_letters_is_named() -> None:
    values = dict(real_models.config("glm-5.2")._values) | {"indexer_types": None}
    with pytest.raises(BadInput, match="index_topk_pattern is 'FFX'"):
        GLM.from_checkpoint(Config(values | {"index_topk_pattern": "FFX"}, "config.json"), ())


@pytest.mark.parametrize(("name", "missing"), [("glm5_next", "decay of each key channel"), ("deepseek_v41", "engram")])
def test_what_is_not_carried_is_refused_by_what_is_missing(name: str, missing: str) -> None:
    for values in ({"model_type": name}, {"model_type": name, "text_config": {"model_type": f"{name}_text"}}):
        with pytest.raises(BadInput, match=f"model_type is '{name}', which moecast cannot convert: .*{missing}"):
            architecture_of(Config(values, "config.json"))
