"""Nemotron 3 and Nemotron-H: Mamba-2, attention without positions, and ReLU-squared experts, one operation a layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

from ..errors import BadInput
from .catalogue import Catalogue
from .config import Config
from .graph import MLP, Attention, Graph, Layer, Mamba2, MoE, Router
from .nemotron_h_blocks import (
    ATTENTION,
    DENSE_LAYER,
    DENSE_NAME,
    EXPERTS,
    MAMBA,
    MIXTURE_NAME,
    Dimensions,
    Source,
    build,
)
from .registry import Architecture
from .weights import Expression, NegativeExponential, Reshape, Stack, TensorInfo, Zeros

# Three spellings of the layer list: these letters, NVIDIA's words, transformers' words.
_KINDS = {
    **{letter: letter for letter in (MAMBA, ATTENTION, EXPERTS, DENSE_LAYER)},
    "mamba": MAMBA,
    "attention": ATTENTION,
    "moe": EXPERTS,
    "mlp": DENSE_LAYER,
    "linear_attention": MAMBA,
    "full_attention": ATTENTION,
}

# GGUF name -> module or tensor of the checkpoint.
_GLOBAL_NAMES = {"token_embd.weight": "embeddings", "output_norm.weight": "norm_f"}
_ATTENTION_NAMES = {
    "attn_norm.weight": "norm",
    "attn_q.weight": "mixer.q_proj",
    "attn_k.weight": "mixer.k_proj",
    "attn_v.weight": "mixer.v_proj",
    "attn_output.weight": "mixer.o_proj",
}
_EXPERTS_NAMES = {
    "ffn_gate_inp.weight": "mixer.gate",
    "exp_probs_b.bias": "mixer.gate.e_score_correction_bias",
    "ffn_latent_down.weight": "mixer.fc1_latent_proj",
    "ffn_latent_up.weight": "mixer.fc2_latent_proj",
    "ffn_up_exps.weight": "mixer.experts.{}.up_proj",
    "ffn_down_exps.weight": "mixer.experts.{}.down_proj",
    "ffn_up_shexp.weight": "mixer.shared_experts.up_proj",
    "ffn_down_shexp.weight": "mixer.shared_experts.down_proj",
}
_LAYER_NAMES = {
    **_ATTENTION_NAMES,
    **_EXPERTS_NAMES,
    "ssm_in.weight": "mixer.in_proj",
    "ssm_out.weight": "mixer.out_proj",
    "ssm_conv1d.weight": "mixer.conv1d.weight",
    "ssm_conv1d.bias": "mixer.conv1d.bias",
    "ssm_dt.bias": "mixer.dt_bias",
    "ssm_a": "mixer.A_log",
    "ssm_d": "mixer.D",
    "ssm_norm.weight": "mixer.norm.weight",
    "ffn_up.weight": "mixer.up_proj",
    "ffn_down.weight": "mixer.down_proj",
}
_RESHAPED = ("ssm_conv1d.weight", "ssm_a", "ssm_d", "ssm_norm.weight")
# The drafting block: attention and experts are two layers of the checkpoint and one of the GGUF file.
_PREDICTION_NAMES = {
    "nextn.enorm.weight": "mtp.layers.0.enorm",
    "nextn.hnorm.weight": "mtp.layers.0.hnorm",
    "nextn.eh_proj.weight": "mtp.layers.0.eh_proj",
    **{kind: f"mtp.layers.0.{module}" for kind, module in _ATTENTION_NAMES.items()},
    "post_attention_norm.weight": "mtp.layers.1.norm",
    **{kind: f"mtp.layers.1.{module}" for kind, module in _EXPERTS_NAMES.items()},
    "nextn.shared_head_norm.weight": "mtp.layers.1.final_layernorm",
}


def _from_checkpoint(config: Config, tensors: Sequence[TensorInfo]) -> Graph:
    catalogue = Catalogue(tensors, config.origin)
    dimensions = _read_config(config, drafts="mtp.layers.0.eh_proj.weight" in catalogue)
    tied = config.flag("tie_word_embeddings", default=False)
    graph = build(dimensions, _checkpoint_source(catalogue, dimensions, tied))
    catalogue.finish()
    return graph


def _read_config(config: Config, drafts: bool) -> Dimensions:
    _expect_implemented(config)
    kinds = _layer_kinds(config, "hybrid_override_pattern", "layers_block_type", "layer_types")
    layers = config.integer("num_hidden_layers", default=len(kinds))
    if layers != len(kinds):
        raise BadInput(f"{config.origin}: num_hidden_layers is {layers}, but the list of layers has {len(kinds)}")
    if drafts:
        drafting = _layer_kinds(config, "mtp_hybrid_override_pattern", "mtp_layers_block_type")
        if drafting != ATTENTION + EXPERTS:
            raise BadInput(
                f"{config.origin}: the drafting block has layers {drafting!r}, expected {ATTENTION + EXPERTS!r}"
            )
    routed = drafts or EXPERTS in kinds

    def if_routed(*keys: str, default: int | None = None) -> int:
        return (config.integer(*keys) if default is None else config.integer(*keys, default=default)) if routed else 0

    dimensions = Dimensions(
        vocabulary=config.integer("vocab_size"),
        hidden=config.integer("hidden_size"),
        kinds=kinds,
        heads=config.integer("num_attention_heads"),
        key_value_heads=config.integer("num_key_value_heads"),
        head_size=config.integer("head_dim", "attention_head_dim"),
        mamba_heads=config.integer("mamba_num_heads"),
        mamba_head_size=config.integer("mamba_head_dim"),
        mamba_groups=config.integer("n_groups", "mamba_n_groups"),
        mamba_state=config.integer("ssm_state_size"),
        kernel=config.integer("conv_kernel", "mamba_d_conv", default=4),
        dense_size=config.integer("intermediate_size") if DENSE_LAYER in kinds else 0,
        experts=if_routed("n_routed_experts"),
        top_k=if_routed("num_experts_per_tok"),
        expert_size=if_routed("moe_intermediate_size"),
        shared_size=if_routed("moe_shared_expert_intermediate_size"),
        latent=if_routed("moe_latent_size") if "moe_latent_size" in config else 0,
        router_groups=if_routed("n_group", default=1),
        router_groups_used=if_routed("topk_group", default=1),
        router_scale=config.number("routed_scaling_factor", default=1.0),
        epsilon=config.number("layer_norm_epsilon", "norm_eps", "rms_norm_eps", default=1e-5),
        context=config.integer("max_position_embeddings"),
        drafts=drafts,
    )
    _check(dimensions, config.origin)
    return dimensions


def _expect_implemented(config: Config) -> None:
    config.expect("mlp_hidden_act", "relu2")
    config.expect("mamba_hidden_act", "silu")
    config.expect("norm_topk_prob", True)
    config.expect("n_shared_experts", 1)
    config.expect("sliding_window")
    for bias in ("attention_bias", "mlp_bias", "use_bias", "mamba_proj_bias"):
        config.expect(bias, False)
    config.expect("time_step_limit", [0.0, float("inf")], [0.0, 1e308], [0.0, {"__float__": "Infinity"}])  # no limit


def _layer_kinds(config: Config, *keys: str) -> str:
    """The list of layers under the first of `keys` that is present, as one letter a layer."""
    key = next((key for key in keys if key in config), None)
    if key is None:
        raise BadInput(f"{config.origin}: {' or '.join(keys)} is missing, expected the kinds of all layers")
    value = config.get(key)
    unknown = [kind for kind in value if kind not in _KINDS] if isinstance(value, str | list) else [value]
    if unknown or not value:
        raise BadInput(f"{config.origin}: {key} holds {unknown[:1]}, expected a list of {', '.join(_KINDS)}")
    return "".join(_KINDS[kind] for kind in value)


def _check(d: Dimensions, origin: str) -> None:
    if MAMBA not in d.kinds or ATTENTION not in d.kinds:
        raise BadInput(f"{origin}: layers are {d.kinds}, expected Mamba-2 (M) and attention (*) among them")
    if d.heads % d.key_value_heads:
        raise BadInput(f"{origin}: {d.heads} attention heads are not a multiple of {d.key_value_heads} key-value heads")
    if d.mamba_heads % d.mamba_groups:
        raise BadInput(
            f"{origin}: mamba_num_heads is {d.mamba_heads}, expected a multiple of n_groups ({d.mamba_groups})"
        )
    if not d.experts:
        return
    if d.experts % d.router_groups or not d.router_groups_used <= d.router_groups:
        raise BadInput(
            f"{origin}: n_group is {d.router_groups} and topk_group {d.router_groups_used}, expected groups that "
            f"divide the {d.experts} experts"
        )
    if d.router_groups > 1 and d.experts < 2 * d.router_groups:
        raise BadInput(f"{origin}: n_group is {d.router_groups}, expected groups of at least two experts")
    if d.top_k > d.experts // d.router_groups * d.router_groups_used:
        raise BadInput(f"{origin}: num_experts_per_tok is {d.top_k}, expected at most the experts it may choose from")


def _checkpoint_source(catalogue: Catalogue, d: Dimensions, tied: bool) -> Source:
    """Finds a weight under the Hub's names (also what transformers saves) or under its in-memory, fused names."""
    root = "model" if "model.embeddings.weight" in catalogue else "backbone"

    @cache
    def embedding() -> Expression:
        return catalogue.matrix(f"{root}.embeddings")

    def find(name: str, shape: tuple[int, ...]) -> Expression:
        if name == "token_embd.weight" or (name == "output.weight" and tied and "lm_head.weight" not in catalogue):
            return embedding()
        if name == "output.weight":
            return catalogue.matrix("lm_head")
        if name in _GLOBAL_NAMES:
            return catalogue.matrix(f"{root}.{_GLOBAL_NAMES[name]}")
        _, layer, kind = name.split(".", 2)
        if int(layer) == len(d.kinds):
            module = _PREDICTION_NAMES[kind]
        else:
            module = f"{root}.layers.{layer}.{_LAYER_NAMES[kind]}"
        if kind.endswith("_exps.weight"):
            return experts(module)
        if kind == "ssm_conv1d.bias" and module not in catalogue:
            return Zeros(shape)  # llama.cpp adds it without asking
        if kind in _RESHAPED:
            values = Reshape(catalogue.plain(module).tensor, shape)
            return NegativeExponential(values) if kind == "ssm_a" else values
        return catalogue.plain(module) if kind.endswith(".bias") else catalogue.matrix(module)

    def experts(module: str) -> Expression:
        fused = module.replace(".{}", "")
        if fused in catalogue:
            return catalogue.plain(fused)
        return Stack(tuple(catalogue.matrix(module.format(expert)) for expert in range(d.experts)))

    return find


