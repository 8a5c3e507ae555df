"""MiniMax M2: configuration, routers and the published checkpoint format."""

from pathlib import Path
from typing import Any

import torch
from architecture import Router, Sizes
from checkpoint import quantize_fp8_blocks
from tokenizers import AddedToken
from tokenizers.normalizers import Normalizer
from transformers import MiniMaxM2Config, MiniMaxM2ForCausalLM, PreTrainedModel

# Every matrix of a published checkpoint divides into 128x128 blocks without remainder; hidden 256, query width 384 (a
# width of its own, as in the real models) and key width 128 do too.
DEFAULT_SIZES = Sizes(
    layers=2, hidden_size=256, intermediate_size=128, experts=16, experts_per_token=4, vocabulary=1024, context=2048
)
HEAD_SIZE = 64
KEY_VALUE_HEADS = 2
ROTARY_SIZE = HEAD_SIZE // 2
ROPE_THETA = 5_000_000
BLOCK = 128
SHARDS = 4

NORMALIZER: Normalizer | None = None
PRE_TOKENIZER_PATTERNS: tuple[str, ...] = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
BEGIN_OF_TEXT: str | None = "]~!b["
END_OF_TEXT = "[e~["
FIRST_TOKENS: tuple[AddedToken, ...] = ()
LAST_TOKENS: tuple[AddedToken, ...] = (
    AddedToken("]!p~[", special=True),
    AddedToken("]~b]", special=True),
    AddedToken(END_OF_TEXT, special=True),
    AddedToken(BEGIN_OF_TEXT, special=True),
    AddedToken("<think>", special=False),
    AddedToken("</think>", special=False),
)
GENERATION_DEFAULTS: dict[str, Any] = {"do_sample": True, "temperature": 1.0, "top_k": 40, "top_p": 0.95}
CHAT_TEMPLATE: str | None = Path(__file__).with_suffix(".jinja").read_text(encoding="utf-8")


def query_heads(sizes: Sizes) -> int:
    """Half as many again as would fill the hidden size, in whole groups of key-value heads."""
    return max(1, sizes.hidden_size * 3 // (2 * HEAD_SIZE * KEY_VALUE_HEADS)) * KEY_VALUE_HEADS


def build(sizes: Sizes) -> PreTrainedModel:
    """A MiniMaxM2ForCausalLM in float32."""
    storage = ("auto_map", "dtype", "quantization_config")
    declared: dict[str, Any] = {key: value for key, value in hub_config(sizes).items() if key not in storage}
    config = MiniMaxM2Config(**declared, bos_token_id=None, eos_token_id=None)
    return MiniMaxM2ForCausalLM(config)


def routers(model: PreTrainedModel) -> list[Router]:
    """One router a layer; its output is (logits, weights, expert indices)."""
    return [Router(layer.mlp.gate, layer.mlp.e_score_correction_bias, 2) for layer in model.model.layers]


def hub_config(sizes: Sizes) -> dict[str, Any]:
    """The keys of MiniMax-M2.7's config.json: MTP is declared but not shipped, special tokens are not named."""
    return {
        "architectures": ["MiniMaxM2ForCausalLM"],
        "attn_type_list": [1] * sizes.layers,
        "auto_map": {
            "AutoConfig": "configuration_minimax_m2.MiniMaxM2Config",
            "AutoModelForCausalLM": "modeling_minimax_m2.MiniMaxM2ForCausalLM",
        },
        "dtype": "bfloat16",
        "head_dim": HEAD_SIZE,
        "hidden_act": "silu",
        "hidden_size": sizes.hidden_size,
        "intermediate_size": sizes.intermediate_size,
        "max_position_embeddings": sizes.context,
        "model_type": "minimax_m2",
        "mtp_transformer_layers": 1,
        "num_attention_heads": query_heads(sizes),
        "num_experts_per_tok": sizes.experts_per_token,
        "num_hidden_layers": sizes.layers,
        "num_key_value_heads": KEY_VALUE_HEADS,
        "num_local_experts": sizes.experts,
        "num_mtp_modules": 3,
        "qk_norm_type": "per_layer",
        "quantization_config": {
            "activation_scheme": "dynamic",
            "fmt": "float8_e4m3fn",
            "quant_method": "fp8",
            "weight_block_size": [BLOCK, BLOCK],
            "modules_to_not_convert": ["gate", "e_score_correction_bias", "lm_head"],
        },
        "rms_norm_eps": 1e-06,
        "rope_theta": ROPE_THETA,
        "rotary_dim": ROTARY_SIZE,
        "scoring_func": "sigmoid",
        "shared_intermediate_size": 0,
        "tie_word_embeddings": False,
        "transformers_version": "4.46.1",
        "use_cache": True,
        "use_mtp": True,
        "use_qk_norm": True,
        "use_routing_bias": True,
        "vocab_size": sizes.vocabulary,
    }


def hub_tensors(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """FP8 linears with float32 block scales, float32 routers, BF16 for the rest."""
    tensors = {"model.embed_tokens.weight": model.model.embed_tokens.weight.to(torch.bfloat16)}
    for number, layer in enumerate(model.model.layers):
        for name, tensor in _layer_tensors(layer).items():
            tensors[f"model.layers.{number}.{name}"] = tensor
    tensors["model.norm.weight"] = model.model.norm.weight.to(torch.bfloat16)
    tensors["lm_head.weight"] = model.lm_head.weight.to(torch.bfloat16)
    return {name: tensor.detach().contiguous() for name, tensor in tensors.items()}


def _layer_tensors(layer: Any) -> dict[str, torch.Tensor]:
    attention, moe = layer.self_attn, layer.mlp
    linears = {f"self_attn.{name}": attention.get_submodule(name).weight for name in ("q_proj", "k_proj", "v_proj")}
    linears["self_attn.o_proj"] = attention.o_proj.weight
    for expert, (gate_up, down) in enumerate(zip(moe.experts.gate_up_proj, moe.experts.down_proj, strict=True)):
        gate, up = gate_up.chunk(2)
        prefix = f"block_sparse_moe.experts.{expert}"
        linears |= {f"{prefix}.w1": gate, f"{prefix}.w2": down, f"{prefix}.w3": up}
    norms = {
        "input_layernorm": layer.input_layernorm,
        "post_attention_layernorm": layer.post_attention_layernorm,
        "self_attn.q_norm": attention.q_norm,
        "self_attn.k_norm": attention.k_norm,
    }
    tensors = {f"{name}.weight": norm.weight.to(torch.bfloat16) for name, norm in norms.items()}
    tensors["block_sparse_moe.gate.weight"] = moe.gate.weight
    tensors["block_sparse_moe.e_score_correction_bias"] = moe.e_score_correction_bias
    for name, weight in linears.items():
        tensors[f"{name}.weight"], tensors[f"{name}.weight_scale_inv"] = quantize_fp8_blocks(weight, BLOCK)
    return tensors


def shard_name(number: int, shards: int) -> str:
    """Counted from zero and with a total too high, as MiniMax publishes them."""
    return f"model-{number:05d}-of-{shards + 2:05d}.safetensors"
