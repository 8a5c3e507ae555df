"""DeepSeek V4: configuration, routers and the published checkpoint format."""

import re
from typing import Any

import torch
from architecture import Router, Sizes
from checkpoint import quantize_fp8_blocks
from mxfp4 import quantize_mxfp4
from tokenizers import AddedToken
from tokenizers.normalizers import Normalizer
from transformers import DeepseekV4Config, DeepseekV4ForCausalLM, PreTrainedModel

# One layer of each kind: hash-routed with a sliding window, 4-fold and 128-fold compressed. Width 96 does not divide
# into FP8 blocks, so that those at the edges are partial.
DEFAULT_SIZES = Sizes(
    layers=3, hidden_size=256, intermediate_size=96, experts=16, experts_per_token=4, vocabulary=1024, context=2048
)
COMPRESSION = (4, 128)
HASH_LAYERS = 1
HEAD_SIZE = 96
ROTARY_SIZE = 32
BLOCK = 128
SHARDS = 5

NORMALIZER: Normalizer | None = None
PRE_TOKENIZER_PATTERNS: tuple[str, ...] = (
    r"\p{N}{1,3}",
    "[一-龥぀-ゟ゠-ヿ]+",
    "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+"
    "| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+",
)
BEGIN_OF_TEXT: str | None = "<｜begin▁of▁sentence｜>"
END_OF_TEXT = "<｜end▁of▁sentence｜>"
FIRST_TOKENS: tuple[AddedToken, ...] = (
    AddedToken(BEGIN_OF_TEXT, special=True),
    AddedToken(END_OF_TEXT, special=True),
    AddedToken("<｜▁pad▁｜>", special=True),
)
LAST_TOKENS: tuple[AddedToken, ...] = (
    AddedToken("<｜User｜>", special=False, normalized=False),
    AddedToken("<｜Assistant｜>", special=False, normalized=False),
    AddedToken("<think>", special=False, normalized=False),
    AddedToken("</think>", special=False, normalized=False),
)
GENERATION_DEFAULTS: dict[str, Any] = {"do_sample": True, "temperature": 1.0, "top_p": 1.0}
CHAT_TEMPLATE: str | None = None

# Names in memory to published names, applied one after the other.
RENAMES = (
    (r"^model\.", ""),
    (r"^embed_tokens\.", "embed."),
    (r"^lm_head\.", "head."),
    (r"^hc_head\.hc_", "hc_head_"),
    (r"\.(attn|ffn)_hc\.", r".hc_\1_"),
    (r"\.self_attn\.", ".attn."),
    (r"\.mlp\.", ".ffn."),
    (r"\.input_layernorm\.", ".attn_norm."),
    (r"\.post_attention_layernorm\.", ".ffn_norm."),
    (r"\.compressor\.indexer\.(kv_proj|gate_proj|kv_norm|position_bias)", r".indexer.compressor.\1"),
    (r"\.compressor\.indexer\.(scorer\.)?", ".indexer."),
    (r"\.compressor\.kv_norm\.", ".compressor.norm."),
    (r"\.position_bias$", ".ape"),
    (r"\.sinks$", ".attn_sink"),
    (r"\.q_a_norm\.", ".q_norm."),
    (r"\.(q_a|q_b|o_a|o_b)_proj\.", r".w\1."),
    (r"\.kv_proj\.", ".wkv."),
    (r"\.shared_experts\.gate_proj\.", ".shared_experts.w1."),
    (r"\.shared_experts\.down_proj\.", ".shared_experts.w2."),
    (r"\.shared_experts\.up_proj\.", ".shared_experts.w3."),
    (r"\.gate_proj\.", ".wgate."),
    (r"\.e_score_correction_bias$", ".bias"),
)
IN_FP8 = re.compile(r"\.attn\.(indexer\.)?w(q_a|q_b|kv|o_a|o_b)\.weight$|\.shared_experts\.w[123]\.weight$")
AS_IT_IS = re.compile(r"hc_|\.(attn_sink|ape|bias|tid2eid)$")


