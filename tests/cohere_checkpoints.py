"""Tiny random Cohere2 and Cohere2-MoE checkpoints, built with transformers, written in the ways that real ones come."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from checkpoints import write_sharded, write_tokenizer
from nemotron_checkpoints import edit
from safetensors.torch import load_file

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FULL, WINDOW = "full_attention", "sliding_attention"
_COMMON: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 256,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "sliding_window": 24,
    "max_position_embeddings": 2048,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5e4},
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}
# Three layers with a window, then one without; heads of 32, whose scale is no power of two.
DENSE: dict[str, Any] = _COMMON | {"intermediate_size": 512, "num_hidden_layers": 4, "logit_scale": 0.25}
# As Command A+: LayerNorm, shared experts that are averaged, shares that add up to 1, heads wider than their share.
MIXTURE: dict[str, Any] = _COMMON | {
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "head_dim": 64,
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "num_shared_experts": 2,
    "expert_selection_fn": "sigmoid",
    "logit_scale": 0.75,
}
# As North-Mini-Code: RMSNorm, no shared expert, sigmoids as they are, a wide dense layer first that knows positions.
NORTH: dict[str, Any] = {
    "num_hidden_layers": 5,
    "num_shared_experts": 0,
    "rms_norm_eps": 1e-6,
    "norm_topk_prob": False,
    "first_k_dense_replace": 1,
    "prefix_dense_intermediate_size": 512,
    "layer_types": [FULL, WINDOW, WINDOW, WINDOW, FULL],
    "logit_scale": 1.0,
}
DENSE_VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "another pattern": {"layer_types": [FULL, WINDOW, FULL, FULL]},
    "windows alone": {"layer_types": [WINDOW] * 3, "num_hidden_layers": 3},
    "odd widths": {"hidden_size": 160, "num_attention_heads": 5, "num_key_value_heads": 1, "intermediate_size": 96},
}
DENSE_BEYOND_LLAMA: dict[str, dict[str, Any]] = {
    "biases": {"attention_bias": True},
    "head of its own": {"tie_word_embeddings": False},
    "no window": {"layer_types": [FULL] * 4},
}
MIXTURE_VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "North": NORTH,
    "softmax": {"expert_selection_fn": "softmax", "norm_topk_prob": False},
    "two dense layers": {"first_k_dense_replace": 2, "prefix_dense_intermediate_size": 320},
    "dense layers with windows": {"first_k_dense_replace": 2, "prefix_dense_sliding_window_pattern": 3},
    "one expert a token": {"num_experts_per_tok": 1, "num_shared_experts": 1},
    "head of its own": {"tie_word_embeddings": False},
    "odd widths": {"hidden_size": 160, "intermediate_size": 96, "rms_norm_eps": 1e-5},
}
MIXTURE_BEYOND_LLAMA: dict[str, dict[str, Any]] = {
    "added shared expert": {"shared_expert_combination_strategy": "sum"},
    "dense layers without positions": {"prefix_dense_sliding_window_pattern": 2, "first_k_dense_replace": 2},
    "dense layers between": {"mlp_layer_types": ["sparse", "dense", "sparse", "sparse"]},
    "no experts": {"mlp_layer_types": ["dense"] * 4},
    "biases": {"attention_bias": True},
    "no window": {"layer_types": [FULL] * 4},
}


def cohere_model(mixture: bool, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A random model whose experts matter, and whose layers add little to what is there, as in trained ones."""
    from transformers import Cohere2Config, Cohere2ForCausalLM, Cohere2MoeConfig, Cohere2MoeForCausalLM

    torch.manual_seed(seed)
    if mixture:
        model: PreTrainedModel = Cohere2MoeForCausalLM(Cohere2MoeConfig(**(MIXTURE | overrides)))
    else:
        model = Cohere2ForCausalLM(Cohere2Config(**(DENSE | overrides)))
    return randomized(model)


@torch.no_grad()
def randomized(model: Any) -> Any:
    model = model.float().eval()
    for name, tensor in model.named_parameters():
        if "norm" in name:
            tensor.uniform_(0.5, 1.5)
        elif name.endswith("bias"):
            tensor.normal_(0, 0.3)
        elif "o_proj" in name or "down_proj" in name:
            tensor.normal_(0, 0.25 * tensor.shape[-1] ** -0.5)
        else:  # the embedding is small too: as a head it would name the token that it was given
            tensor.normal_(0, tensor.shape[-1] ** -0.5)
    return model


def save_cohere(folder: Path, model: Any, in_memory_names: bool = False) -> Path:
    """As transformers saves it: its own names of some keys, one safetensors file."""
    model.save_pretrained(folder, save_original_format=not in_memory_names)
    write_tokenizer(folder, model.config.get_text_config().vocab_size)
    return folder


def publish_cohere2(folder: Path, model: Any, shards: int = 3) -> Path:
    """The same in BF16 and as the Hub has it: keys that transformers drops, a period in place of the list of layers."""
    save_cohere(folder, model)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    write_sharded(folder, {name: tensor.bfloat16() for name, tensor in tensors.items()}, shards)
    edit(
        folder,
        remove=("layer_types", "rope_parameters", "tie_word_embeddings"),
        sliding_window_pattern=4,
        layer_switch=4,
        rope_theta=model.config.rope_parameters["rope_theta"],
        rope_scaling=None,
        head_dim=model.config.head_dim,
        rotary_pct=1.0,
        position_embedding_type="rope_gptj",
        order_of_interleaved_layers="local_attn_first",
        cache_implementation="hybrid",
        use_embedding_sharing=True,
        use_gated_activation=True,
        use_parallel_block=True,
        use_parallel_embedding=False,
        use_qk_norm=False,
    )
    return folder


def pictured(mixture: bool, **overrides: Any) -> Any:
    """As Command A+ is published: the language model beside a tower for pictures."""
    from transformers import Cohere2VisionConfig, Cohere2VisionForConditionalGeneration

    torch.manual_seed(0)
    text = {**(MIXTURE if mixture else DENSE), "model_type": "cohere2_moe" if mixture else "cohere2", **overrides}
    tower = {
        "model_type": "siglip_vision_model",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    config = Cohere2VisionConfig(text_config=text, vision_config=tower, alignment_intermediate_size=64)
    return randomized(Cohere2VisionForConditionalGeneration(config))


def language_model(model: Any) -> Any:
    """The language model of one with pictures, by itself: its logits are scaled, as engines have it."""
    from transformers import Cohere2ForCausalLM, Cohere2MoeForCausalLM

    config = model.config.text_config
    alone = (Cohere2MoeForCausalLM if config.model_type == "cohere2_moe" else Cohere2ForCausalLM)(config)
    alone.model.load_state_dict(model.model.language_model.state_dict())
    alone.tie_weights()
    return alone.float().eval()
