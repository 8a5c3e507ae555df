"""Configurations in other words: what transformers' classes read is read here, or it is refused."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import real_models
from moecast.archs import (
    cohere2,
    deepseek_v3,
    deepseek_v4,
    deepseek_v32,
    gpt_oss,
    minimax_m2,
    nemotron_h,
    qwen3_5,
    qwen3_moe,
    qwen3_next,
)
from moecast.archs.architecture import Architecture
from moecast.archs.config import Config
from moecast.archs.harmless import check_repeated, refuse_unread, refuse_unread_metadata
from moecast.archs.shared import text_section
from moecast.errors import BadInput
from moecast.sources.checkpoint import read_tensors
from spellings import CHANGES, Values, of_cohere, of_deepseek_v3, without
from transformers import AutoConfig

EXAMPLES = Path(__file__).parents[2] / "examples"
EXAMPLE = {
    "minimax_m2": EXAMPLES / "minimax-m2-tiny" / "config.json",
    "deepseek_v4": EXAMPLES / "deepseek-v4-tiny" / "config.json",
    "nemotron_h": EXAMPLES / "nemotron-3-tiny" / "config.json",
    "deepseek_v3": real_models.DATA / "deepseek-v3-config.json",
    "deepseek_v32": real_models.DATA / "deepseek-v3.2-config.json",
    "glm_moe_dsa": real_models.DATA / "glm-5.2-config.json",
    "qwen3_moe": real_models.DATA / "qwen3-30b-a3b-config.json",
    "gpt_oss": real_models.DATA / "gpt-oss-20b-config.json",
    "cohere2": real_models.DATA / "command-r7b-config.json",
    "cohere2_moe": real_models.DATA / "north-mini-code-config.json",
    "qwen3_next": real_models.DATA / "qwen3-next-80b-a3b-config.json",
    "qwen3_5_moe_text": real_models.DATA / "qwen3.5-35b-a3b-config.json",
}


def example(family: str) -> Values:
    values: Values = json.loads(EXAMPLE[family].read_text())
    values = values.get("text_config", values)
    values.pop("quantization_config", None)
    if "time_step_limit" in values:
        values["time_step_limit"] = [0.0, float("inf")]
    for other_name in ("norm_eps", "experts_per_token"):
        values.pop(other_name, None)
    return values


def read(values: Values) -> tuple[Any, Architecture]:
    """The quantities of a configuration of which every key has been understood."""
    config = Config(values, "config.json")
    match values["model_type"]:
        case "minimax_m2":
            found, architecture = minimax_m2._read_config(config), minimax_m2.ARCHITECTURE
        case "deepseek_v4":
            found, architecture = deepseek_v4._read_config(config), deepseek_v4.ARCHITECTURE
        case "deepseek_v3" | "kimi_k25" | "kimi_k2":
            text = text_section(config)
            found, architecture = deepseek_v3._read_config(text, drafts=False), deepseek_v3.ARCHITECTURE
            text.section("quantization_config")  # which says how the tensors are stored
        case "deepseek_v32":
            found, architecture = deepseek_v32._read_config(config, drafts=False), deepseek_v32.DEEPSEEK
        case "glm_moe_dsa":
            found, architecture = deepseek_v32._read_glm_config(config, drafts=False), deepseek_v32.GLM
        case "qwen3_moe":
            found, architecture = qwen3_moe._read_config(config), qwen3_moe.ARCHITECTURE
        case "gpt_oss":
            found, architecture = gpt_oss._read_config(config), gpt_oss.ARCHITECTURE
        case "cohere2" | "cohere2_moe" | "cohere2_vision":
            found, architecture = cohere2._read_config(config), cohere2.MIXTURE
        case "qwen3_next":
            found, architecture = qwen3_next._read_config(config, drafts=False), qwen3_next.ARCHITECTURE
        case "qwen3_5_moe" | "qwen3_5_moe_text":
            found, architecture = qwen3_5._read_config(config, drafts=False, dense=False), qwen3_5.MIXTURE
        case "qwen3_5":
            found, architecture = qwen3_5._read_config(config, drafts=False, dense=True), qwen3_5.DENSE
        case _:
            found, architecture = nemotron_h._read_config(config, drafts=False), nemotron_h.MIXTURE
    config.flag("tie_word_embeddings", default=False)
    refuse_unread(config, architecture.name, architecture.harmless, ())
    return found, architecture


def ours(values: Values) -> Values:
    d, _ = read(values)
    shared = {"heads": d.heads, "head_size": d.head_size, "epsilon": d.epsilon, "experts": d.experts, "top_k": d.top_k}
    match values["model_type"]:
        case "qwen3_moe":
            yarn = (d.yarn_factor, d.yarn_context) if d.scaling == "yarn" else None
            of_layers = {"window": d.window, "dense": d.dense, "biased": d.biased, "normalized": d.normalized}
            return shared | of_layers | {"theta": d.rope_base, "width": d.expert_size, "yarn": yarn}
        case "gpt_oss":
            yarn = (d.yarn_factor, d.yarn_context, d.rounded) if d.scaling == "yarn" else None
            of_layers = {"windows": tuple(d.window if windowed else 0 for windowed in d.windowed), "clamp": d.clamp}
            return shared | of_layers | {"theta": d.rope_base, "width": d.expert_size, "yarn": yarn}
        case "cohere2" | "cohere2_moe":
            of_layers = {"windowed": d.windowed, "rotated": d.rotated, "dense": d.dense}
            return (
                shared
                | of_layers
                | {
                    "window": d.window,
                    "theta": d.rope_base,
                    "logit scale": d.logit_scale,
                    "switches": (d.biased, d.tied, d.normalized, d.averaged),
                    "widths": (d.expert_size, d.shared_size, d.dense_size),
                }
            )
        case "qwen3_next" | "qwen3_5_moe_text":
            return shared | {
                "recurrent": d.recurrent,
                "deltas": (d.delta_key_heads, d.delta_heads, d.key_size, d.value_size, d.kernel),
                "rope": (d.rotary_size, d.rope_base, d.yarn_factor, d.yarn_context),
                "widths": (d.expert_size, d.shared_size),
                "normalized": d.normalized,
            }
        case "minimax_m2":
            return shared | {"rotary": d.rotary_size, "theta": d.rope_base, "width": d.expert_size}
        case "deepseek_v3" | "deepseek_v32" | "glm_moe_dsa":
            scale = d.head_size**-0.5 * (d.yarn.in_scores**2 if d.yarn else 1.0)
            yarn = d.yarn and (d.yarn.yarn.factor, d.yarn.yarn.fast, d.yarn.yarn.slow, d.yarn.yarn.magnitude)
            return shared | {
                "head_size": d.rotary_size,
                "ranks": (d.query_rank, d.latent_size, d.value_size),
                "dense": (d.dense_layers, d.dense_size, d.shared_count, d.expert_size),
                "groups": (d.groups, d.groups_used, d.normalized, d.router_scale),
                "rope": (d.rope_base, round(scale, 9), yarn),
                **({} if values["model_type"] == "deepseek_v3" else of_indexers(d)),
            }
        case "deepseek_v4":
            yarn = (d.yarn_factor, d.yarn_context) if d.scaling == "yarn" else None
            thetas = (d.rope_base, d.compressed_rope_base)
            of_layers = {"ratios": d.ratios, "hashed": d.hash_layers}
            return (
                shared | of_layers | {"rotary": d.rotary_size, "theta": thetas, "yarn": yarn, "scale": d.router_scale}
            )
        case _:
            return shared | {
                "kinds": d.kinds,
                "groups": (d.router_groups, d.router_groups_used, d.mamba_groups),
                "scale": d.router_scale,
                "kernel": d.kernel,
            }


def of_indexers(d: Any) -> Values:
    return {"indexers": (d.index_heads, d.index_head_size, d.index_top_k, d.picking)}


def theirs(values: Values) -> Values:
    """The same of transformers' class."""
    values = copy.deepcopy(values)
    c = AutoConfig.for_model(values.pop("model_type"), **values)
    head_size = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    shared = {"heads": c.num_attention_heads, "head_size": head_size, "top_k": getattr(c, "num_experts_per_tok", 0)}
    match c.model_type:
        case "cohere2" | "cohere2_moe":
            return shared | of_cohere(c)
        case "qwen3_moe":
            rope, layers = c.rope_parameters, range(c.num_hidden_layers)
            yarn = rope["rope_type"] == "yarn"
            sparse = {layer for layer in layers if (layer + 1) % c.decoder_sparse_step == 0} - {*c.mlp_only_layers}
            return shared | {
                "epsilon": c.rms_norm_eps,
                "experts": c.num_experts,
                "window": c.sliding_window or 0,
                "dense": tuple(layer for layer in layers if layer not in sparse),
                "biased": c.attention_bias,
                "normalized": c.norm_topk_prob,
                "theta": rope["rope_theta"],
                "width": c.moe_intermediate_size,
                "yarn": (rope["factor"], rope["original_max_position_embeddings"]) if yarn else None,
            }
        case "gpt_oss":
            rope = c.rope_parameters
            yarn = (rope["factor"], rope["original_max_position_embeddings"]) if rope["rope_type"] == "yarn" else None
            return shared | {
                "epsilon": c.rms_norm_eps,
                "experts": c.num_local_experts,
                "windows": tuple(c.sliding_window if kind == "sliding_attention" else 0 for kind in c.layer_types),
                "clamp": c.swiglu_limit,
                "theta": rope["rope_theta"],
                "width": c.intermediate_size,
                "yarn": (*yarn, rope.get("truncate", True)) if yarn else None,
            }
        case "qwen3_next" | "qwen3_5_moe_text":
            rope = c.rope_parameters
            yarn = (rope["factor"], rope["original_max_position_embeddings"]) if "factor" in rope else (1.0, 0)
            keys = (c.linear_num_key_heads, c.linear_num_value_heads, c.linear_key_head_dim)
            return shared | {
                "epsilon": c.rms_norm_eps,
                "experts": c.num_experts,
                "recurrent": tuple(kind == "linear_attention" for kind in c.layer_types),
                "deltas": (*keys, c.linear_value_head_dim, c.linear_conv_kernel_dim),
                "rope": (int(c.head_dim * rope["partial_rotary_factor"]), rope["rope_theta"], *yarn),
                "widths": (c.moe_intermediate_size, c.shared_expert_intermediate_size),
                "normalized": getattr(c, "norm_topk_prob", True),
            }
        case "minimax_m2":
            rope = c.rope_parameters
            assert rope["rope_type"] == "default"
            rotary = int(c.head_dim * rope.get("partial_rotary_factor", 1.0))
            found = {"epsilon": c.rms_norm_eps, "experts": c.num_local_experts, "width": c.intermediate_size}
            return shared | found | {"rotary": rotary, "theta": rope["rope_theta"]}
        case "deepseek_v3":
            return shared | of_deepseek_v3(c)
        case "deepseek_v32" | "glm_moe_dsa":
            kinds = getattr(c, "indexer_types", ["full"] * c.num_hidden_layers)
            picking = tuple(kind == "full" for kind in kinds)
            indexers = {"indexers": (c.index_n_heads, c.index_head_dim, c.index_topk, picking)}
            return shared | of_deepseek_v3(c) | indexers
        case "deepseek_v4":
            main, compress = c.rope_parameters["main"], c.rope_parameters["compress"]
            yarn = compress["rope_type"] == "yarn"
            return shared | {
                "epsilon": c.rms_norm_eps,
                "experts": c.n_routed_experts,
                "ratios": tuple(deepseek_v4.RATIOS[kind] for kind in c.layer_types),
                "hashed": c.mlp_layer_types.count("hash_moe"),
                "rotary": c.qk_rope_head_dim,
                "theta": (main["rope_theta"], compress["rope_theta"]),
                "yarn": (compress["factor"], compress["original_max_position_embeddings"]) if yarn else None,
                "scale": c.routed_scaling_factor,
            }
        case _:
            letters = {"linear_attention": "M", "full_attention": "*", "moe": "E", "mlp": "-"}
            return shared | {
                "epsilon": c.layer_norm_epsilon,
                "experts": c.n_routed_experts,
                "kinds": "".join(letters[kind] for kind in c.layers_block_type),
                "groups": (c.n_group, c.topk_group, c.n_groups),
                "scale": c.routed_scaling_factor,
                "kernel": c.conv_kernel,
            }


