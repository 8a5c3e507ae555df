"""Cohere2 (Command A, R7B) and Cohere2-MoE (Command A+, North-Mini-Code): attention beside a dense layer or experts.

Both read the same norm. Most attention has a window; without one, as a rule, it knows no positions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..errors import BadInput
from .architecture import Architecture, refuse_unlike
from .cohere2_blocks import (
    AVERAGE,
    DENSE_NAME,
    MIXTURE_NAME,
    WITHOUT_EXPERTS,
    Family,
    attentions,
    build,
    check,
)
from .config import Config
from .dimensions import first
from .expressions import TensorInfo
from .graph import Attention, Graph, MoE
from .shared import (
    ATTENTION_BIAS_NAMES,
    ATTENTION_NAMES,
    DENSE_NAMES,
    EXPERT_NAMES,
    CheckpointSource,
    Names,
    catalogue_of,
    expect_all,
    gguf_source,
    open_gguf,
    rope_section,
    text_section,
)

_IMPLEMENTED: Mapping[str, Sequence[object]] = {
    "hidden_act": ["silu"],
    "use_parallel_block": [True],
    "transformer_block_type": ["parallel"],
    "use_gated_activation": [True],
    "use_qk_norm": [False],
    "layer_norm_bias": [False],
    "position_embedding_type": ["rope_gptj"],
    "rotary_pct": [1.0],
    "partial_rotary_factor": [1.0],
    "order_of_interleaved_layers": ["local_attn_first"],
}
_HARMLESS = (
    "layer_switch",  # the number of layers after which the pattern of windows begins anew
    "norm_type",  # `rms_norm_eps` says it
    *("cache_implementation", "use_parallel_embedding"),  # of engines
    *("vision_config", "downsample_factor", "image_token_id", "image_token_index", "alignment_intermediate_size"),
)
_HARMLESS_METADATA = ("vocab_size",)  # the embedding says it
_PREFIXES = ("model.", "model.language_model.", "language_model.model.")
_PICTURES = ("model.vision_tower.", "model.multi_modal_projector.", "vision_tower.", "multi_modal_projector.")
_HEAD = "lm_head.weight", "language_model.lm_head.weight"
_NAMES = Names(
    layers=tuple(f"{prefix}layers.{{}}." for prefix in _PREFIXES),
    whole={
        "token_embd.weight": tuple(f"{prefix}embed_tokens.weight" for prefix in _PREFIXES),
        "output_norm.weight": tuple(f"{prefix}norm.weight" for prefix in _PREFIXES),
        "output.weight": _HEAD,
    },
    layer=ATTENTION_NAMES
    | ATTENTION_BIAS_NAMES
    | DENSE_NAMES
    | {
        "ffn_gate_inp.weight": ("mlp.gate.weight",),
        "ffn_gate_shexp.weight": ("mlp.shared_experts.gate_proj.weight",),
        "ffn_up_shexp.weight": ("mlp.shared_experts.up_proj.weight",),
        "ffn_down_shexp.weight": ("mlp.shared_experts.down_proj.weight",),
    },
    experts=EXPERT_NAMES,
)


def _from_checkpoint(config: Config, tensors: Sequence[TensorInfo]) -> Graph:
    """The language model of a checkpoint, whatever else it holds."""
    dimensions = _read_config(config)
    catalogue = catalogue_of(config, tensors)
    pictures = sum(map(catalogue.ignore, _PICTURES))
    repeated = sum(map(catalogue.ignore, _HEAD)) if dimensions.tied else 0
    notes = []
    if pictures:
        notes.append(f"left out the vision tower, {pictures} tensors: text alone is understood")
    if repeated:
        notes.append("left out lm_head.weight: the configuration says that the embedding is the head")
    graph = build(dimensions, CheckpointSource(catalogue, _NAMES))
    return replace(graph, notes=(*notes, *catalogue.finish()))


def _read_config(config: Config) -> Family:
    text = text_section(config)
    expect_all(text, _IMPLEMENTED)
    rope = rope_section(text)
    for key in ("rope_type", "type"):
        rope.expect(key, "default")
    rope.expect("partial_rotary_factor", 1.0)
    tied = config.flag("tie_word_embeddings", default=text.flag("tie_word_embeddings", default=True))
    text.expect("use_embedding_sharing", tied)
    heads, layers = text.integer("num_attention_heads"), text.integer("num_hidden_layers")
    kind = _mixture if text.text("model_type", default="cohere2") == "cohere2_moe" else _dense
    given = kind(text, layers)
    windowed = _windowed(text, layers, text.integer("first_k_dense_replace", default=0) if kind is _mixture else 0)
    forced = kind is _mixture and text.integer("prefix_dense_sliding_window_pattern", default=1) == 1
    dimensions = Family.from_config(
        text,
        key_value_heads=text.integer("num_key_value_heads", default=heads),
        window=text.integer("sliding_window") if any(windowed) else text.integer("sliding_window", default=0),
        rope_base=rope.number("rope_theta", default=text.number("rope_theta", default=1e4)),
        biased=text.flag("attention_bias", default=False),
        tied=tied,
        windowed=windowed,
        rotated=tuple(window or (forced and dense) for window, dense in zip(windowed, given["dense"], strict=True)),
        **given,
    )
    check(dimensions, text.origin)
    return dimensions


def _dense(text: Config, layers: int) -> dict[str, Any]:
    """What only models without experts have otherwise."""
    head_size = text.integer("hidden_size") // text.integer("num_attention_heads")
    text.expect("head_dim", head_size)
    text.expect("rms_norm_eps")
    return {
        "head_size": head_size,
        "epsilon": text.number("layer_norm_eps", default=1e-5),
        "centered": True,
        "dense": (True,) * layers,
        "dense_size": text.integer("intermediate_size"),
        **WITHOUT_EXPERTS,
        **dict.fromkeys(("normalized", "averaged"), False),
        "gating": 0,
    }


def _mixture(text: Config, layers: int) -> dict[str, Any]:
    """What only models with experts have otherwise."""
    text.expect("expert_selection_fn", "softmax", "sigmoid")
    text.expect("shared_expert_combination_strategy", "average", "sum")
    layer_norm, rms_norm = text.number("layer_norm_eps", default=1e-5), text.get("rms_norm_eps")
    sigmoid = text.get("expert_selection_fn") == "sigmoid"
    of_shares, size = text.flag("norm_topk_prob", default=True), text.integer("intermediate_size")
    leading = text.integer("first_k_dense_replace", default=0)
    listed = text.marked("mlp_layer_types", layers, "dense", "sparse")
    dense = listed or tuple(index < leading for index in range(layers))
    dense_size = text.integer("prefix_dense_intermediate_size", default=size)
    return {
        "head_size": text.integer("head_dim", default=128),
        "epsilon": layer_norm if rms_norm is None else text.number("rms_norm_eps"),
        "centered": rms_norm is None,
        "dense": dense,
        "dense_size": dense_size if any(dense) else 0,
        "expert_size": size,
        "shared_size": size * text.integer("num_shared_experts", default=0),
        "gating": 2 if sigmoid else 1,
        "normalized": of_shares if sigmoid else True,  # softmax is of the chosen experts alone
        "averaged": text.get("shared_expert_combination_strategy") in (None, "average"),
    }


def _windowed(text: Config, layers: int, leading: int) -> tuple[bool, ...]:
    """Which layers' attention has a window: as listed, or all but every so many, `leading` ones apart from the rest."""
    listed = text.marked("layer_types", layers, "sliding_attention", "full_attention")
    every = text.integer("sliding_window_pattern", default=4)
    if listed is not None:
        return listed
    apart = text.integer("prefix_dense_sliding_window_pattern", default=1)
    return (
        *(bool((index + 1) % apart) for index in range(leading)),
        *(bool((index + 1) % every) for index in range(layers - leading)),
    )


def _from_gguf(metadata: Config, tensors: Sequence[TensorInfo]) -> Graph:
    name = metadata.text("general.architecture")
    catalogue, vocabulary = open_gguf(metadata, tensors)
    layers, mixture = metadata.integer(f"{name}.block_count"), name == MIXTURE_NAME
    rms_norm = metadata.number(f"{name}.attention.layer_norm_rms_epsilon", default=0) if mixture else 0
    layer_norm = metadata.number(f"{name}.attention.layer_norm_epsilon", default=rms_norm or 1e-5)
    windowed = _windowed_in_gguf(metadata, name, layers)
    leading = metadata.integer(f"{name}.leading_dense_block_count", default=0) if mixture else 0
    dimensions = Family.from_gguf(
        metadata,
        name,
        vocabulary=vocabulary,
        logit_scale=metadata.number(f"{name}.logit_scale"),
        epsilon=rms_norm or layer_norm,
        centered=not rms_norm,
        windowed=windowed,
        rotated=tuple(window or index < leading for index, window in enumerate(windowed)),
        dense=tuple(not mixture or index < leading for index in range(layers)),
        averaged=True,
        biased=False,
        tied="output.weight" not in catalogue,
        **({} if mixture else WITHOUT_EXPERTS),
    )
    check(dimensions, metadata.origin)
    graph = build(dimensions, gguf_source(catalogue))
    catalogue.finish()
    return graph