def _from_gguf(metadata: Config, tensors: Sequence[TensorInfo]) -> Graph:
    prefix = metadata.text("general.architecture")
    catalogue = Catalogue(tensors, metadata.origin)
    embedding = next((tensor for tensor in tensors if tensor.name == "token_embd.weight"), None)
    if embedding is None:
        raise BadInput(f"{metadata.origin}: tensor token_embd.weight is missing, the file is incomplete")

    def integer(key: str, default: int | None = None) -> int:
        name = f"{prefix}.{key}"
        return metadata.integer(name) if default is None or name in metadata else default

    blocks, drafts = integer("block_count"), integer("nextn_predict_layers", 0)
    if drafts > 1:
        raise BadInput(f"{metadata.origin}: {prefix}.nextn_predict_layers is {drafts}, expected at most 1")
    key_value_heads = metadata.integers(f"{prefix}.attention.head_count_kv", blocks)
    widths = metadata.integers(f"{prefix}.feed_forward_length", blocks)
    feed_forward = EXPERTS if prefix == MIXTURE_NAME else DENSE_LAYER
    mamba_heads = integer("ssm.time_step_rank")
    dimensions = Dimensions(
        vocabulary=embedding.shape[0],
        hidden=integer("embedding_length"),
        kinds="".join(
            ATTENTION if heads and not width else feed_forward if width else MAMBA
            for heads, width in zip(key_value_heads[: blocks - drafts], widths, strict=False)
        ),
        heads=integer("attention.head_count"),
        key_value_heads=max(key_value_heads),
        head_size=integer("attention.key_length"),
        mamba_heads=mamba_heads,
        mamba_head_size=integer("ssm.inner_size") // mamba_heads,
        mamba_groups=integer("ssm.group_count"),
        mamba_state=integer("ssm.state_size"),
        kernel=integer("ssm.conv_kernel"),
        dense_size=max(widths),
        experts=integer("expert_count", 0),
        top_k=integer("expert_used_count", 0),
        expert_size=integer("expert_feed_forward_length", 0),
        shared_size=integer("expert_shared_feed_forward_length", 0),
        latent=integer("moe_latent_size", 0),
        router_groups=integer("expert_group_count", 1),
        router_groups_used=integer("expert_group_used_count", 1),
        router_scale=metadata.number(f"{prefix}.expert_weights_scale", default=1.0),
        epsilon=metadata.number(f"{prefix}.attention.layer_norm_epsilon"),
        context=integer("context_length"),
        drafts=bool(drafts),
    )
    _check(dimensions, metadata.origin)
    head = "output.weight" if "output.weight" in catalogue else "token_embd.weight"
    stored = cache(catalogue.stored)
    graph = build(dimensions, lambda name, shape: stored(head if name == "output.weight" else name))
    catalogue.finish()
    return graph