def perturbed(family: str, count: int) -> Iterator[Values]:
    """The example with each change by itself, then with some of them one after the other."""
    for change in CHANGES[family]:
        yield change(example(family))
    choice = random.Random(family)
    for _ in range(count):
        values = example(family)
        for change in choice.sample(CHANGES[family], choice.randint(2, 5)):
            values = change(values)
        yield values


@pytest.mark.parametrize("family", EXAMPLE)
def test_numbers_are_those_of_transformers(family: str) -> None:
    """A refusal is as good, as long as few are refused."""
    agreed = refused = 0
    for values in perturbed(family, 150):
        try:
            found = ours(values)
        except BadInput as error:
            assert "\n" not in str(error) and len(str(error)) < 300
            refused += 1
            continue
        assert found == theirs(values), values
        agreed += 1
    assert agreed > 2 * refused


@pytest.mark.parametrize("form", ["type", "rope_type"])
def test_yarn_of_deepseek_v4_is_found_wherever_it_stands(form: str) -> None:
    """By type of layer transformers overlooks it; what is meant is plain."""
    plain = example("deepseek_v4")
    yarn = {form if key == "type" else key: value for key, value in plain.pop("rope_scaling").items()}
    compressed = yarn | {"rope_theta": plain["compress_rope_theta"]}
    main = {"rope_type": "default", "rope_theta": plain["rope_theta"]}
    layers = {"compressed_sparse_attention": compressed, "heavily_compressed_attention": compressed}
    bare = without("rope_theta", "compress_rope_theta")(plain)
    for values in (
        plain | {"rope_parameters": yarn},
        plain | {"rope_scaling": yarn},
        bare | {"rope_parameters": {"main": main, "compress": compressed}},
        bare | {"rope_parameters": {"sliding_attention": main, **layers}},
        plain | {"rope_parameters": yarn | main | {form: "yarn"}, "compress_rope_parameters": compressed}
        if form == "rope_type"
        else plain | {"rope_parameters": yarn},
    ):
        assert read(values)[0] == read(example("deepseek_v4"))[0]
    layers["heavily_compressed_attention"] = compressed | {"factor": 2}
    with pytest.raises(BadInput, match="yarn_factor"):
        read(bare | {"rope_parameters": {"sliding_attention": main, **layers}})
    with pytest.raises(BadInput, match="mscale"):
        read(plain | {"rope_parameters": yarn | {"mscale": 2.0}})


