"""Tiny random checkpoints of Qwen3-Next and Qwen3.5, from transformers and written as real ones come."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from checkpoints import from_fp8_blocks, to_fp8_blocks, write_sharded, write_tokenizer
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


def save_published(
    folder: Path, model: Any, fused: bool = True, drafts: str | None = "apart", fp8: bool = False
) -> Path:
    """As the Hub has it: nested beside a vision tower where the family has one, with a block for drafting.

    Args:
        fused: whether a layer's experts are one tensor, as in Qwen3.5's own BF16 releases.
        drafts: whether those of the drafting block are "fused" or "apart"; None for no block.
        fp8: blocks with BF16 scales, experts apart; the model is given the values that are stored.
    """
    folder.mkdir(parents=True)
    nested = model.config.model_type != "qwen3_next"
    state = dict(model.state_dict())
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    stored = {}
    for name, tensor in _separated(state, fused and not fp8).items():
        encoded = _fp8(name, tensor) if fp8 and _is_encoded(name) else {name: tensor.contiguous()}
        stored |= {_published(key) if nested else key: value for key, value in encoded.items()}
    if fp8:
        model.load_state_dict({name: _rounded(tensor, name) for name, tensor in state.items()}, strict=False)
    if drafts:
        stored |= _drafting(model, drafts == "fused")
    if nested:
        stored |= {"model.visual.pos_embed.weight": torch.zeros(4, 8), "model.visual.merger.norm.bias": torch.zeros(8)}
    write_sharded(folder, stored, shards=3)
    (folder / "config.json").write_text(json.dumps(_published_config(model, nested, fp8)))
    write_tokenizer(folder, model.config.vocab_size)
    return folder


def _published(name: str) -> str:
    return name.replace("model.", "model.language_model.", 1) if name.startswith("model.") else name


def _published_config(model: Any, nested: bool, fp8: bool) -> dict[str, Any]:
    """With the keys that transformers does not write, and without those that it alone does."""
    text = model.config.to_dict()
    kinds, rope = text.pop("layer_types"), text.pop("rope_parameters")
    kind = type(model).__name__.replace("ForCausalLM", "ForConditionalGeneration" if nested else "ForCausalLM")
    whole: dict[str, Any] = {"tie_word_embeddings": text.pop("tie_word_embeddings"), "architectures": [kind]}
    if fp8:
        whole["quantization_config"] = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
    if not nested:
        rotary = {key: rope[key] for key in ("rope_theta", "partial_rotary_factor")}
        return text | whole | rotary | {"rope_scaling": None, "full_attention_interval": 4, "use_sliding_window": False}
    text |= {
        "rope_parameters": rope,
        "layer_types": kinds,
        "attn_output_gate": True,
        "mamba_ssm_dtype": "float32",
        "mtp_num_hidden_layers": 1,
        "mtp_use_dedicated_embeddings": False,
    }
    outer = text["model_type"].removesuffix("_text")
    return whole | {"model_type": outer, "text_config": text, "vision_config": {"depth": 27}, "image_token_id": 5}


def _separated(state: dict[str, Tensor], fused: bool) -> dict[str, Tensor]:
    """Experts one by one, unless they stay fused."""
    found: dict[str, Tensor] = {}
    for name, tensor in state.items():
        stem, _, kind = name.rpartition(".experts.")
        if fused or not stem:
            found[name] = tensor
            continue
        for expert, matrix in enumerate(tensor):
            parts = dict(zip(("gate_proj", "up_proj"), matrix.chunk(2), strict=True))
            apart = parts if kind == "gate_up_proj" else {"down_proj": matrix}
            found |= {f"{stem}.experts.{expert}.{part}.weight": rows.clone() for part, rows in apart.items()}
    return found


def _is_encoded(name: str) -> bool:
    """Qwen's FP8 releases leave what is small."""
    return "_proj" in name and not name.endswith(("in_proj_a.weight", "in_proj_b.weight", "in_proj_ba.weight"))


def _fp8(name: str, matrix: Tensor) -> dict[str, Tensor]:
    scale = to_fp8_blocks(matrix)[1].bfloat16()
    codes = (matrix / from_fp8_blocks(torch.ones_like(matrix), scale.float())).to(torch.float8_e4m3fn)
    return {name: codes, f"{name}_scale_inv": scale}


def _rounded(tensor: Tensor, name: str) -> Tensor:
    """The values of what `_fp8` stores; of a stack of experts as of each matrix, gate and up by themselves."""
    if not _is_encoded(name):
        return tensor
    if tensor.dim() == 3:
        halves = 2 if name.endswith("gate_up_proj") else 1
        return torch.stack([torch.cat([_rounded(half, "_proj") for half in matrix.chunk(halves)]) for matrix in tensor])
    codes, scale = _fp8("", tensor).values()
    return from_fp8_blocks(codes, scale.float())


def _drafting(model: Any, fused: bool) -> dict[str, Tensor]:
    """A block of attention and experts, as the last layer has them."""
    last, hidden = len(model.model.layers) - 1, model.config.hidden_size
    shapes = {
        name.replace(f"model.layers.{last}.", "mtp.layers.0."): tensor.shape
        for name, tensor in _separated(dict(model.state_dict()), fused).items()
        if f".layers.{last}." in name
    }
    shapes |= {f"mtp.{norm}.weight": (hidden,) for norm in ("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden")}
    shapes["mtp.fc.weight"] = (hidden, 2 * hidden)
    made = {name: torch.empty(shape) for name, shape in shapes.items()}
    for name, tensor in made.items():
        randomize(name, tensor)
    return made
