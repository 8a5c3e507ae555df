"""Tiny random MiniMax M3 checkpoints, built with transformers and written in the ways that real ones come."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import modelopt
import torch
from checkpoints import write_tokenizer
from safetensors.torch import load_file, save_file

if TYPE_CHECKING:
    from transformers import MiniMaxM3SparseForConditionalGeneration, MiniMaxM3VLForCausalLM

_FULL, _SELECTING = "full_attention", "minimax_m3_sparse"
# 16 experts so that no rule for 8 applies; texts of more than the 48 tokens that are looked at.
MINIMAX_M3: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 256,
    "dense_intermediate_size": 384,
    "shared_intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "rotary_dim": 32,
    "num_local_experts": 16,
    "num_experts_per_tok": 4,
    "max_position_embeddings": 4096,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5e6, "partial_rotary_factor": 0.5},
    "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
    "layer_types": [_FULL, _SELECTING, _SELECTING, _SELECTING],
    "index_n_heads": 2,
    "index_head_dim": 64,
    "index_block_size": 16,
    "index_topk_blocks": 3,
    "index_local_blocks": 1,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
# What llama.cpp has too, and what it has not.
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "tied": {"tie_word_embeddings": True},
    "one expert a token": {"num_experts_per_tok": 1},
    "two local blocks": {"index_local_blocks": 2},
    "the own block alone": {"index_topk_blocks": 1},
    "narrow index heads": {"index_head_dim": 32},
    "wide index heads, large blocks": {"index_head_dim": 128, "index_block_size": 32},
    "a shared expert of two": {"shared_intermediate_size": 512, "routed_scaling_factor": 1.5},
    "odd widths": {"hidden_size": 160, "intermediate_size": 96, "shared_intermediate_size": 96},
}
BEYOND_LLAMA: dict[str, dict[str, Any]] = {
    "another clamp": {"swiglu_limit": 1.0},
    "a dense layer among others": {"mlp_layer_types": ["dense", "sparse", "dense", "sparse"]},
    "no selection": {"layer_types": [_FULL] * 4},
    "selection in a dense layer": {"layer_types": [_SELECTING] * 4},
    "a wider shared expert": {"shared_intermediate_size": 320},
}


def minimax_m3_model(seed: int = 0, **overrides: Any) -> MiniMaxM3VLForCausalLM:
    """A random model in which selections, biases and clamps matter, and whose layers add little to what is there."""
    from transformers import MiniMaxM3VLTextConfig
    from transformers.models.minimax_m3_vl.modeling_minimax_m3_vl import MiniMaxM3VLForCausalLM

    torch.manual_seed(seed)
    return _randomized(MiniMaxM3VLForCausalLM(MiniMaxM3VLTextConfig(**(MINIMAX_M3 | overrides))))


def with_vision_tower(model: MiniMaxM3VLForCausalLM) -> MiniMaxM3SparseForConditionalGeneration:
    """The same language model beside a tower for pictures."""
    from transformers import MiniMaxM3SparseForConditionalGeneration, MiniMaxM3VLConfig

    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = MiniMaxM3VLConfig(
        text_config=model.config.to_dict(),
        vision_config=tower | {"image_size": 28},
        projector_hidden_size=64,
        tie_word_embeddings=model.config.tie_word_embeddings,
    )
    whole = MiniMaxM3SparseForConditionalGeneration(config).float().eval()
    whole.model.language_model.load_state_dict(model.model.state_dict())
    whole.lm_head.load_state_dict(model.lm_head.state_dict())
    return whole


def _randomized(model: Any) -> Any:
    model = model.float().eval()
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith("e_score_correction_bias"):
                tensor.normal_(0, 0.1)
            elif "norm" in name:  # their distance from one
                tensor.uniform_(-0.5, 0.5)
            elif "embed_tokens" in name:  # as a head too it would name the token that it was given
                tensor.normal_(0, tensor.shape[-1] ** -0.5 if model.config.tie_word_embeddings else 1.0)
            elif "gate_up_proj" in name:  # beyond the clamps of both signs
                tensor.normal_(0, 3 * tensor.shape[-1] ** -0.5)
            elif "o_proj" in name or "down_proj" in name:
                tensor.normal_(0, (0.25 if "o_proj" in name else 0.02) * tensor.shape[-1] ** -0.5)
            elif "inv_freq" not in name:
                tensor.normal_(0, tensor.shape[-1] ** -0.5)
    return model


def save_minimax_m3(folder: Path, model: Any, in_memory_names: bool = False) -> Path:
    """As transformers saves it."""
    model.save_pretrained(folder, save_original_format=not in_memory_names)
    write_tokenizer(folder, MINIMAX_M3["vocab_size"])
    return folder


def save_published(folder: Path, model: MiniMaxM3VLForCausalLM, flattened: bool = False) -> Path:
    """As the Hub has it, beside a vision tower, or `flattened` to the language model alone; the Hub's names of keys."""
    save_minimax_m3(folder, with_vision_tower(model))
    config = json.loads((folder / "config.json").read_text())
    text = _published_keys(config.pop("text_config"))
    if flattened:
        tensors = load_file(folder / "model.safetensors")
        names = {name: name.removeprefix("language_model.") for name in tensors if name.startswith("language_model.")}
        save_file({new: tensors[name] for name, new in names.items()}, folder / "model.safetensors")
        text |= {
            "first_k_dense_replace": text["moe_layer_freq"].index(1),
            "moe_intermediate_size": text["intermediate_size"],
        }
        config = text | {
            "model_type": "minimax_m3",
            "architectures": ["MiniMaxM3SparseForCausalLM"],
            "num_mtp_modules": 7,
        }
    else:
        config["text_config"] = text
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def _published_keys(text: dict[str, Any]) -> dict[str, Any]:
    selecting = [int(kind == _SELECTING) for kind in text.pop("layer_types")]
    sparse = {
        "use_sparse_attention": True,
        "sparse_index_dim": text.pop("index_head_dim"),
        "sparse_num_index_heads": text.pop("index_n_heads"),
        "sparse_topk_blocks": text.pop("index_topk_blocks"),
        "sparse_block_size": text.pop("index_block_size"),
        "sparse_local_block": text.pop("index_local_blocks"),
        "sparse_init_block": 0,
        "sparse_score_type": "max",
        "sparse_disable_index_value": selecting,
        "sparse_attention_freq": selecting,
    }
    rope = text.pop("rope_parameters")
    text.pop("model_type")
    return text | {
        "hidden_act": "swigluoai",
        "moe_layer_freq": [int(kind == "sparse") for kind in text.pop("mlp_layer_types")],
        "num_mtp_modules": 1,
        "n_shared_experts": 1,
        "scoring_func": "sigmoid",
        "use_gemma_norm": True,
        "qk_norm_type": "per_head",
        "rope_theta": rope["rope_theta"],
        "partial_rotary_factor": rope["partial_rotary_factor"],
        "sparse_attention_config": sparse,
    }


def save_quantized(folder: Path, model: MiniMaxM3VLForCausalLM, encodings: tuple[modelopt.Encoding, ...]) -> Any:
    """As the Hub has it, experts in the first encoding, what else of the language model is large in the second.

    Returns the model with the weights that the file now holds.
    """
    from transformers import MiniMaxM3SparseForConditionalGeneration

    def encoding_of(module: str) -> modelopt.Encoding | None:
        if ".experts." in module:
            return encodings[0]
        return encodings[1] if module.startswith("language_model.model.layers.") and module.endswith("_proj") else None

    plain = save_published(folder.parent / "plain", model)
    values = modelopt.rewrite(plain, folder, encoding_of)
    exact = modelopt.dequantized(plain, folder.parent / "exact", values)
    return MiniMaxM3SparseForConditionalGeneration.from_pretrained(exact, dtype=torch.float32).eval()
