"""The adapter: published tensor lists are consumed exactly once, parameters are those published, keys are asserted."""

from __future__ import annotations

from math import prod
from typing import Any

import pytest
import real_gemma4
import real_models
from moecast.archs.config import Config
from moecast.archs.gemma4 import ARCHITECTURE
from moecast.archs.graph import Attention, Graph, MoE, Router
from moecast.archs.harmless import refuse_unread
from moecast.archs.weights import Role
from moecast.errors import BadInput
from moecast.quant.planning.allocation import typical_damage
from moecast.quant.planning.fit import Machine, fit
from moecast.quant.planning.plan import plan_file, plan_tensors
from moecast.quant.planning.recipes import recipe_named
from moecast.sources.hub.shards import pass_over

GIB = 2**30
MIXTURE, DENSE, SMALL, LARGER = "gemma-4-26b-a4b", "gemma-4-31b-nvfp4", "gemma-4-e2b", "gemma-4-e4b"


def graph_of(name: str, encoded: str = "nothing", **changes: Any) -> Graph:
    """Of a published list, with some keys of the language model's configuration changed."""
    stored = dict(real_models.config(name)._values)
    if encoded == "nothing":
        stored.pop("quantization_config", None)
    config = Config(stored | {"text_config": stored["text_config"] | changes}, "config.json")
    graph = ARCHITECTURE.from_checkpoint(config, real_gemma4.tensors(name, encoded))
    refuse_unread(config, ARCHITECTURE.name, ARCHITECTURE.harmless, ())
    return graph


@pytest.mark.parametrize(
    ("name", "count", "elements"),
    [
        (MIXTURE, 1_013, 25_805_936_206), (DENSE, 1_188, 31_273_088_876),  # as published, with the tower
        (SMALL, 600, 4_647_449_891), (LARGER, 719, 7_518_069_034),
    ],
)  # fmt: skip
def test_list_has_the_published_totals(name: str, count: int, elements: int) -> None:
    tensors = real_gemma4.tensors(name)
    assert (len(tensors), sum(prod(tensor.shape) for tensor in tensors)) == (count, elements)


@pytest.mark.parametrize(
    ("name", "total", "active", "token", "any_text"),
    [  # in billions; bytes of keys and values where all is seen, of so many layers, and in windows
        (MIXTURE, 25.2, 3.8, 5 * 2 * 2 * 512 * 2, 25 * 1024 * 2 * 8 * 256 * 2),
        (DENSE, 30.7, 30.7, 10 * 2 * 4 * 512 * 2, 50 * 1024 * 2 * 16 * 256 * 2),
        (SMALL, 4.6, 2.3, 3 * 2 * 1 * 512 * 2, 12 * 512 * 2 * 1 * 256 * 2),
        (LARGER, 7.5, 4.6, 4 * 2 * 2 * 512 * 2, 20 * 512 * 2 * 2 * 256 * 2),
    ],
)
def test_real_model(name: str, total: float, active: float, token: int, any_text: int) -> None:
    """As the model cards say, which call effective what is not in the table of tokens. Layers that use keys and values
    of others have none to keep, of the 35 and 42 of the small ones all but 15 and 24."""
    graph = graph_of(name)
    assert graph.parameters() / 1e9 == pytest.approx(total, abs=0.06)
    assert graph.active_parameters() / 1e9 == pytest.approx(active, abs=0.1)
    assert (graph.state_bytes_per_token(), graph.fixed_state_bytes()) == (token, any_text)
    assert graph.embedding_scale == graph.hidden_size**0.5 and graph.logit_softcap == 30.0


def test_parts_of_a_mixture() -> None:
    graph = graph_of(MIXTURE)
    windowed, full = graph.layers[0].operations[0], graph.layers[5].operations[0]
    assert isinstance(windowed, Attention) and isinstance(full, Attention)
    assert (windowed.head_size, windowed.key_value_heads, windowed.window) == (256, 8, 1024)
    assert (full.head_size, full.key_value_heads, full.window, full.value) == (512, 2, None, None)
    assert full.rope and full.rope.divisors and full.rope.divisors.shape == (256,)
    experts = graph.layers[0].operations[2]
    assert isinstance(experts, MoE) and isinstance(experts.router, Router) and experts.router.top_k == 8
    assert experts.router.input_scale == 2816**-0.5


@pytest.mark.parametrize(("name", "sources"), [(SMALL, {13: 33, 14: 34}), (LARGER, {22: 40, 23: 41})])
def test_whose_keys_are_used(name: str, sources: dict[int, int]) -> None:
    """Of the last layer of each kind that has its own, up to the last that has not."""
    assert graph_of(name).shared_states() == sources


