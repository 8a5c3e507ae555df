"""Tiny random Gemma 4 checkpoints, built with transformers and written in the ways that real ones come."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import modelopt
import torch
from checkpoints import write_sharded, write_tokenizer
from safetensors.torch import load_file, save_file

if TYPE_CHECKING:
    from transformers import Gemma4ForCausalLM

FULL, WINDOW = "full_attention", "sliding_attention"
_COMMON: dict[str, Any] = {
    "vocab_size": 512,
    "vocab_size_per_layer_input": 512,
    "hidden_size": 256,
    "intermediate_size": 384,
    "num_hidden_layers": 6,
    "layer_types": [WINDOW, WINDOW, FULL] * 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "global_head_dim": 128,
    "sliding_window": 32,
    "max_position_embeddings": 2048,
    "final_logit_softcapping": 8.0,
    "hidden_size_per_layer_input": 0,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
# As 31B: values that are keys where the whole context is seen, in fewer heads than elsewhere.
DENSE: dict[str, Any] = _COMMON | {"attention_k_eq_v": True, "num_global_key_value_heads": 1}
# As 26B-A4B: experts beside the dense layer.
MIXTURE: dict[str, Any] = DENSE | {
    "enable_moe_block": True,
    "num_experts": 16,
    "top_k_experts": 4,
    "moe_intermediate_size": 128,
}
# As E2B: layers that use keys of others and are twice as wide, and per-layer embeddings.
PER_LAYER: dict[str, Any] = _COMMON | {
    "num_hidden_layers": 8,
    "layer_types": [WINDOW, WINDOW, FULL, WINDOW, FULL, WINDOW, WINDOW, FULL],
    "num_key_value_heads": 1,
    "num_kv_shared_layers": 3,
    "use_double_wide_mlp": True,
    "hidden_size_per_layer_input": 32,
}
SHORT = [WINDOW, WINDOW, FULL]
KINDS = {"mixture": MIXTURE, "dense": DENSE, "per layer": PER_LAYER}
# Of which kind, and what else; what llama.cpp has too, and what it has not.
VARIANTS: dict[str, dict[str, Any]] = {
    "mixture": MIXTURE,
    "dense": DENSE,
    "per layer": PER_LAYER,
    "odd widths": MIXTURE | {"intermediate_size": 352, "moe_intermediate_size": 96, "num_hidden_layers": 3,
                             "layer_types": SHORT},
    "one expert a token": MIXTURE | {"top_k_experts": 1},
    "no cap": DENSE | {"final_logit_softcapping": None},
    "values of their own": DENSE | {"attention_k_eq_v": False},
    "half of each head turns": DENSE | {
        "rope_parameters": {
            FULL: {"rope_type": "proportional", "partial_rotary_factor": 0.5, "rope_theta": 5e5},
            WINDOW: {"rope_type": "default", "rope_theta": 2e4},
        }
    },
    "shared, as wide as others": PER_LAYER | {"use_double_wide_mlp": False},
    "per layer, nothing shared": PER_LAYER | {"num_kv_shared_layers": 0},
}  # fmt: skip
BEYOND_LLAMA: dict[str, dict[str, Any]] = {
    "keys of a layer before the last": PER_LAYER
    | {"num_hidden_layers": 6, "num_kv_shared_layers": 3, "layer_types": [FULL, WINDOW, WINDOW, FULL, WINDOW, FULL]},
    "every layer sees all": DENSE | {"num_hidden_layers": 2, "layer_types": [FULL, FULL]},
}  # fmt: skip


def gemma_model(seed: int = 0, **settings: Any) -> Gemma4ForCausalLM:
    """A random model whose experts matter, and whose layers add little to what is there, as in trained ones.

    As the head the embedding would name the token that it was given, whatever layers add: the last norm turns the signs
    of half of the numbers. Norms of what layers give are small beside the residual.
    """
    from transformers import Gemma4ForCausalLM, Gemma4TextConfig

    torch.manual_seed(seed)
    model = Gemma4ForCausalLM(Gemma4TextConfig(**settings)).float().eval()
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if "layer_scalar" in name:
                tensor.uniform_(0.8, 1.2)
            elif "inv_freq" in name or "embed_scale" in name:
                continue
            elif "post_" in name and "norm" in name:
                tensor.uniform_(0.1, 0.2)
            elif "norm" in name or "scale" in name:
                tensor.uniform_(0.5, 1.5)
            elif "embed_tokens" in name:
                tensor.normal_(0, 0.12)
            else:
                tensor.normal_(0, tensor.shape[-1] ** -0.5)
        last = model.model.norm.weight
        last *= torch.where(torch.rand_like(last) < 0.5, -1.0, 1.0)
    return model


class GeluOfTable(torch.nn.Module):
    """As llama.cpp computes it on a CPU, where it looks it up: 16 bits in, 16 bits out."""

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        looked_up = torch.nn.functional.gelu(states.half().float(), approximate="tanh").half().float()
        return torch.where(states <= -10, 0.0, torch.where(states >= 10, states, looked_up))


def with_table(model: Gemma4ForCausalLM) -> Gemma4ForCausalLM:
    """The same with that GELU."""
    for module in model.modules():
        if hasattr(module, "act_fn"):
            module.act_fn = GeluOfTable()
    return model


def save_gemma(folder: Path, model: Gemma4ForCausalLM) -> Path:
    """As transformers saves it: the language model alone, sizes of heads layer by layer."""
    model.save_pretrained(folder)
    write_tokenizer(folder, model.config.vocab_size)
    return folder


def save_gemma_nvfp4(folder: Path, model: Gemma4ForCausalLM) -> tuple[Path, Gemma4ForCausalLM]:
    """As NVIDIA publishes 26B-A4B: experts one by one in NVFP4. Returns a model with what the codes stand for, too."""
    apart = save_gemma(folder.with_name("apart"), model)
    tensors = load_file(apart / "model.safetensors")
    for name in [name for name in tensors if ".experts." in name]:
        stem, _, kind = name.rpartition(".")
        parts = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}[kind]
        for expert, matrix in enumerate(tensors.pop(name)):
            for part, rows in zip(parts, matrix.chunk(len(parts)), strict=True):
                tensors[f"{stem}.{expert}.{part}.weight"] = rows.contiguous()
    save_file(tensors, apart / "model.safetensors", metadata={"format": "pt"})
    values = modelopt.rewrite(apart, folder, lambda module: "nvfp4" if ".experts." in module else None)
    with torch.no_grad():
        for layer, block in enumerate(model.model.layers):
            for expert in range(model.config.num_experts):
                gate, up, down = (
                    values[f"model.layers.{layer}.experts.{expert}.{part}_proj.weight"]
                    for part in ("gate", "up", "down")
                )
                block.experts.gate_up_proj[expert] = torch.cat((gate, up))
                block.experts.down_proj[expert] = down
    return folder, model


def publish_gemma(folder: Path, model: Gemma4ForCausalLM, settings: dict[str, Any], shards: int = 3) -> Path:
    """As the Hub has it: beside a tower for pictures, in BF16, with keys and values that nobody reads."""
    save_gemma(folder, model)
    stored = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        stored[name.replace("model.", "model.language_model.", 1)] = tensor.bfloat16()
    (folder / "model.safetensors").unlink()
    own = settings["num_hidden_layers"] - settings.get("num_kv_shared_layers", 0)
    for layer in range(own, settings["num_hidden_layers"]):
        prefix = f"model.language_model.layers.{layer}.self_attn"
        size = settings["global_head_dim" if settings["layer_types"][layer] == FULL else "head_dim"]
        for kind in ("k_proj", "v_proj"):
            stored[f"{prefix}.{kind}.weight"] = torch.randn(size, settings["hidden_size"]).bfloat16()
        stored[f"{prefix}.k_norm.weight"] = torch.ones(size).bfloat16()
    stored["model.vision_tower.patch_embedder.input_proj.weight"] = torch.randn(8, 12).bfloat16()
    stored["model.embed_vision.embedding_projection.weight"] = torch.randn(settings["hidden_size"], 8).bfloat16()
    write_sharded(folder, stored, shards)
    saved = json.loads((folder / "config.json").read_text())
    kept = ("rope_parameters", "rms_norm_eps", "tie_word_embeddings", "hidden_activation", "use_double_wide_mlp")
    text = settings | {key: saved[key] for key in kept} | {"model_type": "gemma4_text", "use_cache": True}
    config = {
        "architectures": ["Gemma4ForConditionalGeneration"],
        "model_type": "gemma4",
        "text_config": text | {"use_bidirectional_attention": "vision"},
        "vision_config": {"model_type": "gemma4_vision", "hidden_size": 8},
        "audio_config": None,
        "image_token_id": 5,
        "tie_word_embeddings": True,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder
