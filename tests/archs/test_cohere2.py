"""The adapter: published tensor lists are consumed exactly once, sizes are llama.cpp's, configurations are asserted."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import real_cohere2
import real_models
from moecast.archs.config import Config
from moecast.archs.graph import MLP, Attention, Graph, MoE
from moecast.archs.harmless import refuse_unread
from moecast.archs.registry import architecture_of
from moecast.errors import BadInput
from moecast.quant.planning.allocation import typical_damage
from moecast.quant.planning.fit import Machine, fit
from moecast.quant.planning.plan import plan_tensors
from moecast.quant.planning.recipes import recipe_named

MIB, GIB = 2**20, 2**30
RELEASES = ("command-r7b", "command-a", "north-mini-code", "command-a-plus")
PICTURES = ("left out the vision tower, 28 tensors: text alone is understood",)


def graph_of(name: str, encoding: str = "BF16", text: dict[str, Any] | None = None, **changes: Any) -> Graph:
    """Of a published list, with some keys of its config.json, or of the language model's section, changed."""
    values = dict(real_models.config(name)._values) | changes
    if text:
        values["text_config"] |= text
    config = Config(values, "config.json")
    architecture = architecture_of(config)
    graph = architecture.from_checkpoint(config, real_cohere2.tensors(name, encoding))
    refuse_unread(config, architecture.name, architecture.harmless, ())
    return graph


_published = cache(graph_of)


@pytest.mark.parametrize(
    ("name", "count", "size"),
    [
        ("command-r7b", 258, 16_056_066_048), ("command-a", 514, 222_115_160_064),
        ("north-mini-code", 18_730, 60_968_607_744), ("command-a-plus", 12_578, 436_509_876_224),
    ],
)  # fmt: skip
def test_list_has_the_published_totals(name: str, count: int, size: int) -> None:
    """Without what sees pictures, of which the list has a part."""
    seen = ("model.vision_tower.", "model.multi_modal_projector.")
    tensors = [tensor for tensor in real_cohere2.tensors(name) if not tensor.name.startswith(seen)]
    assert (len(tensors), sum(tensor.length for tensor in tensors)) == (count, size)


@pytest.mark.parametrize(
    ("name", "total", "active", "state", "windows"),
    [  # in billions; bytes of keys and values for a token, and of the windows
        ("command-r7b", 8.03, 8.03, 8 * 4096, 24 * 4096 * 4096),
        ("command-a", 111.06, 111.06, 16 * 4096, 48 * 4096 * 4096),
        ("north-mini-code", 30.48, 3.3, 13 * 2048, 36 * 4096 * 2048),
        ("command-a-plus", 218.3, 25.0, 8 * 4096, 24 * 4096 * 4096),
    ],
)
def test_real_model(name: str, total: float, active: float, state: int, windows: int) -> None:
    """A head that is the embedding is read whole for every token."""
    graph = _published(name)
    assert graph.parameters() / 1e9 == pytest.approx(total, abs=0.06)
    assert graph.active_parameters() / 1e9 == pytest.approx(active, abs=0.06)
    assert graph.state_bytes_per_token() == state and graph.fixed_state_bytes() == windows
    assert graph.tied and graph.notes == (PICTURES if name == "command-a-plus" else ())
    assert graph.architecture == architecture_of(real_models.config(name)).name


def test_layers_of_the_releases() -> None:
    """The first layer of North is dense and knows positions without a window; of A+ the fourth has neither."""
    first, second = (layer.operations for layer in _published("north-mini-code").layers[:2])
    assert isinstance(first[0], Attention) and first[0].rope and first[0].window is None
    assert isinstance(first[1], MLP) and first[1].up.shape == (3072, 2048)
    assert isinstance(second[0], Attention) and second[0].window == 4096
    assert isinstance(second[1], MoE) and not second[1].router.normalize and second[1].scale == 1
    attention, experts = _published("command-a-plus").layers[3].operations
    assert isinstance(attention, Attention) and attention.rope is None and attention.window is None
    assert isinstance(experts, MoE) and experts.shared and experts.shared.up.shape == (16384, 4096)
    assert experts.scale == 0.5 and experts.router.normalize
    norms = {name: _published(name).final_norm for name in RELEASES}
    assert [name for name in RELEASES if not norms[name].centered] == ["north-mini-code"]
    assert norms["north-mini-code"].epsilon == 1e-6 and norms["command-a"].epsilon == 1e-5


