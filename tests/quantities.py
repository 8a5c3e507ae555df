"""The quantities of a configuration: what an adapter reads, and what transformers' class does."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import real_models
from moecast.archs import (
    cohere2,
    deepseek_v3,
    deepseek_v4,
    deepseek_v32,
    gemma4,
    gpt_oss,
    minimax_m2,
    minimax_m3,
    nemotron_h,
    qwen3_5,
    qwen3_moe,
    qwen3_next,
)
from moecast.archs.architecture import Architecture
from moecast.archs.config import Config
from moecast.archs.harmless import refuse_unread
from moecast.archs.shared import text_section
from spellings import Values
from transformers import AutoConfig
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3RotaryEmbedding, yarn_apply_mscale

EXAMPLES = Path(__file__).parents[1] / "examples"
EXAMPLE = {
    "minimax_m2": EXAMPLES / "minimax-m2-tiny" / "config.json",
    "minimax_m3_vl_text": real_models.DATA / "minimax-m3-nvfp4-config.json",
    "deepseek_v4": EXAMPLES / "deepseek-v4-tiny" / "config.json",
    "nemotron_h": EXAMPLES / "nemotron-3-tiny" / "config.json",
    "deepseek_v3": real_models.DATA / "deepseek-v3-config.json",
    "deepseek_v32": real_models.DATA / "deepseek-v3.2-config.json",
    "glm_moe_dsa": real_models.DATA / "glm-5.2-config.json",
    "qwen3_moe": real_models.DATA / "qwen3-30b-a3b-config.json",
    "gpt_oss": real_models.DATA / "gpt-oss-20b-config.json",
    "cohere2": real_models.DATA / "command-r7b-config.json",
    "cohere2_moe": real_models.DATA / "north-mini-code-config.json",
    "gemma4_text": real_models.DATA / "gemma-4-26b-a4b-config.json",
    "qwen3_next": real_models.DATA / "qwen3-next-80b-a3b-config.json",
    "qwen3_5_moe_text": real_models.DATA / "qwen3.5-35b-a3b-config.json",
}


def example(family: str) -> Values:
    values: Values = json.loads(EXAMPLE[family].read_text())
    values = values.get("text_config", values)
    values.setdefault("model_type", family)
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
        case "minimax_m3_vl_text" | "minimax_m3_vl" | "minimax_m3":
            found, architecture = minimax_m3._read_config(config), minimax_m3.ARCHITECTURE
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
        case "gemma4" | "gemma4_text":
            found, architecture = gemma4._read_config(config)[0], gemma4.ARCHITECTURE
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
        case "gemma4_text":
            return shared | {
                "full": d.full_head_size,
                "keys": (d.key_value_heads, d.shared, d.values_from_keys),
                "windows": (d.windowed, d.window),
                "theta": (d.rope_base, d.window_rope_base),
                "widths": (d.dense_sizes, d.expert_size, d.per_layer),
                "softcap": d.softcap,
            }
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
        case "minimax_m3_vl_text":
            return shared | {
                "rope": (d.rotary_size, d.rope_base),
                "widths": (d.expert_size, d.shared_size, d.dense_size),
                "layers": ([*d.routed], [*d.selecting]),
                "index": (d.index_heads, d.index_size, d.block_size, d.blocks, d.local),
                "scale": (d.routed_scale, d.clamp),
            }
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
    if c.model_type == "gemma4_text":  # its heads are as large as the layer says
        return of_gemma(c)
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
        case "minimax_m3_vl_text":
            rope = c.rope_parameters
            routed = [kind == "sparse" for kind in c.mlp_layer_types]
            return shared | {
                "epsilon": c.rms_norm_eps,
                "experts": c.num_local_experts,
                "rope": (int(c.head_dim * rope["partial_rotary_factor"]), rope["rope_theta"]),
                "widths": (
                    c.intermediate_size,
                    c.shared_intermediate_size,
                    0 if all(routed) else c.dense_intermediate_size,
                ),
                "layers": (routed, [kind == "minimax_m3_sparse" for kind in c.layer_types]),
                "index": (
                    *(c.index_n_heads, c.index_head_dim, c.index_block_size),
                    *(c.index_topk_blocks, c.index_local_blocks),
                ),
                "scale": (c.routed_scaling_factor, c.swiglu_limit),
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


def of_gemma(c: Any) -> Values:
    layers, full = range(c.num_hidden_layers), c.layer_types.index("full_attention")
    shared = {layer for layer in layers if c.kv_sharing_modes[layer] == "reuse"}
    windowed = tuple(kind == "sliding_attention" for kind in c.layer_types)
    wide = shared if c.use_double_wide_mlp else set()
    return {
        "heads": c.num_attention_heads,
        "head_size": c.per_layer_config[windowed.index(True)].head_dim,
        "epsilon": c.rms_norm_eps,
        "experts": c.num_experts if c.enable_moe_block else 0,
        "top_k": c.top_k_experts if c.enable_moe_block else 0,
        "full": c.per_layer_config[full].head_dim,
        "keys": (
            tuple(c.per_layer_config[layer].num_key_value_heads for layer in layers),
            len(shared),
            tuple(c.attention_k_eq_v and not window for window in windowed),
        ),
        "windows": (windowed, c.sliding_window),
        "theta": tuple(c.rope_parameters[kind]["rope_theta"] for kind in ("full_attention", "sliding_attention")),
        "widths": (
            tuple(c.intermediate_size * (2 if layer in wide else 1) for layer in layers),
            c.moe_intermediate_size if c.enable_moe_block else 0,
            c.hidden_size_per_layer_input,
        ),
        "softcap": c.final_logit_softcapping or 0.0,
    }


def of_deepseek_v3(c: Any) -> Values:
    """The quantities of a configuration of transformers, as for `of_cohere`."""
    scaled = c.rope_parameters["rope_type"] == "yarn"
    frequencies = DeepseekV3RotaryEmbedding(c)
    scale = yarn_apply_mscale(c.rope_parameters, (c.qk_nope_head_dim + c.qk_rope_head_dim) ** -0.5)
    rope = c.rope_parameters
    limits = (rope.get("beta_fast") or 32, rope.get("beta_slow") or 1)
    return {
        "epsilon": c.rms_norm_eps,
        "experts": c.n_routed_experts,
        "ranks": (c.q_lora_rank or 0, c.kv_lora_rank, c.v_head_dim),
        "dense": (c.first_k_dense_replace, c.intermediate_size, c.n_shared_experts, c.moe_intermediate_size),
        "groups": (c.n_group, c.topk_group, c.norm_topk_prob, c.routed_scaling_factor),
        "rope": (
            rope["rope_theta"],
            round(scale, 9),
            (rope["factor"], *limits, frequencies.attention_scaling) if scaled else None,
        ),
    }


def of_cohere(c: Any) -> Values:
    """The quantities of a configuration of transformers that not all families have."""
    mixture = c.model_type == "cohere2_moe"
    windowed = tuple(kind == "sliding_attention" for kind in c.layer_types)
    dense = tuple(kind == "dense" for kind in c.mlp_layer_types) if mixture else (True,) * c.num_hidden_layers
    forced = mixture and c.prefix_dense_sliding_window_pattern == 1
    size = c.intermediate_size
    dense_size = (c.prefix_dense_intermediate_size or size) if mixture else size
    normalized = mixture and (c.norm_topk_prob or c.expert_selection_fn == "softmax")
    return {
        "epsilon": c.rms_norm_eps if mixture and c.rms_norm_eps is not None else c.layer_norm_eps,
        "experts": c.num_experts if mixture else 0,
        "windowed": windowed,
        "rotated": tuple(window or (forced and alone) for window, alone in zip(windowed, dense, strict=True)),
        "dense": dense,
        "window": c.sliding_window,
        "theta": c.rope_parameters["rope_theta"],
        "logit scale": c.logit_scale,
        "switches": (
            c.attention_bias,
            c.tie_word_embeddings is not False,
            normalized,
            mixture and c.shared_expert_combination_strategy == "average",
        ),
        "widths": (
            size if mixture else 0,
            size * c.num_shared_experts if mixture else 0,
            dense_size if any(dense) else 0,
        ),
    }