@pytest.mark.parametrize("name", sorted(path.name for path in real_models.DATA.glob("*-config.json")))
def test_published_configurations_are_understood(name: str) -> None:
    read(json.loads((real_models.DATA / name).read_text()))


@pytest.mark.parametrize("family", EXAMPLE)
@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("attention_multiplier", 0.5, "attention_multiplier"),
        ("block_configs", [{"block_type": "moe", "num_experts_per_tok": 2}], "block_configs"),
        ("final_logit_softcapping", 30.0, "final_logit_softcapping"),
        ("attention_chunk_size", 64, "attention_chunk_size"),
        ("quantization_config", {"quant_method": "x", "transform_config": {"u": 1}}, "quantization_config"),
    ],
)
def test_unknown_keys_are_refused_until_the_user_says_so(family: str, key: str, value: object, named: str) -> None:
    values = example(family) | {key: value}
    with pytest.raises(BadInput, match=rf"^config\.json: {named}.* --ignore-config {named}") as error:
        read(values)
    assert len(str(error.value)) < 300
    config = Config(values, "config.json")
    known = [inner for inner in config.unread() if inner != key]
    refuse_unread(config, family, known, [key])


@pytest.mark.parametrize(("family", "first", "second"), [
    ("minimax_m2", "num_local_experts", "num_experts"), ("deepseek_v4", "n_routed_experts", "num_local_experts"),
    ("nemotron_h", "layer_norm_epsilon", "norm_eps"), ("nemotron_h", "n_groups", "mamba_n_groups"),
    ("qwen3_moe", "num_experts", "num_local_experts"), ("gpt_oss", "num_experts_per_tok", "experts_per_token"),
])  # fmt: skip
def test_two_names_of_one_quantity_have_to_agree(family: str, first: str, second: str) -> None:
    values = example(family)
    read(values | {second: values[first]})
    with pytest.raises(BadInput, match=f"{first} is .* but {second}"):
        read(values | {second: 2 * values[first]})


@pytest.mark.parametrize(("family", "key"), [
    ("minimax_m2", "rms_norm_eps"), ("minimax_m2", "rope_theta"), ("deepseek_v4", "hc_eps"),
    ("deepseek_v4", "routed_scaling_factor"), ("deepseek_v4", "swiglu_limit"), ("deepseek_v4", "compress_rope_theta"),
    ("nemotron_h", "layer_norm_epsilon"), ("nemotron_h", "routed_scaling_factor"),
    ("qwen3_moe", "rms_norm_eps"), ("qwen3_moe", "rope_theta"), ("gpt_oss", "swiglu_limit"), ("gpt_oss", "rope_theta"),
    ("cohere2", "logit_scale"), ("cohere2", "layer_norm_eps"), ("cohere2_moe", "rms_norm_eps"),
    ("qwen3_next", "rms_norm_eps"), ("qwen3_next", "rope_theta"), ("qwen3_next", "partial_rotary_factor"),
])  # fmt: skip
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan"), -1.0, 0.0, 1e39, 1e-46, 10**40, -5])
def test_numbers_have_a_range(family: str, key: str, value: float) -> None:
    with pytest.raises(BadInput, match=rf"config\.json: {key} is .*expected a positive number"):
        read(example(family) | {key: value})


def test_layers_of_own_sizes_are_refused_by_their_key() -> None:
    """Nemotron Puzzle: what does not fit is a tensor's shape, and why is a key that nobody read."""
    folder = EXAMPLE["nemotron_h"].parent
    values = json.loads((folder / "config.json").read_text())
    values |= {"n_routed_experts": 2 * values["n_routed_experts"]}
    read_graph, tensors = nemotron_h.MIXTURE.from_checkpoint, read_tensors(folder)
    with pytest.raises(BadInput) as bare:
        read_graph(Config(values, "config.json"), tensors)
    values["block_configs"] = [{"num_experts": 4}]
    with pytest.raises(BadInput, match=r"^config\.json: block_configs gives layers sizes of their own") as named:
        read_graph(Config(values, "config.json"), tensors)
    assert str(named.value).endswith(str(bare.value))