@pytest.mark.parametrize(("name", "encoded"), [("gemma-4-26b-a4b-nvfp4", ".experts"), (DENSE, ".mlp")])
def test_quantized_releases_hold_the_same_weights(name: str, encoded: str) -> None:
    plain, quantized = graph_of(name.removesuffix("-nvfp4") if name != DENSE else name), graph_of(name, encoded)
    assert [(w.name, w.shape) for w in quantized.weights()] == [(w.name, w.shape) for w in plain.weights()]
    assert quantized.notes == ("left out what sees and hears, 356 tensors: text alone is understood",)
    planned = plan_tensors(quantized, recipe_named("native")).tensors
    types = {t.weight.name: t.type.name for t in planned}
    assert types["blk.0.ffn_down_exps.weight" if "26b" in name else "blk.0.ffn_down.weight"] == "NVFP4"
    scales = [weight for weight in types if weight.endswith("ffn_down_exps.scale")]
    assert len(scales) == len({*scales}) == (30 if "26b" in name else 0)
    assert len(planned) == len(types)


@pytest.mark.parametrize(
    ("quant", "table"), [("Q4_K_M", "Q6_K"), ("IQ2_M", "Q5_K"), ("MXFP4_MOE", "Q8_0"), ("BF16", "BF16")]
)
def test_types_of_per_layer_embeddings(quant: str, table: str) -> None:
    """The table is to llama-quantize what the embedding is, which is the head; what it leaves alone is BF16."""
    plan = plan_tensors(graph_of(SMALL), recipe_named(quant))
    types = {tensor.weight.role: tensor.type.name for tensor in plan.tensors}
    assert types[Role.PER_LAYER_TABLE] == types[Role.HEAD] == table
    assert types[Role.PER_LAYER_PROJECTION] == "BF16"
    assert types[Role.PER_LAYER_GATE] == types[Role.ATTENTION_Q]


def test_padding_of_narrow_experts() -> None:
    """704 and 2112 are no multiples of 256; the file is smaller for it."""
    plan = plan_file(graph_of(MIXTURE), recipe_named("IQ2_M"))
    assert any("704 to 768" in note for note in plan.notes)


def test_fits_into_a_machine() -> None:
    """Windows of 25 layers take 200 MiB whatever the context, five layers 20 KiB for each token."""
    graph = graph_of(MIXTURE)
    found = fit(graph, Machine(ram=16 * GIB, vram=8 * GIB, context=32_768), typical_damage(graph))
    assert found.state_bytes == 209_715_200 + 32_768 * 20_480
    assert found.plan.bytes + found.state_bytes + found.working_bytes <= 24 * GIB


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("hidden_activation", "silu", "hidden_activation"), ("attention_bias", True, "attention_bias"),
        ("use_bidirectional_attention", "all", "use_bidirectional_attention"),
        ("layer_types", ["sliding_attention"] * 30, "layer_types ends with sliding_attention"),
        ("layer_types", ["full_attention"] * 29, "layer_types"),
        ("num_kv_shared_layers", 29, "num_kv_shared_layers is 29, expected a layer of full_attention"),
        ("rope_parameters", {"full_attention": {"rope_type": "yarn"}}, "rope_type"),
        ("per_layer_config", {"0": {"head_dim": 512}}, "per_layer_config"),
        ("per_layer_config", {"5": {"head_dim": 256}}, "per_layer_config"),
        ("top_k_experts", 200, "top_k_experts|num_experts_per_tok"), ("head_dim", 255, "head_dim"),
        ("num_attention_heads", 15, "attention heads"), ("tie_word_embeddings", False, "tie_word_embeddings"),
        ("query_pre_attn_scalar", 256, "query_pre_attn_scalar"),
    ],
)  # fmt: skip
def test_unknown_config_values_are_named(key: str, value: object, named: str) -> None:
    with pytest.raises(BadInput, match=rf"^config\.json.*({named})") as error:
        graph_of(MIXTURE, **{key: value})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("missing", [0, 300, 600])
def test_missing_tensor_is_named(missing: int) -> None:
    tensors = list(real_gemma4.tensors(MIXTURE))
    name = tensors.pop(missing).name
    with pytest.raises(BadInput, match=name):
        ARCHITECTURE.from_checkpoint(real_models.config(MIXTURE), tensors)


def test_shards_come_in_the_order_in_which_they_are_read() -> None:
    """Per-layer embeddings are looked up first of all; what a file needs and a checkpoint has not breaks no step up."""
    steps = pass_over(graph_of(SMALL))
    assert len(steps) == 1 + 35 + 1
    assert [name.removeprefix("model.language_model.") for name in steps[0]] == [
        "embed_tokens.weight", "embed_tokens_per_layer.weight", "per_layer_model_projection.weight",
        "per_layer_projection_norm.weight",
    ]  # fmt: skip
