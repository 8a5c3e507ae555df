"""Changes of configurations: other spellings of the same, and other values, family by family."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

from moecast.archs import deepseek_v4
from transformers import AutoConfig

Values = dict[str, Any]
RATIOS = {value: key for key, value in deepseek_v4.RATIOS.items()}


def replaced(**values: Any) -> Callable[[Values], Values]:
    return lambda config: config | values


def without(*keys: str) -> Callable[[Values], Values]:
    return lambda config: {key: value for key, value in config.items() if key not in keys}


def renamed(old: str, new: str) -> Callable[[Values], Values]:
    return lambda config: {new if key == old else key: value for key, value in config.items()}


def inside(section: str, **values: Any) -> Callable[[Values], Values]:
    """Values in a section, which is made where there is none."""
    return lambda config: config | {section: (config.get(section) or {}) | values}


def _flat(config: Values) -> Values:
    """YaRN in one `rope_parameters`."""
    yarn = config.get("rope_scaling") or {}
    if "type" not in yarn or "rope_parameters" in config:
        return config
    kept = {key: value for key, value in config.items() if key != "rope_scaling"}
    flat = {"rope_type": yarn["type"], "rope_theta": config.get("rope_theta", 1e4)}
    return kept | {"rope_parameters": flat | {key: value for key, value in yarn.items() if key != "type"}}


def _sections(config: Values) -> Values:
    """The same in a section of its own, beside the other embedding's."""
    flat = _flat(config).get("rope_parameters", {})
    if "factor" not in flat or "main" in flat:
        return config
    compress = flat | {"rope_theta": 7e4, "attention_factor": 1.0}
    kept = {key: value for key, value in config.items() if key != "rope_scaling"}
    return kept | {"rope_parameters": {"main": {"rope_type": "default", "rope_theta": 3e4}, "compress": compress}}


def _saved(config: Values) -> Values:
    """As transformers writes it again."""
    values = {key: value for key, value in copy.deepcopy(config).items() if key != "model_type"}
    saved: Values = json.loads(AutoConfig.for_model(config["model_type"], **values).to_json_string())
    if "time_step_limit" in saved:
        saved["time_step_limit"] = [0.0, float("inf")]  # written in a way of its own
    return saved


def _letters_as_words(config: Values) -> Values:
    words = {"M": "linear_attention", "*": "full_attention", "E": "moe", "-": "mlp"}
    if "hybrid_override_pattern" not in config:
        return config
    kinds = [words[kind] for kind in config["hybrid_override_pattern"]]
    return without("hybrid_override_pattern")(config) | {"layers_block_type": kinds}


def _ratios_as_words(config: Values) -> Values:
    """`layer_types` counts before `compress_ratios`."""
    count = config["num_hidden_layers"]
    if "compress_ratios" not in config:
        return config
    return config | {"layer_types": [RATIOS[ratio] for ratio in reversed(config["compress_ratios"][:count])]}


