"""Tiny random Nemotron-H checkpoints, built with transformers and written in the ways that real ones come."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from checkpoints import write_tokenizer
from safetensors.torch import load_file, save_file

if TYPE_CHECKING:
    from transformers import NemotronHForCausalLM

# 16 experts so that no rule for 8 applies; heads that share groups; widths that blocks of 64 divide and of 256 do not.
NEMOTRON: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 192,
    "layers_block_type": ["linear_attention", "moe", "full_attention", "linear_attention", "moe", "moe"],
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "mamba_num_heads": 8,
    "mamba_head_dim": 64,
    "n_groups": 2,
    "ssm_state_size": 64,
    "chunk_size": 32,
    "intermediate_size": 224,
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 320,
    "moe_shared_expert_intermediate_size": 448,
    "moe_latent_size": None,
    "routed_scaling_factor": 2.5,
    "max_position_embeddings": 2048,
    "num_nextn_predict_layers": 0,
    # transformers clamps the step from below where the original does not.
    "time_step_min": 1e-30,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
LATENT = {"moe_latent_size": 128, "routed_scaling_factor": 5.0}
GROUPED = {"n_group": 4, "topk_group": 2}
WITH_DENSE_LAYER = {"layers_block_type": ["linear_attention", "mlp", "full_attention", "moe"]}
# Blocks of 256 pay for the hidden size and shared experts, not for experts.
PARTLY_PADDED = {"hidden_size": 480, "moe_intermediate_size": 160, "moe_shared_expert_intermediate_size": 480}
DENSE = {"layers_block_type": ["linear_attention", "mlp", "full_attention", "linear_attention", "mlp"]}


_WRITERS = ("out_proj.weight", "o_proj.weight", "down_proj", "down_proj.weight", "fc2_latent_proj.weight")


def nemotron_model(seed: int = 0, **overrides: Any) -> NemotronHForCausalLM:
    """A random model whose every part matters: states that fade at all speeds, biases that move the router's choice.

    What a layer adds is small beside what is there, as in trained models: otherwise one token routed elsewhere for
    a rounding error would change everything after it.
    """
    from transformers import NemotronHConfig, NemotronHForCausalLM

    torch.manual_seed(seed)
    model = NemotronHForCausalLM(NemotronHConfig(**(NEMOTRON | overrides))).float().eval()
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith("e_score_correction_bias"):
                tensor.normal_(0, 0.1)
            elif name.endswith(("norm.weight", "norm_f.weight", ".D")):
                tensor.uniform_(0.5, 1.5)
            elif name.endswith("A_log"):
                tensor.uniform_(-3, 2.5)
            elif name.endswith("dt_bias"):
                tensor.uniform_(-9, 0)
            elif name.endswith("conv1d.bias"):
                tensor.normal_(0, 0.2)
            elif name.endswith("conv1d.weight"):
                tensor.normal_(0, 0.5)
            elif name.endswith("embeddings.weight"):
                tensor.normal_(0, 1)
            elif name.endswith(_WRITERS):
                tensor.normal_(0, 0.2 * tensor.shape[-1] ** -0.5)
            else:
                tensor.normal_(0, tensor.shape[-1] ** -0.5)
    return model


def save_nemotron(folder: Path, model: NemotronHForCausalLM, in_memory_names: bool = False) -> Path:
    """As transformers saves it: rewritten layer list, no num_hidden_layers, an infinite limit as an object."""
    model.save_pretrained(folder, save_original_format=not in_memory_names)
    write_tokenizer(folder, model.config.vocab_size)
    return folder


def add_drafting_block(folder: Path, model: NemotronHForCausalLM, seed: int = 7) -> None:
    """Adds the tensors of multi-token prediction, which transformers neither loads nor saves."""
    generator = torch.Generator().manual_seed(seed)
    tensors = load_file(folder / "model.safetensors")
    hidden = model.config.hidden_size
    kinds = model.config.layers_block_type
    drafting: dict[str, torch.Tensor] = {}
    for part, kind in enumerate(("full_attention", "moe")):
        prefix = f"backbone.layers.{kinds.index(kind)}."
        for name, tensor in tensors.items():
            if name.startswith(prefix):
                spread = tensor.float().std() if tensor.numel() > 1 else 1.0
                noise = torch.randn(tensor.shape, generator=generator) * spread
                drafting[f"mtp.layers.{part}.{name.removeprefix(prefix)}"] = noise.to(tensor.dtype)
    for name in ("0.enorm", "0.hnorm", "1.final_layernorm"):
        drafting[f"mtp.layers.{name}.weight"] = 1 + 0.1 * torch.randn(hidden, generator=generator)
    drafting["mtp.layers.0.eh_proj.weight"] = torch.randn(hidden, 2 * hidden, generator=generator) * hidden**-0.5
    save_file(tensors | drafting, folder / "model.safetensors")


def edit(folder: Path, remove: tuple[str, ...] = (), **values: Any) -> None:
    """Changes config.json."""
    path = folder / "config.json"
    config = {key: value for key, value in json.loads(path.read_text()).items() if key not in remove}
    path.write_text(json.dumps(config | values))