@pytest.mark.parametrize("encoding", ["FP8", "NVFP4"])
@pytest.mark.parametrize("name", RELEASES[2:])
def test_quantized_releases_hold_the_same_weights(name: str, encoding: str) -> None:
    plain, quantized = _published(name), graph_of(name, encoding)
    assert [(w.name, w.shape) for w in quantized.weights()] == [(w.name, w.shape) for w in plain.weights()]
    assert quantized.notes == plain.notes


@pytest.mark.parametrize(
    ("quant", "sizes"),
    [  # MiB of the releases, as llama-quantize's types make them
        ("Q8_0", (8135.02, 112534.55, 30924.64, 221200.52)), ("Q6_K", (6280.83, 86883.98, 23886.67, 170794.52)),
        ("Q5_K_M", (5524.33, 75102.98, 20711.26, 147785.02)), ("Q4_K_M", (4812.33, 64014.98, 17722.63, 126129.02)),
        ("Q4_K_S", (4594.83, 60789.98, 16647.89, 118458.52)), ("IQ4_XS", (4411.83, 57795.98, 15793.11, 112268.52)),
        ("Q3_K_M", (4018.83, 51900.98, 14067.48, 99688.52)), ("IQ3_M", (3795.58, 48468.98, 12921.98, 91305.52)),
        ("IQ3_XXS", (3356.77, 43162.55, 11889.12, 84323.52)), ("Q2_K", (3268.83, 40155.98, 10823.61, 75962.52)),
        ("IQ2_M", (2931.52, 36601.55, 9705.07, 67823.52)), ("IQ2_XXS", (2458.77, 29074.55, 7843.27, 54498.52)),
        ("IQ1_S", (2096.77, 23482.55, 6146.96, 41954.52)), ("MXFP4_MOE", (8135.02, 112534.55, 16236.64, 116752.52)),
    ],
)  # fmt: skip
def test_planned_size_is_that_of_llama_quantize(quant: str, sizes: tuple[float, ...]) -> None:
    for name, size in zip(RELEASES, sizes, strict=True):
        plan = plan_tensors(_published(name), recipe_named(quant))
        assert plan.bytes / MIB == pytest.approx(size, abs=0.01)
        assert plan.problems == ()


def test_fits_into_a_machine() -> None:
    graph = _published("north-mini-code")
    found = fit(graph, Machine(ram=16 * GIB, vram=12 * GIB, context=32_768), typical_damage(graph))
    taken = found.plan.bytes + found.state_bytes + found.working_bytes
    assert found.state_bytes == (13 * 32_768 + 36 * 4096) * 2048
    assert 22 * GIB < taken <= 27 * GIB and 0 < found.layers_in_ram < 49


@pytest.mark.parametrize(("ram", "vram"), [(64, 24), (16, 80)])
def test_whole_layers_of_a_dense_model_stay_in_memory(ram: int, vram: int) -> None:
    """With their state; the embedding is there too, and as the head on the GPU."""
    graph, context = _published("command-a"), 32_768
    found = fit(graph, Machine(ram * GIB, vram * GIB, context), typical_damage(graph))
    sizes = dict.fromkeys(range(64), 0)
    for tensor in found.plan.tensors:
        if tensor.weight.layer is not None:
            sizes[tensor.weight.layer] += tensor.aligned_bytes
    for index in sizes:
        sizes[index] += 4096 * (context if index % 4 == 3 else 4096)
    head = next(tensor.aligned_bytes for tensor in found.plan.tensors if tensor.weight.name == "token_embd.weight")
    in_ram = head + sum(size for index, size in sizes.items() if index < found.layers_in_ram)
    on_gpu = head + found.working_bytes + sum(size for index, size in sizes.items() if index >= found.layers_in_ram)
    assert 0 < found.layers_in_ram < 64
    assert in_ram <= 15 / 16 * ram * GIB and on_gpu <= (vram - 0.5) * GIB
    assert in_ram + on_gpu > 0.94 * (15 / 16 * ram + vram - 0.5) * GIB


