"""Nemotron 3 and Nemotron-H: Mamba-2, attention without positions, and ReLU-squared experts, one operation a layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from ..errors import BadInput
from .architecture import Architecture
from .catalogue import Catalogue
from .config import Config
from .dimensions import first
from .drafts import with_draft
from .expressions import Expression, NegativeExponential, Reshape, TensorInfo, Zeros
from .graph import MLP, Graph, MoE
from .nemotron_h_blocks import (
    ATTENTION,
    DENSE_LAYER,
    DENSE_NAME,
    EXPERTS,
    MAMBA,
    MIXTURE_NAME,
    WITHOUT_EXPERTS,
    Family,
    build,
    check,
)
from .shared import CheckpointSource, Experts, Names, Source, catalogue_of, expect_all, gguf_source, open_gguf

_NO_LIMIT: Sequence[object] = [[0.0, float("inf")], [0.0, 1e308], [0.0, {"__float__": "Infinity"}]]
_IMPLEMENTED: Mapping[str, Sequence[object]] = {
    "mlp_hidden_act": ["relu2"],
    "mamba_hidden_act": ["silu"],
    "norm_topk_prob": [True],
    "n_shared_experts": [1],
    "sliding_window": [],
    "attention_bias": [False],
    "mlp_bias": [False],
    "use_bias": [False],
    "mamba_proj_bias": [False],
    "time_step_limit": _NO_LIMIT,
    "mamba_dt_limit": _NO_LIMIT,
}
# There are no positions; inner widths and what is biased follow from the tensors and other keys.
_HARMLESS = (
    *("rope_theta", "rope_parameters", "rope_scaling", "partial_rotary_factor"),
    *("expand", "mamba_expand", "use_conv_bias", "mamba_conv_bias"),
    "intermediate_size",  # of dense layers; read where there are any
    *("moe_intermediate_size", "moe_shared_expert_intermediate_size", "n_routed_experts", "num_experts_per_tok"),
    *("moe_latent_size", "n_group", "topk_group", "routed_scaling_factor"),  # as are those of experts
)
_HARMLESS_METADATA = (
    *("vocab_size", "rope.freq_base", "rope.dimension_count", "rope.scaling.finetuned", "rope.scaling.type"),
    *("expert_count", "expert_used_count", "expert_group_count", "expert_group_used_count", "moe_latent_size"),
    *("expert_feed_forward_length", "expert_shared_feed_forward_length", "expert_shared_count"),
    *("expert_weights_norm", "expert_weights_scale"),
)
_OWN_SIZES = "block_configs"

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


def _reshaped(catalogue: Catalogue, name: str, shape: tuple[int, ...]) -> Reshape:
    return Reshape(catalogue.plain(name).tensor, shape)


def _decay(catalogue: Catalogue, name: str, shape: tuple[int, ...]) -> NegativeExponential:
    return NegativeExponential(_reshaped(catalogue, name, shape))


def _convolution_bias(catalogue: Catalogue, name: str, shape: tuple[int, ...]) -> Expression:
    """llama.cpp adds it without asking whether there is one."""
    return catalogue.plain(name) if name in catalogue else Zeros(shape)


_NAMES = Names(
    layers=("backbone.layers.{}.", "model.layers.{}."),
    whole={
        "token_embd.weight": ("backbone.embeddings.weight", "model.embeddings.weight"),
        "output_norm.weight": ("backbone.norm_f.weight", "model.norm_f.weight"),
        "output.weight": ("lm_head.weight",),
    },
    layer={
        "attn_norm.weight": ("norm.weight",),
        "attn_q.weight": ("mixer.q_proj.weight",),
        "attn_k.weight": ("mixer.k_proj.weight",),
        "attn_v.weight": ("mixer.v_proj.weight",),
        "attn_output.weight": ("mixer.o_proj.weight",),
        "ssm_in.weight": ("mixer.in_proj.weight",),
        "ssm_out.weight": ("mixer.out_proj.weight",),
        "ssm_conv1d.weight": ("mixer.conv1d.weight",),
        "ssm_conv1d.bias": ("mixer.conv1d.bias",),
        "ssm_dt.bias": ("mixer.dt_bias",),
        "ssm_a": ("mixer.A_log",),
        "ssm_d": ("mixer.D",),
        "ssm_norm.weight": ("mixer.norm.weight",),
        "ffn_up.weight": ("mixer.up_proj.weight",),
        "ffn_down.weight": ("mixer.down_proj.weight",),
        "ffn_gate_inp.weight": ("mixer.gate.weight",),
        "exp_probs_b.bias": ("mixer.gate.e_score_correction_bias",),
        "ffn_latent_down.weight": ("mixer.fc1_latent_proj.weight",),
        "ffn_latent_up.weight": ("mixer.fc2_latent_proj.weight",),
        "ffn_up_shexp.weight": ("mixer.shared_experts.up_proj.weight",),
        "ffn_down_shexp.weight": ("mixer.shared_experts.down_proj.weight",),
        "nextn.enorm.weight": ("enorm.weight",),
        "nextn.hnorm.weight": ("hnorm.weight",),
        "nextn.eh_proj.weight": ("eh_proj.weight",),
        "post_attention_norm.weight": ("norm.weight",),
        "nextn.shared_head_norm.weight": ("final_layernorm.weight",),
    },
    experts={
        "ffn_up_exps.weight": Experts("mixer.experts.{}.up_proj", "mixer.experts.up_proj"),
        "ffn_down_exps.weight": Experts("mixer.experts.{}.down_proj", "mixer.experts.down_proj"),
    },
    special={
        "ssm_conv1d.weight": _reshaped,
        "ssm_conv1d.bias": _convolution_bias,
        "ssm_a": _decay,
        "ssm_d": _reshaped,
        "ssm_norm.weight": _reshaped,
    },
)
# The drafting block: attention and experts are two layers of the checkpoint and one of the GGUF file.
_IN_SECOND_LAYER = ("ffn_", "exp_probs_b.", "post_attention_norm.", "nextn.shared_head_norm.")


def _from_checkpoint(config: Config, tensors: Sequence[TensorInfo]) -> Graph:
    there = any(tensor.name == "mtp.layers.0.eh_proj.weight" for tensor in tensors)
    return with_draft(there, partial(_read_checkpoint, config, tensors))


def _read_checkpoint(config: Config, tensors: Sequence[TensorInfo], drafts: bool) -> Graph:
    catalogue = catalogue_of(config, tensors)
    dimensions = _read_config(config, drafts)
    tied = config.flag("tie_word_embeddings", default=False)
    try:
        graph = build(dimensions, _checkpoint_source(catalogue, len(dimensions.kinds), tied))
    except BadInput as error:
        if _OWN_SIZES not in config:
            raise
        what = "gives layers sizes of their own (Nemotron Puzzle), which moecast does not know"
        raise BadInput(f"{config.origin}: {_OWN_SIZES} {what}: {error}") from None
    left = 0 if drafts else catalogue.ignore("mtp.")
    notes = (f"{left} tensors of a drafting block (mtp.*) are left out",) if left else ()
    return replace(graph, notes=(*notes, *catalogue.finish()))


def _read_config(config: Config, drafts: bool) -> Family:
    expect_all(config, _IMPLEMENTED)
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
    absent = {} if drafts or EXPERTS in kinds else WITHOUT_EXPERTS
    if DENSE_LAYER not in kinds:
        absent = absent | {"dense_size": 0}
    dimensions = Family.from_config(config, kinds=kinds, drafts=int(drafts), **absent)
    check(dimensions, config.origin)
    return dimensions


def _layer_kinds(config: Config, *keys: str) -> str:
    """The list of layers, which all of `keys` that are present spell alike, as one letter a layer."""
    lists = {key: _letters(config, key) for key in keys if key in config}
    if not lists:
        raise BadInput(f"{config.origin}: {' or '.join(keys)} is missing, expected the kinds of all layers")
    if len({*lists.values()}) > 1:
        raise BadInput(f"{config.origin}: {' and '.join(lists)} list other layers: leave one of them out")
    return next(iter(lists.values()))


def _letters(config: Config, key: str) -> str:
    value = config.get(key)
    unknown = [kind for kind in value if kind not in _KINDS] if isinstance(value, str | list) else [value]
    if unknown or not value:
        raise BadInput(f"{config.origin}: {key} holds {unknown[:1]}, expected a list of {', '.join(_KINDS)}")
    return "".join(_KINDS[kind] for kind in value)


def _checkpoint_source(catalogue: Catalogue, layers: int, tied: bool) -> Source:
    source = CheckpointSource(catalogue, _NAMES, tied)

    def find(name: str, shape: tuple[int, ...]) -> Expression:
        if not name.startswith(f"blk.{layers}."):
            return source(name, shape)
        kind = name.removeprefix(f"blk.{layers}.")
        return source.in_layer(f"mtp.layers.{int(kind.startswith(_IN_SECOND_LAYER))}.", kind, shape)

    return find


def _from_gguf(metadata: Config, tensors: Sequence[TensorInfo]) -> Graph:
    name = metadata.text("general.architecture")
    catalogue, vocabulary = open_gguf(metadata, tensors)
    blocks = metadata.integer(f"{name}.block_count")
    drafts = metadata.integer(f"{name}.nextn_predict_layers", default=0)
    if drafts > 1:
        raise BadInput(f"{metadata.origin}: {name}.nextn_predict_layers is {drafts}, expected at most 1")
    key_value_heads = metadata.integers(f"{name}.attention.head_count_kv", blocks)
    widths = metadata.integers(f"{name}.feed_forward_length", blocks)
    feed_forward = EXPERTS if name == MIXTURE_NAME else DENSE_LAYER
    kinds = "".join(
        ATTENTION if heads and not width else feed_forward if width else MAMBA
        for heads, width in zip(key_value_heads[: blocks - drafts], widths, strict=False)
    )
    inner, heads = metadata.integer(f"{name}.ssm.inner_size"), metadata.integer(f"{name}.ssm.time_step_rank")
    dimensions = Family.from_gguf(
        metadata,
        name,
        vocabulary=vocabulary,
        kinds=kinds,
        dense_size=max(widths),
        key_value_heads=max(key_value_heads),
        mamba_head_size=inner // heads,
        **({} if name == MIXTURE_NAME else WITHOUT_EXPERTS),
    )
    check(dimensions, metadata.origin)
    graph = build(dimensions, gguf_source(catalogue))
    catalogue.finish()
    return graph


def _gguf_metadata(graph: Graph) -> dict[str, Any]:
    if first(graph, MoE) and first(graph, MLP):
        raise BadInput("this model has dense layers beside layers of experts, which llama.cpp cannot run")
    return Family.metadata(graph)


MIXTURE = Architecture(
    name=MIXTURE_NAME,
    model_types=("nemotron_h",),
    example="nemotron-3-tiny",
    pre_tokenizer="pixtral",
    from_checkpoint=_from_checkpoint,
    from_gguf=_from_gguf,
    gguf_metadata=_gguf_metadata,
    harmless=_HARMLESS,
    harmless_metadata=_HARMLESS_METADATA,
)
DENSE = replace(MIXTURE, name=DENSE_NAME, model_types=())  # as a checkpoint it has the same model_type
