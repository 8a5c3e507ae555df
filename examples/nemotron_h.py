"""Nemotron 3: configuration, routers and the published checkpoint format."""

from pathlib import Path
from typing import Any

import torch
from architecture import Router, Sizes
from tokenizers import AddedToken
from tokenizers.normalizers import Normalizer
from transformers import NemotronHConfig, NemotronHForCausalLM, PreTrainedModel

# The experts' width 160 and the latent width 64 do not divide into blocks of 256, as 2688 and 1856 of Nano do not.
DEFAULT_SIZES = Sizes(
    layers=5, hidden_size=256, intermediate_size=160, experts=16, experts_per_token=4, vocabulary=1024, context=2048
)
PATTERN = "MEM*E"
MAMBA_HEAD_SIZE = 64
ATTENTION_HEAD_SIZE = 32
STEP_RANGE = (0.001, 0.1)
SHARDS = 3

NORMALIZER: Normalizer | None = None
PRE_TOKENIZER_PATTERNS: tuple[str, ...] = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
BEGIN_OF_TEXT: str | None = "<s>"
END_OF_TEXT = "</s>"
FIRST_TOKENS: tuple[AddedToken, ...] = (
    AddedToken("<unk>", special=True),
    AddedToken(BEGIN_OF_TEXT, special=True),
    AddedToken(END_OF_TEXT, special=True),
    AddedToken("<|im_start|>", special=True),
    AddedToken("<|im_end|>", special=True),
    AddedToken("<think>", special=False),
    AddedToken("</think>", special=False),
)
LAST_TOKENS: tuple[AddedToken, ...] = ()
GENERATION_DEFAULTS: dict[str, Any] = {"do_sample": True, "eos_token_id": [2, 4], "pad_token_id": 0}
CHAT_TEMPLATE: str | None = Path(__file__).with_suffix(".jinja").read_text(encoding="utf-8")


def build(sizes: Sizes) -> PreTrainedModel:
    """A NemotronHForCausalLM in float32 that does not clamp the state-space step, as the original does not."""
    storage = ("auto_map", "torch_dtype", "num_hidden_layers", "use_mamba_kernels")
    declared: dict[str, Any] = {key: value for key, value in hub_config(sizes).items() if key not in storage}
    model = NemotronHForCausalLM(NemotronHConfig(**declared | {"time_step_min": 1e-30}))
    smallest, largest = (torch.tensor(bound).log() for bound in STEP_RANGE)
    with torch.no_grad():
        for kind, layer in zip(_pattern(sizes), model.model.layers, strict=True):
            if kind == "M":  # the library draws these at random, without a seed
                steps = torch.linspace(smallest, largest, len(layer.mixer.dt_bias)).exp()
                layer.mixer.dt_bias.copy_(steps.expm1().log())
    return model


def routers(model: PreTrainedModel) -> list[Router]:
    """One router per mixture-of-experts layer; its output is (logits, weights, expert indices)."""
    gates = [layer.mixer.gate for layer in model.model.layers if hasattr(layer.mixer, "gate")]
    return [Router(gate, gate.e_score_correction_bias, 2) for gate in gates]


def hub_config(sizes: Sizes) -> dict[str, Any]:
    """The keys of Nemotron-3-Nano's config.json, and of Super's for the latent projections."""
    pattern = _pattern(sizes)
    return {
        "architectures": ["NemotronHForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "auto_map": {
            "AutoConfig": "configuration_nemotron_h.NemotronHConfig",
            "AutoModel": "modeling_nemotron_h.NemotronHForCausalLM",
            "AutoModelForCausalLM": "modeling_nemotron_h.NemotronHForCausalLM",
        },
        "bos_token_id": 1,
        "chunk_size": 64,
        "conv_kernel": 4,
        "eos_token_id": 2,
        "expand": 2,
        "head_dim": ATTENTION_HEAD_SIZE,
        "hidden_dropout": 0.0,
        "hidden_size": sizes.hidden_size,
        "hybrid_override_pattern": pattern,
        "initializer_range": 0.02,
        "intermediate_size": sizes.intermediate_size,
        "layer_norm_epsilon": 1e-05,
        "mamba_head_dim": MAMBA_HEAD_SIZE,
        "mamba_hidden_act": "silu",
        "mamba_num_heads": 2 * sizes.hidden_size // MAMBA_HEAD_SIZE,
        "mamba_proj_bias": False,
        "mamba_ssm_cache_dtype": "float32",
        "max_position_embeddings": sizes.context,
        "mlp_bias": False,
        "mlp_hidden_act": "relu2",
        "model_type": "nemotron_h",
        "moe_intermediate_size": sizes.intermediate_size,
        "moe_latent_size": sizes.hidden_size // 4,
        "moe_shared_expert_intermediate_size": sizes.hidden_size // 4,
        "n_group": 1,
        "n_groups": 2,
        "n_routed_experts": sizes.experts,
        "n_shared_experts": 1,
        "norm_eps": 1e-05,
        "norm_topk_prob": True,
        "num_attention_heads": sizes.hidden_size // ATTENTION_HEAD_SIZE,
        "num_experts_per_tok": sizes.experts_per_token,
        "num_hidden_layers": len(pattern),
        "num_key_value_heads": 2,
        "num_logits_to_keep": 1,
        "pad_token_id": 0,
        "partial_rotary_factor": 1.0,
        "rescale_prenorm_residual": True,
        "residual_in_fp32": False,
        "rope_theta": 10000,
        "routed_scaling_factor": 2.5,
        "sliding_window": None,
        "ssm_state_size": 64,
        "tie_word_embeddings": False,
        "time_step_floor": 0.0001,
        "time_step_max": STEP_RANGE[1],
        "time_step_min": STEP_RANGE[0],
        "topk_group": 1,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.53.2",
        "use_bias": False,
        "use_cache": True,
        "use_conv_bias": True,
        "use_mamba_kernels": True,
        "vocab_size": sizes.vocabulary,
    }


def hub_tensors(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """BF16, but for the routers and their biases in float32; a matrix for each expert."""
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict().items():
        hub_name = name.replace("model.", "backbone.", 1)
        stored = tensor if ".gate." in name else tensor.to(torch.bfloat16)
        module, is_stack, projection = hub_name.partition(".experts.")
        if is_stack:
            for expert, matrix in enumerate(stored):
                tensors[f"{module}.experts.{expert}.{projection}.weight"] = matrix.clone()
        else:
            tensors[hub_name] = stored
    return tensors


def shard_name(number: int, shards: int) -> str:
    """As transformers names them."""
    return f"model-{number + 1:05d}-of-{shards:05d}.safetensors"


def _pattern(sizes: Sizes) -> str:
    return (PATTERN * sizes.layers)[: sizes.layers]