def _gguf_metadata(graph: Graph) -> dict[str, Any]:
    layers = [*graph.layers, *(prediction.layer for prediction in graph.predictions)]
    operations = [operation for layer in layers for operation in layer.operations]
    mamba = next(operation for operation in operations if isinstance(operation, Mamba2))
    attention = next(operation for operation in operations if isinstance(operation, Attention))
    experts = next((operation for operation in operations if isinstance(operation, MoE)), None)
    if experts and any(isinstance(operation, MLP) for operation in operations):
        raise BadInput("this model has dense layers beside layers of experts, which llama.cpp cannot run")
    values = {
        "context_length": graph.context_length,
        "embedding_length": graph.hidden_size,
        "block_count": len(layers),
        "feed_forward_length": [_feed_forward_width(layer) for layer in layers],
        "attention.head_count": attention.heads,
        "attention.head_count_kv": [_key_value_heads(layer) for layer in layers],
        "attention.key_length": attention.head_size,
        "attention.value_length": attention.head_size,
        "attention.layer_norm_epsilon": graph.final_norm.epsilon,
        "attention.layer_norm_rms_epsilon": graph.final_norm.epsilon,
        "ssm.conv_kernel": mamba.convolution.columns,
        "ssm.inner_size": mamba.inner_size,
        "ssm.state_size": mamba.state_size,
        "ssm.time_step_rank": mamba.heads,
        "ssm.group_count": mamba.groups,
        **(_expert_metadata(experts) if experts else {}),
        **({"nextn_predict_layers": len(graph.predictions)} if graph.predictions else {}),
    }
    return {f"{graph.architecture}.{key}": value for key, value in values.items()}


