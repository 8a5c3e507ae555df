"""Tiny random DeepSeek V3 and Kimi K2 checkpoints, built with transformers and written in the ways that real ones come."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from checkpoints import write_tokenizer

if TYPE_CHECKING:
    from transformers import DeepseekV3ForCausalLM

# Texts are longer than the context that slowed rotations were trained for; one projection has half a block of rows.
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 40.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
DEEPSEEK: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 512,
    "moe_intermediate_size": 256,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 128,
    "kv_lora_rank": 160,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 32,
    "v_head_dim": 48,
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "n_shared_experts": 1,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 2.5,
    "max_position_embeddings": 2560,
    "rope_parameters": YARN,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
# What llama.cpp computes too.
VARIANTS: dict[str, dict[str, Any]] = {
    "V3": {},
    "Kimi": {
        "n_group": 1,
        "topk_group": 1,
        "rms_norm_eps": 1e-5,
        "routed_scaling_factor": 2.827,
        "rope_parameters": YARN | {"factor": 64.0, "rope_theta": 5e4},
    },
    "no YaRN": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    "mscales apart": {"rope_parameters": YARN | {"mscale": 0.707, "mscale_all_dim": 1.3}},
    "no mscale": {"rope_parameters": {key: YARN[key] for key in YARN if "mscale" not in key}},
    "attention factor": {
        "rope_parameters": {key: YARN[key] for key in YARN if "mscale" not in key} | {"attention_factor": 1.0}
    },
    "plain queries": {"q_lora_rank": None},
    "shares as they are": {"norm_topk_prob": False, "routed_scaling_factor": 1.0},
    "two shared experts": {"n_shared_experts": 2},
    "all layers with experts": {"first_k_dense_replace": 0, "topk_group": 4},
    "odd widths": {"hidden_size": 160, "moe_intermediate_size": 96, "intermediate_size": 224, "kv_lora_rank": 96},
}
# What it has to be told when it is started: limits of YaRN.
LIMITS: dict[str, dict[str, Any]] = {"Kimi K2's limits": {"rope_parameters": YARN | {"beta_fast": 1, "beta_slow": 1}}}


def deepseek_model(seed: int = 0, **overrides: Any) -> DeepseekV3ForCausalLM:
    """A random model whose experts matter, and whose layers add little to what is there, as in trained ones."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    torch.manual_seed(seed)
    model = DeepseekV3ForCausalLM(DeepseekV3Config(**(DEEPSEEK | overrides))).float().eval()
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if "norm" in name:
                tensor.uniform_(0.5, 1.5)
            elif name.endswith("e_score_correction_bias"):
                tensor.normal_(0, 0.1)
            elif "embed_tokens" in name:
                tensor.normal_(0, 1)
            elif "o_proj" in name or "down_proj" in name:
                tensor.normal_(0, 0.25 * tensor.shape[-1] ** -0.5)
            elif "inv_freq" not in name:
                tensor.normal_(0, tensor.shape[-1] ** -0.5)
    return model


def save_deepseek(folder: Path, model: DeepseekV3ForCausalLM, in_memory_names: bool = False) -> Path:
    """As transformers saves it: without the function of scores, experts apart unless `in_memory_names`."""
    model.save_pretrained(folder, save_original_format=not in_memory_names)
    write_tokenizer(folder, model.config.vocab_size)
    return folder
