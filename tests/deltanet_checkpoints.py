"""Tiny random checkpoints of Qwen3-Next and Qwen3.5, from transformers and written as real ones come."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from checkpoints import write_tokenizer
from torch import Tensor

# 16 experts so that no rule for 8 applies, several for each token; two heads to a key head; partly rotated heads.
_COMMON: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
    "linear_conv_kernel_dim": 4,
    "max_position_embeddings": 2048,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 0.25},
    "bos_token_id": 0,
    "eos_token_id": 1,
}
_EXPERTS = {
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 256,
    "shared_expert_intermediate_size": 256,
}
_MROPE = {"mrope_interleaved": True, "mrope_section": [3, 3, 2]}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_next": _COMMON | _EXPERTS,
    "qwen3_5_moe": _COMMON | _EXPERTS | {"rope_parameters": _COMMON["rope_parameters"] | _MROPE},
    "qwen3_5": _COMMON | {"intermediate_size": 512, "rope_parameters": _COMMON["rope_parameters"] | _MROPE},
}
_CLASSES = {
    "qwen3_next": ("Qwen3NextForCausalLM", "Qwen3NextConfig"),
    "qwen3_5_moe": ("Qwen3_5MoeForCausalLM", "Qwen3_5MoeTextConfig"),
    "qwen3_5": ("Qwen3_5ForCausalLM", "Qwen3_5TextConfig"),
}
# Attention looks farther than the context that the slowed rotations were trained for.
_YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
# What llama.cpp has too, and what it has not.
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "tied": {"tie_word_embeddings": True},
    "yarn": {"rope_parameters": _YARN | {"partial_rotary_factor": 0.25}},
    "three heads a key head": {"linear_num_value_heads": 6},
    "one head a key head": {"linear_num_value_heads": 2, "linear_conv_kernel_dim": 3},
    "odd widths": {"hidden_size": 160, "linear_key_head_dim": 24, "linear_value_head_dim": 24, "head_dim": 32},
    "other order": {"layer_types": ["full_attention", "linear_attention", "linear_attention", "full_attention"]},
}
BEYOND_LLAMA: dict[str, dict[str, Any]] = {
    "wider values": {"linear_value_head_dim": 80},
    "another epsilon": {"rms_norm_eps": 1e-3},
    "full attention alone": {"layer_types": ["full_attention"] * 4},
}


def model_of(family: str, seed: int = 0, **overrides: Any) -> Any:
    """A random model whose states fade at all speeds, and whose layers add little to what is there, as trained ones."""
    import transformers

    torch.manual_seed(seed)
    kind, config = (getattr(transformers, name) for name in _CLASSES[family])
    settings = FAMILIES[family] | overrides
    if family != "qwen3_next":
        settings["rope_parameters"] = settings["rope_parameters"] | _MROPE
    model = kind(config(**settings)).float().eval()
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            randomize(name, tensor, model.config.tie_word_embeddings)
    return model


def randomize(name: str, tensor: Tensor, tied: bool = False) -> None:
    """Of standard deviation 1/sqrt(fan in), what writes into the residual less; what is zero in fresh models, not."""
    if name.endswith("linear_attn.norm.weight"):
        tensor.uniform_(0.5, 1.5)
    elif "norm" in name:
        tensor.uniform_(-0.5, 0.5)
    elif name.endswith("A_log"):
        tensor.copy_(torch.empty_like(tensor).uniform_(0.05, 4).log())
    elif name.endswith("dt_bias"):
        tensor.normal_()
    elif "conv1d" in name:
        tensor.normal_(0, 0.5)
    elif "embed_tokens" in name:  # as a head too it would name the token that it was given
        tensor.normal_(0, tensor.shape[-1] ** -0.5 if tied else 1.0)
    elif any(writer in name for writer in ("o_proj", "out_proj", "down_proj")):
        tensor.normal_(0, 0.25 * tensor.shape[-1] ** -0.5)
    else:
        tensor.normal_(0, tensor.shape[-1] ** -0.5)


def save(folder: Path, model: Any, in_memory_names: bool = False) -> Path:
    """As transformers saves a model that was made in memory: no prefix, flat configuration, one file."""
    model.save_pretrained(folder, save_original_format=not in_memory_names)
    write_tokenizer(folder, model.config.vocab_size)
    return folder