COMMON = [
    _saved,
    replaced(num_experts_per_tok=1),
    replaced(attention_dropout=0.1, use_cache=False, temperature=0.7),
    replaced(rope_scaling=None),
    replaced(unheard_of=None, other={}),
]
CHANGES: dict[str, list[Callable[[Values], Values]]] = {
    "minimax_m2": [
        *COMMON,
        replaced(rope_theta=12345.0),
        inside("rope_parameters", rope_theta=777.0, rope_type="default"),
        inside("rope_scaling", rope_theta=888.0, type="default"),
        inside("rope_parameters", partial_rotary_factor=0.25),
        replaced(partial_rotary_factor=0.75),
        without("rotary_dim"),
        without("rope_theta"),
        renamed("num_local_experts", "num_experts"),
        replaced(rms_norm_eps=3e-5),
        replaced(scoring_func="sigmoid"),
        replaced(rope_scaling={"type": "default"}),
    ],
    "deepseek_v4": [
        *COMMON,
        _flat,
        _sections,
        _ratios_as_words,
        without("rope_theta"),
        without("compress_rope_theta"),
        replaced(rope_theta=12345.0),
        replaced(compress_rope_theta=54321.0),
        replaced(routed_scaling_factor=2.25),
        renamed("n_routed_experts", "num_local_experts"),
        replaced(mlp_layer_types=["hash_moe", "hash_moe", "moe"]),
        replaced(compress_rate_csa=4, compress_rate_hca=128),
        without("rope_scaling"),
    ],
    "nemotron_h": [
        *COMMON,
        _letters_as_words,
        renamed("n_groups", "mamba_n_groups"),
        renamed("conv_kernel", "mamba_d_conv"),
        replaced(n_group=4, topk_group=2),
        replaced(routed_scaling_factor=1.5),
        replaced(layer_norm_epsilon=2e-5),
        without("n_group", "topk_group"),
        replaced(rope_theta=777.0, partial_rotary_factor=0.5),
        replaced(mamba_dt_min=0.1, mamba_expand=3, mamba_chunk_size=64),
        renamed("n_routed_experts", "num_local_experts"),
    ],
}


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
_LATENT = [
    *COMMON,
    replaced(rope_theta=12345.0),
    inside("rope_scaling", beta_fast=1, beta_slow=1),
    inside("rope_scaling", mscale=0.707),
    inside("rope_scaling", mscale_all_dim=0.5),
    inside("rope_scaling", attention_factor=1.25),
    replaced(rope_scaling=YARN),
    inside("rope_scaling", factor=4.0, rope_type="yarn"),
    replaced(rope_scaling=None),
    replaced(rope_scaling=None, rope_parameters={"rope_type": "default", "rope_theta": 777.0}),
    replaced(n_group=1, topk_group=1),
    replaced(norm_topk_prob=False, routed_scaling_factor=1.5),
    replaced(first_k_dense_replace=0),
    replaced(n_shared_experts=2, moe_intermediate_size=160),
    replaced(v_head_dim=96, qk_nope_head_dim=64, kv_lora_rank=256),
    replaced(topk_method="noaux_tc", rope_interleave=True, head_dim=64, num_mtp_layers=1),
    without("scoring_func", "topk_method", "moe_layer_freq"),
    renamed("n_routed_experts", "num_local_experts"),
    replaced(rms_norm_eps=3e-5),
]
CHANGES["deepseek_v3"] = [*_LATENT, replaced(q_lora_rank=None)]
_SPARSE = [replaced(index_topk=64, index_n_heads=16, index_head_dim=256), replaced(mlp_bias=False)]
CHANGES["deepseek_v32"] = [*_LATENT, *_SPARSE, replaced(layer_types=["indexed_attention"] * 61)]
CHANGES["glm_moe_dsa"] = [
    *COMMON,
    *_SPARSE,
    inside("rope_parameters", rope_theta=777.0),
    inside("rope_parameters", **YARN),
    replaced(rope_scaling=YARN | {"rope_theta": 777.0}),
    replaced(n_group=4, topk_group=2),
    replaced(norm_topk_prob=False, routed_scaling_factor=1.5),
    replaced(v_head_dim=96, qk_nope_head_dim=64, kv_lora_rank=256, head_dim=64),
    replaced(rms_norm_eps=3e-5),
    without("indexer_types"),
    without("indexer_types", "index_topk_freq"),
    replaced(indexer_types=None, index_topk_pattern="F" + "FS" * 38 + "S"),
    replaced(indexer_types=["full"] * 78),
    replaced(moe_router_dtype="float32", num_experts=256),
    without("mlp_layer_types"),
    replaced(mlp_layer_types=None, first_k_dense_replace=1),
    replaced(layer_types=["deepseek_sparse_attention"] * 78),
]
_WINDOW, _FULL = "sliding_attention", "full_attention"
CHANGES["gpt_oss"] = [
    *COMMON,
    replaced(rope_theta=12345.0),
    replaced(rope_scaling=YARN | {"original_max_position_embeddings": 4096}),
    inside("rope_scaling", truncate=True, beta_fast=32, beta_slow=1),
    inside("rope_scaling", attention_factor=1.3465735902799727),
    replaced(rope_scaling={"rope_type": "default"}),
    without("rope_scaling"),
    without("rope_scaling", "rope_theta"),
    without("layer_types"),
    without("head_dim"),
    without("initial_context_length"),
    without("swiglu_limit"),
    replaced(layer_types=[_FULL, *[_WINDOW] * 23]),
    replaced(layer_types=[_FULL] * 24, sliding_window=None),
    replaced(sliding_window=4096),
    replaced(swiglu_limit=5.0, swiglu_alpha=1.702),
    renamed("num_local_experts", "num_experts"),
    replaced(intermediate_size=777),
]
CHANGES["qwen3_moe"] = [
    *COMMON,
    replaced(rope_theta=12345.0),
    replaced(rope_scaling=YARN),
    replaced(rope_scaling={"type": "yarn", "factor": 2.0}),
    inside("rope_parameters", rope_theta=777.0, rope_type="default"),
    without("norm_topk_prob"),
    without("head_dim"),
    without("rope_theta"),
    without("decoder_sparse_step", "mlp_only_layers", "attention_bias", "sliding_window"),
    renamed("num_experts", "num_local_experts"),
    replaced(mlp_only_layers=[0, 5], decoder_sparse_step=2),
    replaced(mlp_only_layers=None, decoder_sparse_step=3),
    replaced(sliding_window=4096),
    replaced(sliding_window=4096, use_sliding_window=True, max_window_layers=12),
    replaced(attention_bias=True),
    replaced(qkv_bias=False, use_qk_norm=True, shared_expert_intermediate_size=0),
    replaced(intermediate_size=777),
]
CHANGES["cohere2"] = [
    *COMMON,
    replaced(rope_theta=12345.0),
    inside("rope_parameters", rope_theta=777.0, rope_type="default"),
    without("rope_theta"),
    without("sliding_window_pattern"),
    replaced(sliding_window_pattern=3),
    replaced(sliding_window_pattern=1),
    replaced(layer_types=["full_attention", "sliding_attention"] * 16),
    without("head_dim"),
    without("logit_scale"),
    without("num_key_value_heads"),
    without("tie_word_embeddings"),
    replaced(tie_word_embeddings=False),
    replaced(attention_bias=True),
    replaced(sliding_window=128),
    replaced(rotary_pct=1.0, position_embedding_type="rope_gptj", use_parallel_block=True, use_qk_norm=False),
    replaced(order_of_interleaved_layers="local_attn_first", use_gated_activation=True, layer_switch=4),
    replaced(cache_implementation="hybrid", use_parallel_embedding=False),
    replaced(num_attention_heads=16, head_dim=None),
]
CHANGES["cohere2_moe"] = [
    *COMMON,
    replaced(rope_theta=12345.0),
    inside("rope_parameters", rope_theta=777.0, rope_type="default"),
    without("layer_types"),
    without("layer_types", "first_k_dense_replace"),
    replaced(layer_types=None, sliding_window_pattern=7, prefix_dense_sliding_window_pattern=2),
    replaced(layer_types=None, first_k_dense_replace=3, prefix_dense_sliding_window_pattern=3),
    replaced(prefix_dense_sliding_window_pattern=2),
    replaced(mlp_layer_types=["dense"] * 2 + ["sparse"] * 47),
    without("rms_norm_eps"),
    without("norm_topk_prob"),
    without("expert_selection_fn"),
    without("head_dim"),
    without("prefix_dense_intermediate_size"),
    replaced(num_shared_experts=3, shared_expert_combination_strategy="sum"),
    replaced(num_shared_experts=2, shared_expert_combination_strategy="average"),
    replaced(expert_selection_fn="softmax", norm_topk_prob=False),
    replaced(tie_word_embeddings=False),
    replaced(norm_type="rms_norm", transformer_block_type="parallel"),
]
_DELTA = [
    *COMMON,
    replaced(layer_types=["full_attention"] + ["linear_attention"] * 47),
    replaced(layer_types=(["linear_attention"] * 4 + ["full_attention"]) * 8),
    without("layer_types"),
    without("full_attention_interval"),
    without("layer_types", "full_attention_interval"),
    without("linear_conv_kernel_dim"),
    replaced(linear_num_value_heads=48, linear_key_head_dim=64, linear_value_head_dim=96),
    replaced(shared_expert_intermediate_size=96, moe_intermediate_size=160),
    renamed("num_experts", "num_local_experts"),
    replaced(norm_topk_prob=True, intermediate_size=777),
    replaced(rms_norm_eps=3e-5),
]
CHANGES["gemma4_text"] = [
    _saved,
    replaced(attention_dropout=0.1, use_cache=False, unheard_of=None, other={}),
    replaced(rms_norm_eps=1e-5),
    replaced(final_logit_softcapping=None),
    replaced(global_head_dim=256),
    without("global_head_dim"),
    without("num_global_key_value_heads"),
    without("layer_types"),
    without("rope_parameters"),
    without("hidden_size_per_layer_input"),
    replaced(hidden_size_per_layer_input=64),
    replaced(attention_k_eq_v=False),
    replaced(enable_moe_block=False),
    replaced(num_kv_shared_layers=12),
    replaced(num_kv_shared_layers=12, use_double_wide_mlp=True),
    replaced(top_k_experts=1),
    replaced(sliding_window=77),
]
CHANGES["qwen3_next"] = [
    *_DELTA,
    replaced(full_attention_interval=3),
    replaced(norm_topk_prob=False),
    without("norm_topk_prob"),
    replaced(partial_rotary_factor=0.5),
    without("partial_rotary_factor"),
    without("rope_theta"),
    replaced(rope_scaling=YARN),
    inside("rope_parameters", rope_theta=777.0, rope_type="default"),
    inside("rope_parameters", partial_rotary_factor=0.125, rope_type="default"),
]
CHANGES["qwen3_5_moe_text"] = [
    *_DELTA,
    inside("rope_parameters", rope_theta=777.0),
    inside("rope_parameters", partial_rotary_factor=0.5),
    inside("rope_parameters", **YARN),
    inside("rope_parameters", mrope_section=[4, 2, 2]),
    replaced(partial_rotary_factor=0.25),
    replaced(attn_output_gate=True, output_gate_type="swish", mtp_num_hidden_layers=1),
    without("rope_parameters"),
]
_SELECTING = "minimax_m3_sparse"
CHANGES["minimax_m3_vl_text"] = [
    *COMMON,
    replaced(rope_theta=12345.0),
    inside("rope_parameters", rope_theta=777.0, rope_type="default"),
    inside("rope_parameters", partial_rotary_factor=0.25, rope_type="default"),
    replaced(partial_rotary_factor=0.25),
    without("rope_theta"),
    without("hidden_act", "swiglu_alpha", "swiglu_limit", "use_gemma_norm", "use_qk_norm", "qk_norm_type"),
    without("scoring_func", "use_routing_bias", "n_shared_experts", "routed_scaling_factor"),
    without("dense_intermediate_size", "shared_intermediate_size"),
    without("moe_layer_freq"),
    without("sparse_attention_config"),
    replaced(moe_layer_freq=[0] * 5 + [1] * 55, first_k_dense_replace=5),
    replaced(mlp_layer_types=["dense", "sparse"] * 30),
    replaced(layer_types=["full_attention"] * 20 + [_SELECTING] * 40),
    replaced(dense_intermediate_size=777, shared_intermediate_size=96, intermediate_size=160),
    inside("sparse_attention_config", sparse_block_size=64, sparse_topk_blocks=8, sparse_local_block=2),
    inside("sparse_attention_config", sparse_index_dim=64),
    replaced(sparse_attention_config=None, layer_types=[_SELECTING] * 60, index_head_dim=64, index_topk_blocks=4),
    replaced(swiglu_limit=5.0, routed_scaling_factor=1.5),
    renamed("num_local_experts", "num_experts"),
]
