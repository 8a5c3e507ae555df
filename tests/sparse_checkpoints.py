"""Tiny random models with DeepSeek sparse attention, of DeepSeek V3.2 and GLM-5, built with transformers.

They are saved as those of DeepSeek V3 are, see `deepseek_v3_checkpoints`.
"""

from __future__ import annotations

from typing import Any

import torch
from checkpoints import randomize

# 16 experts so that no rule for 8 applies, more than one for each token, and an indexer that drops most of 200 tokens;
# with few index heads many scores would be exactly zero. llama.cpp needs index heads of a power of two from 64 on.
SIZES: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 384,
    "moe_intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 96,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 32,
    "v_head_dim": 48,
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.5,
    "index_n_heads": 16,
    "index_head_dim": 64,
    "index_topk": 32,
    "max_position_embeddings": 4096,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
YARN = {
    "rope_type": "yarn", "rope_theta": 1e4, "factor": 40.0, "original_max_position_embeddings": 64, "beta_fast": 32,
    "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0,
}  # fmt: skip
PLAIN = {"rope_type": "default", "rope_theta": 1e4}
FULL_AND_SHARED = ["full", "full", "shared", "shared", "full", "shared"]
DEEPSEEK: dict[str, Any] = SIZES | {
    "num_hidden_layers": 3,
    "n_group": 4,
    "topk_group": 2,
    "rms_norm_eps": 1e-6,
    "rope_parameters": YARN,
}
GLM: dict[str, Any] = SIZES | {
    "num_hidden_layers": 3,
    "n_group": 1,
    "topk_group": 1,
    "rms_norm_eps": 1e-5,
    "rope_parameters": PLAIN | {"rope_theta": 1e6},
}
ODD: dict[str, Any] = {"hidden_size": 160, "moe_intermediate_size": 96, "intermediate_size": 224}
# What llama.cpp has too, by family.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "DeepSeek V3.2": ("deepseek_v32", {}),
    "DeepSeek V3.2 without YaRN": ("deepseek_v32", {"rope_parameters": PLAIN}),
    "DeepSeek V3.2 of odd widths": ("deepseek_v32", ODD | {"n_shared_experts": 2, "first_k_dense_replace": 0}),
    "GLM-5": ("glm_moe_dsa", {}),
    "GLM-5.2": ("glm_moe_dsa", {"num_hidden_layers": 6, "indexer_types": FULL_AND_SHARED}),
    "GLM-5 of odd widths": ("glm_moe_dsa", ODD),
}


def sparse_model(family: str, seed: int = 0, **overrides: Any) -> Any:
    """A random model whose experts matter, and whose layers add little to what is there, as in trained ones."""
    from transformers import DeepseekV32Config, DeepseekV32ForCausalLM, GlmMoeDsaConfig, GlmMoeDsaForCausalLM

    torch.manual_seed(seed)
    config: Any
    if family == "deepseek_v32":
        config = DeepseekV32Config(**(DEEPSEEK | overrides))
        made: Any = DeepseekV32ForCausalLM
    else:
        config = GlmMoeDsaConfig(**(GLM | overrides))
        made = GlmMoeDsaForCausalLM
    config._attn_implementation = "eager"
    model = made(config).float().eval()
    randomize(model)
    return model
