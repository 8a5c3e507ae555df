"""Tiny random gpt-oss checkpoints, built with transformers and written in the ways that real ones come."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from checkpoints import write_sharded, write_tokenizer
from nemotron_checkpoints import edit
from safetensors.torch import load_file, save_file
from torch import Tensor

if TYPE_CHECKING:
    from transformers import GptOssForCausalLM

# Windows are shorter than texts, and YaRN's limits fall between pairs: 1.4 and 9.6 of 16.
YARN: dict[str, Any] = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "original_max_position_embeddings": 512,
    "truncate": True,
}
GPT_OSS: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_local_experts": 16,
    "num_experts_per_tok": 4,
    "sliding_window": 17,
    "max_position_embeddings": 2048,
    "rope_parameters": YARN,
    "pad_token_id": None,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
_KINDS = ["sliding_attention", "full_attention"]
# What llama.cpp has too, and what it has not.
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no YaRN": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    "tied": {"tie_word_embeddings": True},
    "one expert a token": {"num_experts_per_tok": 1},
    "other windows": {"layer_types": [_KINDS[0], _KINDS[0], _KINDS[1], _KINDS[0]]},
    "odd widths": {"hidden_size": 160, "intermediate_size": 96, "num_hidden_layers": 3},
}
BEYOND_LLAMA: dict[str, dict[str, Any]] = {
    "another clamp": {"swiglu_limit": 1.0},
    "no windows": {"layer_types": [_KINDS[1]] * 4},
}
UNROUNDED: dict[str, Any] = {"rope_parameters": YARN | {"truncate": False}}


def gpt_oss_model(seed: int = 0, **overrides: Any) -> GptOssForCausalLM:
    """A random model in which sinks, biases and clamps matter, and whose layers add little to what is there."""
    from transformers import GptOssConfig, GptOssForCausalLM

    torch.manual_seed(seed)
    model = GptOssForCausalLM(GptOssConfig(**(GPT_OSS | overrides), attn_implementation="eager")).float().eval()
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if "norm" in name:
                tensor.uniform_(0.5, 1.5)
            elif name.endswith("sinks"):
                tensor.normal_(0, 1.5)
            elif name.endswith("gate_up_proj_bias"):  # beyond the clamps of both signs
                tensor.normal_(0, 4)
            elif name.endswith("bias"):
                tensor.normal_(0, 0.3)
            elif "embed_tokens" in name:  # as a head too it would name the token that it was given
                tensor.normal_(0, tensor.shape[-1] ** -0.5 if model.config.tie_word_embeddings else 1.0)
            elif "o_proj" in name:
                tensor.normal_(0, 0.25 * tensor.shape[-1] ** -0.5)
            elif "experts" in name:  # [experts, in, out]
                tensor.normal_(0, (0.05 if "down_proj" in name else 1.0) * tensor.shape[-2] ** -0.5)
            else:
                tensor.normal_(0, tensor.shape[-1] ** -0.5)
    return model


def save_gpt_oss(folder: Path, model: GptOssForCausalLM) -> Path:
    """As transformers saves it, and fine-tunes come: floating point numbers, its own names of some keys."""
    model.save_pretrained(folder)
    write_tokenizer(folder, model.config.vocab_size)
    return folder


def save_gpt_oss_mxfp4(folder: Path, model: GptOssForCausalLM) -> GptOssForCausalLM:
    """As the Hub has it: experts in MXFP4, the rest in BF16, several shards, the Hub's names of keys.

    Returns the model with the weights that the file now holds.
    """
    from transformers import GptOssForCausalLM
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    save_gpt_oss(folder, model)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    stored: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name.endswith(("gate_up_proj", "down_proj")):
            blocks, scales = to_mxfp4(tensor.transpose(1, 2))
            stored |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
            tensors[name] = convert_moe_packed_tensors(blocks, scales).float()
        else:
            stored[name] = tensor.bfloat16()
            tensors[name] = stored[name].float()
    write_sharded(folder, stored, shards=3)
    rope = model.config.rope_parameters
    edit(
        folder,
        remove=("rope_parameters", "swiglu_alpha"),
        experts_per_token=model.config.num_experts_per_tok,
        initial_context_length=rope["original_max_position_embeddings"],
        rope_theta=rope["rope_theta"],
        rope_scaling={key: rope[key] for key in rope if key != "rope_theta"},
        quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]},
    )
    reference = GptOssForCausalLM(model.config).float().eval()
    reference.load_state_dict(tensors, strict=not model.config.tie_word_embeddings)
    return reference


def save_gpt_oss_dequantized(folder: Path, model: GptOssForCausalLM) -> Path:
    """As transformers saves what it read in MXFP4 and has no kernels for: BF16 under the names of the codes."""
    save_gpt_oss(folder, model)
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(folder / "model.safetensors").items()}
    renamed = {f"{n}_blocks" if n.endswith(("gate_up_proj", "down_proj")) else n: tensors[n] for n in tensors}
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def to_mxfp4(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """[..., rows, columns] -> codes uint8 [..., rows, columns / 32, 16] and exponents uint8 [..., rows, columns / 32].

    The even column of two is in the low half of a byte; every code occurs.
    """
    groups = matrices.unflatten(-1, (-1, 32))
    exponents = (groups.abs().amax(-1) / 6).log2().ceil().clamp(-60, 60)
    magnitudes = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    scaled = groups / exponents.exp2()[..., None]
    codes = (scaled.abs()[..., None] - magnitudes).abs().argmin(-1) + 8 * (scaled < 0)
    return (codes[..., ::2] + 16 * codes[..., 1::2]).to(torch.uint8), (exponents + 127).to(torch.uint8)


def without_rope(folder: Path) -> Path:
    """The same checkpoint with a configuration that says nothing of rotary embeddings."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({key: config[key] for key in config if "rope" not in key}))
    return folder