@pytest.mark.parametrize("value", [2**32, 10**30, 0, -1])
def test_whole_numbers_have_a_range(value: int) -> None:
    for family, key in (("minimax_m2", "hidden_size"), ("deepseek_v4", "sliding_window"), ("nemotron_h", "head_dim")):
        with pytest.raises(BadInput, match=rf"config\.json: {key} is .*expected a positive whole number"):
            read(example(family) | {key: value})


def test_keys_of_gguf_files_are_understood_or_refused() -> None:
    """Of the architecture's own alone: llama.cpp reads no other ones."""
    stored = {"tiny.experts": 4, "tiny.tilt": 0.5, "general.tags": ["x"], "publisher.note": "y"}
    metadata = Config(stored, "model.gguf")
    check_repeated(metadata, {"tiny.experts": 4, "tiny.width": 8})
    with pytest.raises(BadInput, match=r"^model\.gguf: tiny\.tilt is 0\.5.* --ignore-config tiny\.tilt$"):
        refuse_unread_metadata(metadata, "tiny", (), ())
    refuse_unread_metadata(metadata, "tiny", ["tilt"], ())
    refuse_unread_metadata(metadata, "tiny", (), ["tiny.tilt"])
    for expected in (5, [4, 5], 4.5):
        with pytest.raises(BadInput, match=r"^model\.gguf: tiny\.experts is 4, expected "):
            check_repeated(metadata, {"tiny.experts": expected})