def build(sizes: Sizes) -> PreTrainedModel:
    """A DeepseekV4ForCausalLM in float32.

    Its hash table spreads the tokens over the experts; its hyper-connections begin as almost plain residual ones.
    """
    storage = ("quantization_config", "torch_dtype", "expert_dtype", "topk_method")
    declared: dict[str, Any] = {key: value for key, value in hub_config(sizes).items() if key not in storage}
    model = DeepseekV4ForCausalLM(DeepseekV4Config(**declared))
    generator = torch.Generator().manual_seed(0)
    for layer in model.model.layers:
        for connection in (layer.attn_hc, layer.ffn_hc):
            torch.nn.init.constant_(connection.scale, 0.1)
    for layer in model.model.layers[:HASH_LAYERS]:
        table = layer.mlp.gate.tid2eid
        table.copy_(torch.rand(len(table), sizes.experts, generator=generator).argsort(dim=1)[:, : table.shape[1]])
    return model


def routers(model: PreTrainedModel) -> list[Router]:
    """One router a layer, but for the layers that look experts up; its output is (logits, weights, expert indices)."""
    gates = [layer.mlp.gate for layer in model.model.layers[HASH_LAYERS:]]
    return [Router(gate, gate.e_score_correction_bias, 2) for gate in gates]


def hub_config(sizes: Sizes) -> dict[str, Any]:
    """The keys of DeepSeek-V4-Flash's config.json; no layers for multi-token prediction are shipped."""
    return {
        "architectures": ["DeepseekV4ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "expert_dtype": "fp4",
        "hc_eps": 1e-06,
        "hc_mult": 4,
        "hc_sinkhorn_iters": 20,
        "head_dim": HEAD_SIZE,
        "hidden_act": "silu",
        "hidden_size": sizes.hidden_size,
        "index_head_dim": 64,
        "index_n_heads": 8,
        "index_topk": 32,
        "initializer_range": 0.02,
        "max_position_embeddings": sizes.context,
        "model_type": "deepseek_v4",
        "moe_intermediate_size": sizes.intermediate_size,
        "n_routed_experts": sizes.experts,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "num_attention_heads": 4,
        "num_experts_per_tok": sizes.experts_per_token,
        "num_hidden_layers": sizes.layers,
        "num_hash_layers": HASH_LAYERS,
        "num_key_value_heads": 1,
        "num_nextn_predict_layers": 0,
        "o_groups": 2,
        "o_lora_rank": sizes.hidden_size // 4,
        "q_lora_rank": sizes.hidden_size // 2,
        "qk_rope_head_dim": ROTARY_SIZE,
        "quantization_config": {
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "quant_method": "fp8",
            "scale_fmt": "ue8m0",
            "weight_block_size": [BLOCK, BLOCK],
        },
        "rms_norm_eps": 1e-06,
        "rope_scaling": {
            "beta_fast": 32,
            "beta_slow": 1,
            "factor": 4,
            "original_max_position_embeddings": sizes.context // 4,
            "type": "yarn",
        },
        "rope_theta": 10000,
        "routed_scaling_factor": 1.5,
        "scoring_func": "sqrtsoftplus",
        "sliding_window": 64,
        "swiglu_limit": 10.0,
        "tie_word_embeddings": False,
        "topk_method": "noaux_tc",
        "torch_dtype": "bfloat16",
        "transformers_version": "4.57.1",
        "use_cache": True,
        "vocab_size": sizes.vocabulary,
        "compress_rope_theta": 160000,
        "compress_ratios": [0, *(COMPRESSION * sizes.layers)[: sizes.layers - 1]],
    }


def hub_tensors(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Experts in MXFP4, other linears in FP8, hyper-connections, sinks and biases in float32, BF16 for the rest."""
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict().items():
        for pattern, replacement in RENAMES:
            name = re.sub(pattern, replacement, name)
        prefix, is_stack, projection = name.partition(".experts.")
        if is_stack:
            for expert, matrix in enumerate(tensor):
                parts = dict(zip(("w1", "w3"), matrix.chunk(2), strict=True)) if "up" in projection else {"w2": matrix}
                for part, weight in parts.items():
                    module = f"{prefix}.experts.{expert}.{part}"
                    tensors[f"{module}.weight"], tensors[f"{module}.scale"] = quantize_mxfp4(weight)
        elif IN_FP8.search(name):
            tensors[name], scale = quantize_fp8_blocks(tensor, BLOCK, power_of_two=True)
            tensors[name.removesuffix("weight") + "scale"] = scale.to(torch.float8_e8m0fnu)
        else:
            tensors[name] = tensor if AS_IT_IS.search(name) else tensor.to(torch.bfloat16)
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def shard_name(number: int, shards: int) -> str:
    """As transformers names them."""
    return f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