def test_a_dense_model_that_fits_the_gpu_stays_there() -> None:
    graph = _published("command-r7b")
    found = fit(graph, Machine(16 * GIB, 24 * GIB, 32_768), typical_damage(graph))
    assert found.layers_in_ram == 0 and {t.type.name for t in found.plan.tensors} == {"BF16", "F32"}
    with pytest.raises(BadInput, match="too small"):
        fit(_published("command-a"), Machine(8 * GIB, 24 * GIB, 32_768), typical_damage(_published("command-a")))


@pytest.mark.parametrize(
    ("name", "key", "value", "named"),
    [
        ("command-r7b", "hidden_act", "gelu", "hidden_act"), ("command-r7b", "use_qk_norm", True, "use_qk_norm"),
        ("command-r7b", "head_dim", 64, "head_dim"), ("command-r7b", "rotary_pct", 0.5, "rotary_pct"),
        ("command-r7b", "sliding_window", None, "sliding_window is missing"),
        ("command-r7b", "position_embedding_type", "rope", "position_embedding_type"),
        ("command-r7b", "order_of_interleaved_layers", "global_attn_first", "order_of_interleaved_layers"),
        ("command-r7b", "rope_scaling", {"rope_type": "yarn", "factor": 4.0}, "rope_type"),
        ("command-r7b", "rms_norm_eps", 1e-6, "rms_norm_eps"), ("command-r7b", "use_parallel_block", False, "parallel"),
        ("command-r7b", "use_embedding_sharing", False, "use_embedding_sharing"),
        ("command-r7b", "sliding_window_pattern", 0, "sliding_window_pattern"),
        ("command-r7b", "num_key_value_heads", 5, "attention heads"), ("command-r7b", "first_k", 1, "first_k"),
        ("north-mini-code", "layer_types", ["full_attention"], "layer_types is .*each of 49 layers"),
        ("north-mini-code", "layer_types", ["chunked_attention"] * 49, "layer_types"),
        ("north-mini-code", "mlp_layer_types", ["dense", "hash"] * 20, "mlp_layer_types"),
        ("north-mini-code", "expert_selection_fn", "topk", "expert_selection_fn"),
        ("north-mini-code", "shared_expert_combination_strategy", "gated", "shared_expert_combination_strategy"),
        ("north-mini-code", "num_experts_per_tok", 129, "num_experts_per_tok"),
        ("north-mini-code", "head_dim", 127, "head_dim"), ("north-mini-code", "transformer_block_type", "x", "transf"),
    ],
)  # fmt: skip
def test_unknown_config_values_are_named(name: str, key: str, value: object, named: str) -> None:
    with pytest.raises(BadInput, match=rf"^config\.json.*{named}") as error:
        graph_of(name, **{key: value})
    assert "\n" not in str(error.value)


def test_unknown_keys_beside_a_tower_are_named_by_their_section() -> None:
    with pytest.raises(
        BadInput, match=r"^config\.json: text_config\.router_bias is True.* --ignore-config text_config"
    ):
        graph_of("command-a-plus", text={"router_bias": True})
    with pytest.raises(BadInput, match=r"^config\.json: text_config: use_qk_norm is True"):
        graph_of("command-a-plus", text={"use_qk_norm": True})
    with pytest.raises(BadInput, match=r"model_type is 'cohere2_vision of llama', expected one of .*cohere2_moe"):
        graph_of("command-a-plus", text={"model_type": "llama"})


@pytest.mark.parametrize("name", RELEASES)
@pytest.mark.parametrize("missing", [2, 200, -30])
def test_missing_tensor_is_named(name: str, missing: int) -> None:
    tensors = list(real_cohere2.tensors(name))
    tensor = tensors.pop(missing).name
    with pytest.raises(BadInput, match=tensor):
        architecture_of(real_models.config(name)).from_checkpoint(real_models.config(name), tensors)


def test_drafting_layers_would_be_unknown() -> None:
    """None is published; a layer more than the configuration says is refused by its first tensor."""
    with pytest.raises(BadInput, match=r"^model\.layers\.31\.\S+ in hub and 7 more: unknown tensor"):
        graph_of("command-r7b", num_hidden_layers=31)
