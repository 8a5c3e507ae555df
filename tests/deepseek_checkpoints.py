"""Tiny random DeepSeek V4 checkpoints, built with transformers and written in the ways that real ones come."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from checkpoints import write_tokenizer
from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

# Sliding, overlapping and heavily compressed layers, two of them hash-routed, and an indexer that has to choose; YaRN
# from so short a context that it matters. llama.cpp needs a ratio of 4, four streams, and index heads of 64.
DEEPSEEK: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 256,
    "moe_intermediate_size": 256,
    "num_hidden_layers": 5,
    "compress_ratios": [0, 4, 128, 4, 128],
    "num_hash_layers": 2,
    "num_attention_heads": 8,
    "head_dim": 64,
    "qk_rope_head_dim": 16,
    "q_lora_rank": 256,
    "o_groups": 2,
    "o_lora_rank": 128,
    "sliding_window": 64,
    "index_n_heads": 16,  # with few, many scores are exactly zero and the choice between them is anyone's
    "index_head_dim": 64,
    "index_topk": 16,
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "routed_scaling_factor": 1.5,
    "swiglu_limit": 1.0,
    "max_position_embeddings": 2048,
    "rope_theta": 10000.0,
    "compress_rope_theta": 160000.0,
    "rope_scaling": {"type": "yarn", "factor": 4, "original_max_position_embeddings": 512, "beta_fast": 32, "beta_slow": 1},
    "bos_token_id": 0,
    "eos_token_id": 1,
}


def deepseek_model(seed: int = 0, **overrides: Any) -> DeepseekV4ForCausalLM:
    """A random model in which every part matters: sinks, positions, biases and stream mixes are far from zero."""
    torch.manual_seed(seed)
    config = DeepseekV4Config(**(DEEPSEEK | overrides))
    config._attn_implementation = "eager"
    model = DeepseekV4ForCausalLM(config).float().eval()
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith("tid2eid"):
                ranking = torch.rand(len(tensor), config.n_routed_experts).argsort(dim=1)
                tensor.copy_(ranking[:, : tensor.shape[1]])
            elif name.endswith("e_score_correction_bias"):
                tensor.normal_(0, 0.1)
            elif "norm" in name:
                tensor.uniform_(0.5, 1.5)
            elif name.endswith(("sinks", "position_bias", "base", "scale")):
                tensor.normal_(0, 0.5)
            elif "inv_freq" not in name:
                tensor.normal_(0, tensor.shape[-1] ** -0.5)
    return model


def save_deepseek(folder: Path, model: DeepseekV4ForCausalLM, in_memory_names: bool = False) -> Path:
    """As transformers saves it."""
    model.save_pretrained(folder, save_original_format=not in_memory_names)
    write_tokenizer(folder, model.config.vocab_size)
    return folder