def _windowed_in_gguf(metadata: Config, name: str, layers: int) -> tuple[bool, ...]:
    """A list, or the number of layers of which one has no window: the last, in a mixture the first."""
    key = f"{name}.attention.sliding_window_pattern"
    pattern = metadata.get(key)
    if isinstance(pattern, list):
        if len(pattern) < layers:
            raise BadInput(
                f"{metadata.origin}: {key} has {len(pattern)} entries, expected one for each of {layers} layers"
            )
        return tuple(map(bool, pattern[:layers]))
    every, without = metadata.integer(key, default=4), 0
    if name == DENSE_NAME:
        without = every - 1
    return tuple(index % every != without for index in range(layers))


def _gguf_metadata(graph: Graph) -> dict[str, Any]:
    """Raises BadInput for what llama.cpp would compute otherwise, or not load."""
    attention, experts = first(graph, Attention), first(graph, MoE)
    mixture = graph.architecture == MIXTURE_NAME
    routed = [any(isinstance(operation, MoE) for operation in layer.operations) for layer in graph.layers]
    dense = [not experts for experts in routed]
    rotated = [op.rope is not None for op in attentions(graph)]
    unlike = {
        "no layer with a window (layer_types)": not any(op.window for op in attentions(graph)),
        "biases in attention (attention_bias)": attention and attention.output_bias,
        "a head of its own (tie_word_embeddings false)": not mixture and not graph.tied,
        "dense layers after those of experts (mlp_layer_types)": mixture and routed != sorted(routed),
        "no experts (mlp_layer_types)": mixture and not experts,
        "dense layers that know no positions (prefix_dense_sliding_window_pattern)": (
            mixture and any(not turns for turns, alone in zip(rotated, dense, strict=True) if alone)
        ),
        "a shared expert that is added (shared_expert_combination_strategy sum)": (
            experts and experts.shared and experts.scale != AVERAGE
        ),
    }
    refuse_unlike(graph, unlike)
    return Family.metadata(graph)


MIXTURE = Architecture(
    name=MIXTURE_NAME,
    model_types=("cohere2_moe", "cohere2_vision"),
    pre_tokenizer="cohere2moe",
    from_checkpoint=_from_checkpoint,
    from_gguf=_from_gguf,
    gguf_metadata=_gguf_metadata,
    harmless=_HARMLESS,
    harmless_metadata=_HARMLESS_METADATA,
)
DENSE = replace(MIXTURE, name=DENSE_NAME, model_types=("cohere2", "cohere2_vision"), pre_tokenizer="command-r")