def _expert_metadata(experts: MoE) -> dict[str, Any]:
    router = experts.router
    assert experts.shared and isinstance(router, Router)
    values = {
        "expert_count": experts.experts,
        "expert_used_count": router.top_k,
        "expert_feed_forward_length": experts.expert_size,
        "expert_shared_feed_forward_length": experts.shared.up.shape[0],
        "expert_shared_count": 1,
        "expert_weights_norm": True,
        "expert_weights_scale": router.scale,
    }
    if experts.latent_down:
        values["moe_latent_size"] = experts.latent_down.shape[0]
    if router.groups_used < router.groups:  # to use all groups is no limit, and llama.cpp refuses to be told so
        values |= {"expert_group_count": router.groups, "expert_group_used_count": router.groups_used}
    return values


def _feed_forward_width(layer: Layer) -> int:
    """Width of a layer's experts or of its dense MLP; 0 tells llama.cpp that it has neither."""
    for operation in layer.operations:
        match operation:
            case MoE():
                return operation.expert_size
            case MLP():
                return operation.up.shape[0]
    return 0


def _key_value_heads(layer: Layer) -> int:
    """Number of key-value heads; 0 tells llama.cpp that the layer has no attention."""
    attentions = (op.key_value_heads for op in layer.operations if isinstance(op, Attention))
    return next(attentions, 0)


MIXTURE = Architecture(
    name=MIXTURE_NAME,
    model_types=("nemotron_h",),
    example="nemotron-3-tiny",
    pre_tokenizer="pixtral",
    from_checkpoint=_from_checkpoint,
    from_gguf=_from_gguf,
    gguf_metadata=_gguf_metadata,
)
DENSE = replace(MIXTURE, name=DENSE_NAME, model_types=())  # as a checkpoint it has the same model_type
