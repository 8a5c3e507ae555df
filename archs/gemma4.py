"""Gemma 4 (26B-A4B, 31B, E2B, E4B): windows and whole contexts by turns, in heads of two sizes.

Some have experts beside the dense layer, some use keys and values of earlier layers and have per-layer
embeddings.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..errors import BadInput
from .architecture import Architecture, refuse_unlike
from .catalogue import Catalogue
from .config import Config
from .encodings import GlobalScales, Nvfp4
from .expressions import Expression, Given, Read, Stack, TensorInfo
from .gemma4_blocks import NAME, STILL, Family, attentions, build, check
from .graph import Graph
from .shared import (
    ATTENTION_NAMES,
    DENSE_NAMES,
    CheckpointSource,
    Experts,
    Names,
    Source,
    catalogue_of,
    expect_all,
    gguf_source,
    open_gguf,
    text_section,
)

_IMPLEMENTED: Mapping[str, Sequence[object]] = {
    "hidden_activation": ["gelu_pytorch_tanh"],
    "attention_bias": [False],
    "use_bidirectional_attention": ["vision"],  # within a picture
    "tie_word_embeddings": [True],
}
_HARMLESS = (
    *("vision_config", "audio_config", "vision_soft_tokens_per_image"),  # left out
    *("audio_token_id", "boa_token_id", "boi_token_id", "eoa_token_id", "eoa_token_index", "eoi_token_id"),
    *("image_token_id", "video_token_id"),
    *("global_head_dim", "num_global_key_value_heads", "per_layer_config"),  # read where they count
    *("num_experts", "top_k_experts", "moe_intermediate_size", "vocab_size_per_layer_input"),
)
_HARMLESS_METADATA = ("vocab_size",)  # the embedding says it
_PREFIXES = ("model.language_model.", "model.", "language_model.model.")
_OTHER_SENSES = ("vision_tower.", "embed_vision.", "audio_tower.", "embed_audio.")
_HEAD = ("lm_head.weight", "language_model.lm_head.weight")
_FULL_EVERY, _PER_LAYER = 6, 256  # where nothing is said
_ROPES: Mapping[str, Mapping[str, Any]] = {  # where nothing is said
    "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
_NAMES = Names(
    layers=tuple(f"{prefix}layers.{{}}." for prefix in _PREFIXES),
    whole={
        gguf: tuple(prefix + name for prefix in _PREFIXES)
        for gguf, name in {
            "token_embd.weight": "embed_tokens.weight",
            "output_norm.weight": "norm.weight",
            "per_layer_token_embd.weight": "embed_tokens_per_layer.weight",
            "per_layer_model_proj.weight": "per_layer_model_projection.weight",
            "per_layer_proj_norm.weight": "per_layer_projection_norm.weight",
        }.items()
    },
    layer=ATTENTION_NAMES
    | DENSE_NAMES
    | {
        "post_attention_norm.weight": ("post_attention_layernorm.weight",),
        "ffn_norm.weight": ("pre_feedforward_layernorm.weight",),
        "post_ffw_norm.weight": ("post_feedforward_layernorm.weight",),
        "post_ffw_norm_1.weight": ("post_feedforward_layernorm_1.weight",),
        "pre_ffw_norm_2.weight": ("pre_feedforward_layernorm_2.weight",),
        "post_ffw_norm_2.weight": ("post_feedforward_layernorm_2.weight",),
        "ffn_gate_inp.weight": ("router.proj.weight",),
        "ffn_gate_inp.scale": ("router.scale",),
        "ffn_down_exps.scale": ("router.per_expert_scale",),
        "layer_output_scale.weight": ("layer_scalar",),
        "inp_gate.weight": ("per_layer_input_gate.weight",),
        "proj.weight": ("per_layer_projection.weight",),
        "post_norm.weight": ("post_per_layer_input_norm.weight",),
    },
    experts={
        "ffn_gate_exps.weight": Experts("experts.{}.gate_proj", "experts.gate_up_proj", half=0),
        "ffn_up_exps.weight": Experts("experts.{}.up_proj", "experts.gate_up_proj", half=1),
        "ffn_down_exps.weight": Experts("experts.{}.down_proj", "experts.down_proj"),
    },
)
# The engine multiplies these itself, whatever they are stored as.
_MULTIPLIED = ("ffn_gate_inp.weight", "ffn_down_exps.weight")


class _Checkpoint(CheckpointSource):
    """Finds the weights of a checkpoint.

    Which pairs of a head turn stands in the configuration. Down projections have one scale for each expert, so what
    NVFP4 multiplies a matrix by goes into that.
    """

    def __init__(self, catalogue: Catalogue, turning: int) -> None:
        super().__init__(catalogue, _NAMES)
        self._turning = turning
        self._scaled: dict[str, tuple[Nvfp4, ...]] = {}

    def __call__(self, name: str, shape: tuple[int, ...]) -> Expression:
        if name == "rope_freqs.weight":
            return Given((1.0,) * self._turning + (STILL,) * (shape[0] - self._turning))
        if name == "output.weight":
            name = "token_embd.weight"
        found = super().__call__(name, shape)
        module = name.removesuffix(".weight").removesuffix(".scale")
        if name.endswith("ffn_down_exps.weight") and isinstance(found, Stack):
            matrices = tuple(expert for expert in found.experts if isinstance(expert, Nvfp4))
            if len(matrices) == shape[0]:
                self._scaled[module] = matrices
                return Stack(tuple(replace(matrix, global_scale=None) for matrix in matrices))
        if name.endswith("ffn_down_exps.scale") and module in self._scaled:
            return GlobalScales(self._scaled[module], found)
        return found


def _from_checkpoint(config: Config, tensors: Sequence[TensorInfo]) -> Graph:
    """The language model of a checkpoint, whatever else it holds."""
    dimensions, turning = _read_config(config)
    catalogue = catalogue_of(config, tensors)
    others = sum(catalogue.ignore(prefix + name) for prefix in ("model.", "") for name in _OTHER_SENSES)
    repeated = sum(map(catalogue.ignore, _HEAD))
    source = _Checkpoint(catalogue, turning)
    graph = build(dimensions, source)
    unread = sum(
        catalogue.ignore(f"{prefix}layers.{layer}.self_attn.{name}")
        for prefix in _PREFIXES
        for layer in range(dimensions.layers - dimensions.shared, dimensions.layers)
        for name in ("k_", "v_")
    )
    notes = []
    if others:
        notes.append(f"left out what sees and hears, {others} tensors: text alone is understood")
    if repeated:
        notes.append("left out lm_head.weight: the embedding is the head")
    if unread:
        notes.append(f"left out {unread} tensors of keys and values in layers that use those of others")
    return replace(graph, notes=(*notes, *catalogue.finish()))


def _read_config(config: Config) -> tuple[Family, int]:
    """What there is of everything, and how many pairs of a head turn where the whole context is seen."""
    text = text_section(config)
    config.expect("tie_word_embeddings", True)
    expect_all(text, _IMPLEMENTED)
    layers = text.integer("num_hidden_layers")
    windowed = text.marked("layer_types", layers, "sliding_attention", "full_attention") or tuple(
        bool((index + 1) % _FULL_EVERY) and index + 1 < layers for index in range(layers)
    )
    if windowed[-1]:
        raise BadInput(f"{text.origin}: layer_types ends with sliding_attention, expected full_attention")
    shared, size = text.integer("num_kv_shared_layers", default=0), text.integer("intermediate_size")
    wide = text.flag("use_double_wide_mlp", default=False)
    from_keys = text.flag("attention_k_eq_v", default=False)
    key_value_heads, head_size = text.integer("num_key_value_heads"), text.integer("head_dim")
    full = _of_full_layers(text, windowed, from_keys, key_value_heads)
    ropes = {kind: _rope(text, kind) for kind in _ROPES}
    key = "hidden_size_per_layer_input"
    per_layer = text.integer(key, default=0) if key in text else _PER_LAYER
    if per_layer:
        text.expect("vocab_size_per_layer_input", text.integer("vocab_size"))
    experts = text.flag("enable_moe_block", default=False)
    dimensions = Family.from_config(
        text,
        head_size=head_size,
        full_head_size=full[0],
        key_value_heads=tuple(key_value_heads if window else full[1] for window in windowed),
        windowed=windowed,
        window=text.integer("sliding_window") if any(windowed) else text.integer("sliding_window", default=512),
        rope_base=ropes["full_attention"].number("rope_theta"),
        window_rope_base=ropes["sliding_attention"].number("rope_theta"),
        shared=shared,
        per_layer=per_layer,
        dense_sizes=tuple(size * (2 if wide and index >= layers - shared else 1) for index in range(layers)),
        values_from_keys=tuple(from_keys and not window for window in windowed),
        experts=text.integer("num_experts") if experts else 0,
        top_k=text.integer("top_k_experts") if experts else 0,
        expert_size=text.integer("moe_intermediate_size") if experts else 0,
    )
    check(dimensions, text.origin)
    turning = int(ropes["full_attention"].number("partial_rotary_factor", default=1.0) * full[0] // 2)
    if not 0 < 2 * turning <= full[0]:
        raise BadInput(f"{text.origin}: partial_rotary_factor turns {turning} of {full[0] // 2} pairs of a head")
    return dimensions, turning


def _of_full_layers(text: Config, windowed: Sequence[bool], from_keys: bool, key_value_heads: int) -> tuple[int, int]:
    """Head size and number of key-value heads where the whole context is seen, as the Hub and transformers say them."""
    listed = text.section("per_layer_config")
    size = text.integer("global_head_dim", default=512)
    count = text.integer("num_global_key_value_heads", default=key_value_heads) if from_keys else key_value_heads
    found = {(size, count)}
    if listed.keys():
        sections = (listed.section(str(layer)) for layer, window in enumerate(windowed) if not window)
        found = {
            (one.integer("head_dim", default=size), one.integer("num_key_value_heads", default=count))
            for one in sections
        }
    if len(found) > 1 or not _all_full(listed, windowed):
        raise BadInput(f"{text.origin}: per_layer_config differs within layers of one kind: this is not supported")
    return found.pop()


def _all_full(listed: Config, windowed: Sequence[bool]) -> bool:
    """Whether layers that are described one by one are those that see the whole context."""
    return {*listed.keys()} <= {str(layer) for layer, window in enumerate(windowed) if not window}


def _rope(text: Config, kind: str) -> Config:
    """The rotary embedding of a kind of layers."""
    ropes = text.section("rope_parameters")
    rope = ropes.section(kind) if ropes.keys() else Config(_ROPES[kind], text.origin)
    rope.expect("rope_type", _ROPES[kind]["rope_type"])
    if kind == "sliding_attention":
        rope.expect("partial_rotary_factor", 1.0)
    return rope


def _from_gguf(metadata: Config, tensors: Sequence[TensorInfo]) -> Graph:
    catalogue, vocabulary = open_gguf(metadata, tensors)
    layers = metadata.integer(f"{NAME}.block_count")
    pattern = metadata.get(f"{NAME}.attention.sliding_window_pattern")
    if not isinstance(pattern, list) or len(pattern) < layers:
        raise BadInput(
            f"{metadata.origin}: {NAME}.attention.sliding_window_pattern is {str(pattern)[:60]}, expected an entry for "
            f"each of {layers} layers"
        )
    dimensions = Family.from_gguf(
        metadata,
        NAME,
        vocabulary=vocabulary,
        key_value_heads=metadata.integers(f"{NAME}.attention.head_count_kv", layers),
        dense_sizes=metadata.integers(f"{NAME}.feed_forward_length", layers),
        windowed=tuple(map(bool, pattern[:layers])),
        values_from_keys=tuple(f"blk.{layer}.attn_v.weight" not in catalogue for layer in range(layers)),
    )
    check(dimensions, metadata.origin)
    graph = build(dimensions, _in_gguf(catalogue))
    for layer in range(layers - dimensions.shared, layers):
        catalogue.ignore(f"blk.{layer}.attn_k")
        catalogue.ignore(f"blk.{layer}.attn_v")
    catalogue.finish()
    return graph


def _in_gguf(catalogue: Catalogue) -> Source:
    """Finds the weights of a GGUF file, of which some have a `.scale` that is a weight of its own."""
    others = gguf_source(catalogue)

    def find(name: str, shape: tuple[int, ...]) -> Expression:
        return Read(catalogue.take(name)) if name.endswith(_MULTIPLIED) else others(name, shape)

    return find


def _gguf_metadata(graph: Graph) -> dict[str, Any]:
    """Raises BadInput for what llama.cpp would compute otherwise, or not load."""
    layers = attentions(graph)
    own = sum(op.keys_of is None for op in layers)
    unlike = {
        "no layer with a window (layer_types)": not any(op.window for op in layers),
        "layers that use keys of others than the last two of their own (num_kv_shared_layers, layer_types)": any(
            op.keys_of not in (None, own - 2 if op.window else own - 1) for op in layers
        ),
    }
    refuse_unlike(graph, unlike)
    return Family.metadata(graph)


ARCHITECTURE = Architecture(
    name=NAME,
    model_types=("gemma4", "gemma4_text"),
    pre_tokenizer="gemma4",
    from_checkpoint=_from_checkpoint,
    from_gguf=_from_gguf,
    gguf_metadata=_gguf_metadata,
    harmless=_HARMLESS,
    harmless_metadata=_HARMLESS_METADATA,
)
