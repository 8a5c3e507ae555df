"""Qwen3.5 and 3.6 with experts: configuration, routers and the published checkpoint format."""

from pathlib import Path
from typing import Any

import torch
from architecture import Router, Sizes
from tokenizers import AddedToken
from tokenizers.normalizers import NFC, Normalizer
from transformers import PreTrainedModel, Qwen3_5MoeForCausalLM, Qwen3_5MoeTextConfig

# Three layers of Gated DeltaNet and one of attention. Experts as narrow as blocks of 32 allow, and few tokens, leave
# room for a hidden size of 256.
DEFAULT_SIZES = Sizes(
    layers=4, hidden_size=256, intermediate_size=32, experts=16, experts_per_token=4, vocabulary=512, context=2048
)
INTERVAL = 4
HEAD_SIZE = 32  # of both kinds of layers
DECAYS = (1.0, 16.0)
STEPS = (0.001, 0.1)
FLOAT32 = ("linear_attn.A_log", "linear_attn.norm.weight")
SHARDS = 3

NORMALIZER: Normalizer | None = NFC()
PRE_TOKENIZER_PATTERNS: tuple[str, ...] = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
BEGIN_OF_TEXT: str | None = None
END_OF_TEXT = "<|endoftext|>"
FIRST_TOKENS: tuple[AddedToken, ...] = ()
LAST_TOKENS: tuple[AddedToken, ...] = (
    AddedToken(END_OF_TEXT, special=True),
    AddedToken("<|im_start|>", special=True),
    AddedToken("<|im_end|>", special=True),
    AddedToken("<|vision_start|>", special=True),
    AddedToken("<|vision_end|>", special=True),
    AddedToken("<|image_pad|>", special=True),
    AddedToken("<|video_pad|>", special=True),
    AddedToken("<think>", special=False),
    AddedToken("</think>", special=False),
)
GENERATION_DEFAULTS: dict[str, Any] = {"do_sample": True, "temperature": 1.0, "top_k": 20, "top_p": 0.95}
CHAT_TEMPLATE: str | None = Path(__file__).with_suffix(".jinja").read_text(encoding="utf-8")


def build(sizes: Sizes) -> PreTrainedModel:
    """A Qwen3_5MoeForCausalLM in float32 whose heads forget at speeds from a token or two to a thousand."""
    storage = ("dtype", "attn_output_gate", "mamba_ssm_dtype", "mlp_only_layers", "full_attention_interval")
    declared: dict[str, Any] = {
        key: value
        for key, value in hub_config(sizes)["text_config"].items()
        if key not in storage and not key.startswith("mtp_")
    }
    model = Qwen3_5MoeForCausalLM(Qwen3_5MoeTextConfig(**declared))
    smallest, largest = (torch.tensor(bound).log() for bound in STEPS)
    with torch.no_grad():
        for layer in model.model.layers:
            if hasattr(layer, "linear_attn"):  # the library draws decays at random, without a seed
                heads = len(layer.linear_attn.dt_bias)
                layer.linear_attn.dt_bias.copy_(torch.linspace(smallest, largest, heads).exp().expm1().log())
                layer.linear_attn.A_log.copy_(torch.linspace(*DECAYS, heads).log())
    return model


def routers(model: PreTrainedModel) -> list[Router]:
    """One router a layer; its output is (logits, weights, expert indices)."""
    return [Router(layer.mlp.gate, None, 2) for layer in model.model.layers]


def hub_config(sizes: Sizes) -> dict[str, Any]:
    """The keys of Qwen3.5-35B-A3B's config.json: a vision tower and a block for drafting are declared, not shipped."""
    added = {token.content: sizes.vocabulary - len(LAST_TOKENS) + n for n, token in enumerate(LAST_TOKENS)}
    return {
        "architectures": ["Qwen3_5MoeForConditionalGeneration"],
        "image_token_id": added["<|image_pad|>"],
        "model_type": "qwen3_5_moe",
        "text_config": _text_config(sizes, added[END_OF_TEXT]),
        "tie_word_embeddings": False,
        "transformers_version": "4.57.0.dev0",
        "video_token_id": added["<|video_pad|>"],
        "vision_config": {
            "deepstack_visual_indexes": [],
            "depth": 1,
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_size": 64,
            "in_channels": 3,
            "initializer_range": 0.02,
            "intermediate_size": 128,
            "model_type": "qwen3_5_moe",
            "num_heads": 2,
            "num_position_embeddings": 64,
            "out_hidden_size": sizes.hidden_size,
            "patch_size": 16,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
        "vision_end_token_id": added["<|vision_end|>"],
        "vision_start_token_id": added["<|vision_start|>"],
    }


def _text_config(sizes: Sizes, end_of_text: int) -> dict[str, Any]:
    return {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attn_output_gate": True,
        "dtype": "bfloat16",
        "eos_token_id": end_of_text,
        "full_attention_interval": INTERVAL,
        "head_dim": HEAD_SIZE,
        "hidden_act": "silu",
        "hidden_size": sizes.hidden_size,
        "initializer_range": 0.02,
        "layer_types": [
            "linear_attention" if (layer + 1) % INTERVAL else "full_attention" for layer in range(sizes.layers)
        ],
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": HEAD_SIZE,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_value_head_dim": HEAD_SIZE,
        "max_position_embeddings": sizes.context,
        "mlp_only_layers": [],
        "model_type": "qwen3_5_moe_text",
        "moe_intermediate_size": sizes.intermediate_size,
        "mtp_num_hidden_layers": 1,
        "mtp_use_dedicated_embeddings": False,
        "num_attention_heads": 4,
        "num_experts": sizes.experts,
        "num_experts_per_tok": sizes.experts_per_token,
        "num_hidden_layers": sizes.layers,
        "num_key_value_heads": 1,
        "rms_norm_eps": 1e-06,
        "router_aux_loss_coef": 0.001,
        "shared_expert_intermediate_size": sizes.intermediate_size,
        "use_cache": True,
        "vocab_size": sizes.vocabulary,
        "mamba_ssm_dtype": "float32",
        "rope_parameters": {
            "mrope_interleaved": True,
            "mrope_section": [2, 1, 1],
            "rope_type": "default",
            "rope_theta": 10000000,
            "partial_rotary_factor": 0.25,
        },
    }


def hub_tensors(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """BF16, but for decays and the norms of heads in float32; a tensor for all experts of a layer."""
    return {
        name.replace("model.", "model.language_model.", 1): tensor if name.endswith(FLOAT32) else tensor.bfloat16()
        for name, tensor in model.state_dict().items()
    }


def shard_name(number: int, shards: int) -> str:
    """As Qwen publishes them."""
    return f"model.safetensors-{number + 1:05d}-of-{shards:05d}.safetensors"
