"""Tiny random DeepSeek V3 and Kimi K2 checkpoints, built with transformers and written as real ones come."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import int4_packs
import torch
from checkpoints import from_fp8_blocks, randomize, to_fp8_blocks, write_sharded, write_tokenizer
from nemotron_checkpoints import edit
from safetensors.torch import load_file, save_file
from torch import Tensor

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
# Those that differ in how attention and experts are built, for tests that need not see them all.
FEW = {name: (VARIANTS | LIMITS)[name] for name in ("V3", "mscales apart", "plain queries", "odd widths")}


def deepseek_model(seed: int = 0, **overrides: Any) -> DeepseekV3ForCausalLM:
    """A random model whose experts matter, and whose layers add little to what is there, as in trained ones."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    torch.manual_seed(seed)
    model = DeepseekV3ForCausalLM(DeepseekV3Config(**(DEEPSEEK | overrides))).float().eval()
    randomize(model)
    return model


def save_deepseek(folder: Path, model: Any, in_memory_names: bool = False) -> Path:
    """As transformers saves it: without the function of scores, experts apart unless `in_memory_names`."""
    model.save_pretrained(folder, save_original_format=not in_memory_names)
    write_tokenizer(folder, model.config.vocab_size)
    return folder


def save_published(folder: Path, model: Any, encoding: str = "fp8", drafts: bool = False) -> Any:
    """As the Hub has it: several shards, keys that transformers does not write, and matrices encoded.

    Args:
        encoding: "fp8" in blocks with float32 scales, but for embedding, head and router; "int4" of compressed-tensors
            for routed experts, beside a vision tower and below its prefixes; "bf16".
        drafts: whether a block for drafting follows the layers, in the same encoding.

    Returns the model, which may be of any family with latent attention, with the weights that the files now hold.
    """
    plain = save_deepseek(folder.parent / f"{folder.name}-plain", model)
    tensors = load_file(plain / "model.safetensors")
    if drafts:
        tensors |= drafting_block(model, tensors)
    stored: dict[str, Tensor] = {}
    values: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        encoded, values[name] = _ENCODINGS[encoding](name, tensor)
        stored |= {name.removesuffix("weight") + ending if ending else name: part for ending, part in encoded.items()}
    exact = folder.parent / f"{folder.name}-exact"
    exact.mkdir()
    (exact / "config.json").write_bytes((plain / "config.json").read_bytes())
    save_file(values, exact / "model.safetensors", metadata={"format": "pt"})
    folder.mkdir()
    for file in plain.glob("*.json"):
        (folder / file.name).write_bytes(file.read_bytes())
    if encoding == "int4":
        stored = {f"language_model.{name}": tensor for name, tensor in stored.items()}
        stored |= {f"{tower}.weight": torch.zeros(4, 8) for tower in ("vision_tower.patch_embed", "mm_projector.proj")}
    write_sharded(folder, stored, shards=3)
    _publish_config(folder, encoding, drafts)
    return type(model).from_pretrained(exact, dtype=torch.float32).eval()


def _publish_config(folder: Path, encoding: str, drafts: bool) -> None:
    kimi = encoding == "int4"
    rope = dict(json.loads((folder / "config.json").read_text())["rope_parameters"])
    if kimi:
        edit(folder, model_type="kimi_k2")
    edit(
        folder,
        remove=("rope_parameters", "head_dim", "qk_head_dim", "rope_interleave"),
        rope_theta=rope.pop("rope_theta"),
        rope_scaling={"type": rope.pop("rope_type"), **rope},
        scoring_func="sigmoid",
        topk_method="noaux_tc",
        moe_layer_freq=1,
        num_nextn_predict_layers=int(drafts),
    )
    if encoding == "fp8":
        edit(folder, quantization_config={"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]})
    if kimi:
        edit(folder, quantization_config=int4_packs.CONFIGURATIONS["compressed"])
        whole = {"model_type": "kimi_k25", "text_config": json.loads((folder / "config.json").read_text())}
        whole |= {"architectures": ["KimiK25ForConditionalGeneration"], "ignore_index": -100, "vision_config": {}}
        (folder / "config.json").write_text(json.dumps(whole))


def drafting_block(model: Any, tensors: dict[str, Tensor], seed: int = 7) -> dict[str, Tensor]:
    """What transformers neither loads nor saves: one layer more, and what its input and output are made with."""
    generator = torch.Generator().manual_seed(seed)
    layers, hidden = model.config.num_hidden_layers, model.config.hidden_size
    picking = [layer for layer in range(layers) if f"model.layers.{layer}.self_attn.indexer.wk.weight" in tensors]
    last, block = f"model.layers.{max(picking, default=layers - 1)}.", f"model.layers.{layers}."
    made = {}
    for name, tensor in tensors.items():
        if name.startswith(last):
            noise = torch.randn(tensor.shape, generator=generator) * tensor.std()
            made[name.replace(last, block)] = 1 + noise if "norm" in name else noise
    for norm in ("enorm", "hnorm", "shared_head.norm"):
        made[f"{block}{norm}.weight"] = 1 + 0.1 * torch.randn(hidden, generator=generator)
    made[f"{block}eh_proj.weight"] = torch.randn(hidden, 2 * hidden, generator=generator) * (2 * hidden) ** -0.5
    if model.config.model_type.startswith("glm"):
        return made
    made[f"{block}embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
    made[f"{block}shared_head.head.weight"] = tensors["lm_head.weight"].clone()
    return made


Encoded = tuple[dict[str, Tensor], Tensor]  # parts by their endings in place of `weight`, and the values they stand for


def _rounded(name: str, tensor: Tensor) -> Encoded:
    kept = tensor if name.endswith("_bias") else tensor.bfloat16()
    return {"": kept}, kept.float()


def _fp8(name: str, tensor: Tensor) -> Encoded:
    if not re.search(r"(?<!eh|ts)_proj|indexer\.w[qk]", name):
        return _rounded(name, tensor)
    codes, scale = to_fp8_blocks(tensor)
    return {"weight": codes, "weight_scale_inv": scale}, from_fp8_blocks(codes, scale)


def _int4(name: str, tensor: Tensor) -> Encoded:
    if ".experts." not in name:
        return _rounded(name, tensor)
    packed = int4_packs.pack(tensor, "compressed symmetric", 32)
    return packed.tensors, packed.values


_ENCODINGS: dict[str, Callable[[str, Tensor], Encoded]] = {"fp8": _fp8, "int4": _int4, "bf16": _rounded}
