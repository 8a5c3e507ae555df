"""Tiny random Qwen3-MoE checkpoints, built with transformers and written in the ways that real ones come."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from checkpoints import from_fp8_blocks, to_fp8_blocks, write_sharded, write_tokenizer
from nemotron_checkpoints import edit
from safetensors.torch import load_file

if TYPE_CHECKING:
    from transformers import Qwen3MoeForCausalLM

# 16 experts so that no rule for 8 applies, more than one for each token, heads wider than their share of the states.
QWEN3: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 512,
    "moe_intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "norm_topk_prob": True,
    "max_position_embeddings": 2048,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    "bos_token_id": 0,
    "eos_token_id": 1,
}
# Attention looks farther than the context that the slowed rotations were trained for.
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
# What llama.cpp has too, and what it has not.
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "tied": {"tie_word_embeddings": True},
    "yarn": {"rope_parameters": YARN},
    "one expert a token": {"num_experts_per_tok": 1},
    "odd widths": {"hidden_size": 160, "moe_intermediate_size": 96, "num_hidden_layers": 3},
}
BEYOND_LLAMA: dict[str, dict[str, Any]] = {
    "shares as they are": {"norm_topk_prob": False},
    "dense layers by list": {"num_hidden_layers": 3, "mlp_only_layers": [1]},
    "dense layers by step": {"num_hidden_layers": 4, "decoder_sparse_step": 2, "mlp_only_layers": [3]},
    "biases": {"attention_bias": True},
    "window": {"use_sliding_window": True, "sliding_window": 17},
}


def qwen3_model(seed: int = 0, **overrides: Any) -> Qwen3MoeForCausalLM:
    """A random model whose experts matter, and whose layers add little to what is there, as in trained ones."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(seed)
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**(QWEN3 | overrides))).float().eval()
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if "norm" in name:
                tensor.uniform_(0.5, 1.5)
            elif name.endswith("bias"):
                tensor.normal_(0, 0.3)
            elif "embed_tokens" in name:  # as a head too it would name the token that it was given
                tensor.normal_(0, tensor.shape[-1] ** -0.5 if model.config.tie_word_embeddings else 1.0)
            elif "o_proj" in name or "down_proj" in name:
                tensor.normal_(0, 0.25 * tensor.shape[-1] ** -0.5)
            else:
                tensor.normal_(0, tensor.shape[-1] ** -0.5)
    return model


def save_qwen3(folder: Path, model: Qwen3MoeForCausalLM, in_memory_names: bool = False) -> Path:
    """As transformers saves it: its own names of some keys, one safetensors file."""
    model.save_pretrained(folder, save_original_format=not in_memory_names)
    write_tokenizer(folder, model.config.vocab_size)
    return folder


def save_qwen3_fp8(folder: Path, model: Qwen3MoeForCausalLM) -> Qwen3MoeForCausalLM:
    """As the Hub has it: FP8 blocks with BF16 scales, several shards, the Hub's names of keys.

    Returns the model with the weights that the file now holds.
    """
    from transformers import Qwen3MoeForCausalLM

    save_qwen3(folder, model)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    stored: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        if "_proj.weight" in name:
            scale = to_fp8_blocks(tensor)[1].bfloat16()
            stored[name] = (tensor / from_fp8_blocks(torch.ones_like(tensor), scale.float())).to(torch.float8_e4m3fn)
            stored[f"{name}_scale_inv"] = scale
            tensors[name] = from_fp8_blocks(stored[name], scale.float())
        else:
            stored[name] = tensor.bfloat16()
            tensors[name] = stored[name].float()
    write_sharded(folder, stored, shards=3)
    edit(
        folder,
        remove=("num_local_experts", "rope_parameters"),
        num_experts=model.config.num_experts,
        rope_scaling=None,
        rope_theta=model.config.rope_parameters["rope_theta"],
        quantization_config={"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]},
    )
    reference = Qwen3MoeForCausalLM(model.config).float().eval()
    reference.load_state_dict(_in_memory(model, tensors))
    return reference


def _in_memory(model: Qwen3MoeForCausalLM, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Hub names to those of the model in memory, where the experts of a layer are fused."""
    state: dict[str, torch.Tensor] = {}
    for name in model.state_dict():
        stem, _, fused = name.rpartition(".experts.")
        parts = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}.get(fused)
        if parts is None:
            state[name] = tensors[name]
            continue
        experts = (f"{stem}.experts.{expert}" for expert in range(model.config.num_experts))
        state[name] = torch.stack([torch.cat([tensors[f"{e}.{part}.weight"] for part in parts]) for e in experts])
    return state
