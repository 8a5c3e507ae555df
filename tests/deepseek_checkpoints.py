"""Tiny random DeepSeek V4 checkpoints, built with transformers and written in the ways that real ones come."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from checkpoints import edit_config, write_sharded, write_tokenizer
from safetensors.torch import load_file
from torch import Tensor

if TYPE_CHECKING:
    from transformers import DeepseekV4ForCausalLM

# Sliding, overlapping and heavily compressed layers, two of them hash-routed, and an indexer that has to choose; YaRN
# from so short a context that it matters. llama.cpp needs a ratio of 4, four streams, and index heads of a multiple of
# 64 that are not as wide as those of attention.
DEEPSEEK: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 256,
    "moe_intermediate_size": 256,
    "num_hidden_layers": 5,
    "compress_ratios": [0, 4, 128, 4, 128],
    "num_hash_layers": 2,
    "num_attention_heads": 4,
    "head_dim": 128,
    "qk_rope_head_dim": 32,
    "q_lora_rank": 256,
    "o_groups": 2,
    "o_lora_rank": 128,
    "sliding_window": 64,
    "index_n_heads": 16,  # with few, many scores are exactly zero and the choice between them is anyone's
    "index_head_dim": 64,
    "index_topk": 16,
    "n_routed_experts": 16,
    "num_experts_per_tok": 8,  # one more or fewer by a near tie should not matter much
    "routed_scaling_factor": 1.5,
    "swiglu_limit": 1.0,
    "max_position_embeddings": 2048,
    "rope_theta": 10000.0,
    "compress_rope_theta": 160000.0,
    "rope_scaling": {
        "type": "yarn",
        "factor": 4,
        "original_max_position_embeddings": 512,
        "beta_fast": 32,
        "beta_slow": 1,
    },
    "bos_token_id": 0,
    "eos_token_id": 1,
}


def deepseek_model(seed: int = 0, **overrides: Any) -> DeepseekV4ForCausalLM:
    """A random model in which every part matters: sinks, positions, biases and stream mixes are far from zero."""
    from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

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
                tensor.normal_(0, 0.5)
            elif "norm" in name:
                tensor.uniform_(0.5, 1.5)
            elif name.endswith(("sinks", "position_bias", "base", "scale")):
                tensor.normal_(0, 0.5)
            elif "inv_freq" not in name:
                tensor.normal_(0, tensor.shape[-1] ** -0.5)
        model.lm_head.weight *= 0.8
    return model


def save_deepseek(folder: Path, model: DeepseekV4ForCausalLM, in_memory_names: bool = False) -> Path:
    """As transformers saves it."""
    model.save_pretrained(folder, save_original_format=not in_memory_names)
    write_tokenizer(folder, model.config.vocab_size)
    return folder


# Which parameters the Hub stores how, by their names in memory; everything else is BF16.
_EXPERTS = re.compile(r"mlp\.experts\.|ffn\.experts\.")
_FP8 = re.compile(r"\.(q_[ab]_proj|o_[ab]_proj|wq_[ab]|wkv|wo_[ab])\.|self_attn\.kv_proj|shared_experts")
_REWRITTEN = ("layer_types", "mlp_layer_types", "compress_rates", "rope_parameters", "partial_rotary_factor")
_HUB_NAMES = (("model.", ""), ("embed_tokens", "embed"), ("hc_head.hc", "hc_head"), ("attn.norm", "attn.kv_norm"))
_FLOAT = re.compile(r"hc|sink|position_bias|ape$|bias$|tid2eid|inv_freq")


def save_deepseek_hub(
    folder: Path, model: DeepseekV4ForCausalLM, experts: str = "mxfp4", scale: float = 1.0, shards: int = 3
) -> DeepseekV4ForCausalLM:
    """As the Hub has it: FP8 in 128x128 blocks, experts in MXFP4 or FP8, BF16 and F32 for the rest, names of its own.

    Scales are E8M0, or with another `scale` than 1 its multiples by powers of two, in F32. The model is rounded to
    what the files hold, in place, and returned.
    """
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if _EXPERTS.search(name):
                for matrix in tensor:
                    matrix.copy_(_rounded(matrix, experts, scale))
            elif not _FLOAT.search(name):
                tensor.copy_(_rounded(tensor, "fp8", scale) if _FP8.search(name) else tensor.bfloat16())
    save_deepseek(folder, model)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    stored: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        kind = experts if _EXPERTS.search(name) else "fp8"
        if (_EXPERTS.search(name) or _FP8.search(name)) and "compressor" not in name:
            stored[hub_name(name)], scales = encode(tensor, kind, scale)
            stored[hub_name(name).removesuffix("weight") + "scale"] = scales
        else:
            stored[hub_name(name)] = tensor if _FLOAT.search(name) else tensor.bfloat16()
    write_sharded(folder, stored, shards)
    edit_config(
        folder,
        compress_ratios=[*DEEPSEEK["compress_ratios"], 0],
        num_hash_layers=DEEPSEEK["num_hash_layers"],
        rope_scaling=DEEPSEEK["rope_scaling"],
        topk_method="noaux_tc",
        quantization_config={"quant_method": "fp8", "scale_fmt": "ue8m0", "weight_block_size": [128, 128]},
        **dict.fromkeys(_REWRITTEN),
    )
    return model


def add_draft(folder: Path, seed: int = 7) -> dict[str, Tensor]:
    """Adds a block for multi-token prediction to a Hub checkpoint; returns its tensors as stored."""
    generator = torch.Generator().manual_seed(seed)
    stored = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    draft = {name.replace("layers.0", "mtp.0"): t for name, t in stored.items() if name.startswith("layers.0.")}
    del draft["mtp.0.ffn.gate.tid2eid"]
    draft["mtp.0.ffn.gate.bias"] = torch.randn(DEEPSEEK["n_routed_experts"], generator=generator)
    for name in ("e_proj", "h_proj"):
        matrix = torch.randn(DEEPSEEK["hidden_size"], DEEPSEEK["hidden_size"], generator=generator) / 16
        draft[f"mtp.0.{name}.weight"], draft[f"mtp.0.{name}.scale"] = encode(matrix, "fp8")
    for name in ("enorm", "hnorm", "norm"):
        draft[f"mtp.0.{name}.weight"] = torch.rand(DEEPSEEK["hidden_size"], generator=generator).bfloat16() + 0.5
    for name in ("hc_head_fn", "hc_head_base", "hc_head_scale"):
        draft[f"mtp.0.{name}"] = torch.randn(stored[name].shape, generator=generator)
    write_sharded(folder, stored | draft, 3)
    return draft


def add_blocks(folder: Path, seed: int = 8) -> None:
    """Adds a draft of three blocks, as the 0731 releases have it, to a Hub checkpoint."""
    generator, hidden, rank = torch.Generator().manual_seed(seed), DEEPSEEK["hidden_size"], 64
    stored = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    draft: dict[str, Tensor] = {}
    for block in range(3):  # layers of the model whose routers learned, without their compressors
        begin = f"layers.{block + 2}."
        own = {name: tensor for name, tensor in stored.items() if name.startswith(begin)}
        draft |= {
            f"mtp.{block}.{name.removeprefix(begin)}": tensor
            for name, tensor in own.items()
            if "compressor" not in name and "indexer" not in name
        }
    matrix = torch.randn(hidden, 3 * hidden, generator=generator) / 24
    draft["mtp.0.main_proj.weight"], draft["mtp.0.main_proj.scale"] = encode(matrix, "fp8")
    for name in ("mtp.0.main_norm", "mtp.2.norm"):
        draft[f"{name}.weight"] = torch.rand(hidden, generator=generator).bfloat16() + 0.5
    for name in ("hc_head_fn", "hc_head_base", "hc_head_scale"):
        draft[f"mtp.2.{name}"] = torch.randn(stored[name].shape, generator=generator)
    for name in ("markov_w1", "markov_w2"):
        factor = torch.randn(DEEPSEEK["vocab_size"], rank, generator=generator) / 4
        draft[f"mtp.2.markov_head.{name}.weight"] = factor.bfloat16()
    confidence = torch.randn(1, hidden + rank, generator=generator) / 16
    draft["mtp.2.confidence_head.proj.weight"] = confidence.bfloat16()
    write_sharded(folder, {name: tensor.clone() for name, tensor in (stored | draft).items()}, 3)
    edit_config(
        folder,
        dspark_block_size=5,
        dspark_markov_rank=rank,
        dspark_noise_token_id=510,
        dspark_target_layer_ids=[2, 3, 4],
    )


def hub_name(name: str) -> str:
    """From the names that transformers saves."""
    for saved, hub in _HUB_NAMES:
        name = name.replace(saved, hub, 1)
    return name


def encode(matrix: Tensor, kind: str, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """Codes and scales as the Hub stores them; exact for what `_rounded` returns."""
    codes, exponents = _codes(matrix, kind, scale)
    if kind == "mxfp4":
        magnitudes = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
        nibbles = torch.searchsorted(magnitudes, codes.abs()) + 8 * (codes < 0)
        packed = (nibbles[:, ::2] | nibbles[:, 1::2] << 4).to(torch.uint8).view(torch.int8)
        return packed, (exponents + 127).to(torch.uint8).view(torch.float8_e8m0fnu)
    scales = scale * exponents.exp2()
    return codes.to(torch.float8_e4m3fn), scales if scale != 1 else scales.to(torch.float8_e8m0fnu)


def decode_fp8(stored: dict[str, Tensor], module: str) -> Tensor:
    codes, scales = stored[f"{module}.weight"].float(), stored[f"{module}.scale"].float()
    return codes * _spread(scales, codes.shape)


def _rounded(matrix: Tensor, kind: str, scale: float) -> Tensor:
    codes, exponents = _codes(matrix, kind, scale)
    return codes * _spread(scale * exponents.exp2(), matrix.shape)


def _codes(matrix: Tensor, kind: str, scale: float) -> tuple[Tensor, Tensor]:
    """Values that E4M3 or E2M1 holds, with the exponents of their blocks' scales."""
    rows, columns = (1, 32) if kind == "mxfp4" else (128, 128)
    peak = matrix.unflatten(0, (-1, rows)).unflatten(2, (-1, columns)).abs().amax(dim=(1, 3))
    if kind == "mxfp4":
        exponents = peak.log2().floor() - 2
        grid = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
        scaled = matrix / _spread(exponents.exp2(), matrix.shape)
        nearest = grid[(scaled.abs().clamp(max=6)[..., None] - grid).abs().argmin(dim=-1)]
        return nearest * scaled.sign(), exponents
    exponents = (peak / 448 / scale).log2().ceil()
    scaled = matrix / _spread(scale * exponents.exp2(), matrix.shape)
    return scaled.to(torch.float8_e4m3fn).float(), exponents


def _spread(scales: Tensor, shape: torch.Size) -> Tensor:
    rows, columns = scales.shape
    return scales.repeat_interleave(shape[0] // rows, 0).repeat_interleave(shape[1] // columns, 1)
