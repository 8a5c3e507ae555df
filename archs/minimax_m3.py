"""MiniMax M3: after a few dense layers, attention to selected blocks of tokens, then experts beside a shared one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

from ..errors import BadInput
from .architecture import Architecture
from .catalogue import Catalogue
from .config import Config
from .expressions import Expression, OnePlus, Rows, TensorInfo
from .graph import Graph
from .minimax_m2 import EXPERTS, read_rope
from .minimax_m3_blocks import CLAMP, NAME, SPARSE, Family, build, check, gguf_metadata, leading_layers
from .shared import (
    ATTENTION_NAMES,
    CheckpointSource,
    Names,
    catalogue_of,
    expect_all,
    gguf_source,
    open_gguf,
    text_section,
)

_DENSE_SIZE, _SHARED_SIZE = 12_288, 3072  # what transformers takes where a configuration says none
_VISION = (
    *("vision_tower.", "multi_modal_projector.", "patch_merge_mlp."),
    *("model.vision_tower.", "model.multi_modal_projector."),
)
_IMPLEMENTED: Mapping[str, Sequence[object]] = {
    "hidden_act": ["swigluoai", "silu"],  # transformers' name of what it replaces
    "swiglu_alpha": [1.702],
    "use_gemma_norm": [True],
    "use_qk_norm": [True],
    "qk_norm_type": ["per_head"],
    "attention_output_gate": [False],
    "scoring_func": ["sigmoid"],
    "use_routing_bias": [True],
    "n_shared_experts": [1],
}
_IMPLEMENTED_SPARSE: Mapping[str, Sequence[object]] = {
    "use_sparse_attention": [True],
    "sparse_score_type": ["max"],
    "sparse_init_block": [0],
}
_HARMLESS = (
    *("vision_config", "img_token_compression_config", "image_grid_pinpoints", "image_seq_length"),
    *("image_token_index", "video_token_index", "merged_hidden_size", "multimodal_projector_bias"),
    *("process_image_mode", "projector_hidden_act", "projector_hidden_size", "vision_feature_layer"),
    *("vision_feature_select_strategy", "num_reward_heads"),
    *("dense_intermediate_size", "tie_word_embeddings"),  # read where layers are dense; what stands outside counts
)
_HARMLESS_METADATA = ("vocab_size",)  # the embedding says it
_PREFIXES = ("language_model.model.", "model.language_model.", "model.")  # the Hub's, in memory, without a tower


def _whole(name: str) -> tuple[str, ...]:
    return tuple(prefix + name for prefix in _PREFIXES)


def _apart(catalogue: Catalogue, name: str, shape: tuple[int, ...], half: int) -> Expression:
    """Gate (0) or up projection (1), which transformers fuses in memory."""
    if not name.endswith("gate_up_proj.weight"):
        return catalogue.matrix(name.removesuffix(".weight"))
    return Rows(catalogue.fused(name), half * shape[0], (half + 1) * shape[0])


def _gated(ending: str, *modules: str) -> dict[str, tuple[str, ...]]:
    """Names of the projections of a dense layer or of the shared expert, apart or fused."""

    def names(*kinds: str) -> tuple[str, ...]:
        return tuple(f"{module}.{kind}_proj.weight" for module in modules for kind in kinds)

    return {
        f"ffn_gate{ending}.weight": names("gate", "gate_up"),
        f"ffn_up{ending}.weight": names("up", "gate_up"),
        f"ffn_down{ending}.weight": names("down"),
    }


_NAMES = Names(
    layers=_whole("layers.{}."),
    whole={
        "token_embd.weight": _whole("embed_tokens.weight"),
        "output_norm.weight": _whole("norm.weight"),
        "output.weight": ("language_model.lm_head.weight", "lm_head.weight"),
    },
    layer=ATTENTION_NAMES
    | _gated("", "mlp")
    | _gated("_shexp", "block_sparse_moe.shared_experts", "mlp.shared_experts")
    | {
        "ffn_gate_inp.weight": ("block_sparse_moe.gate.weight", "mlp.gate.weight"),
        "exp_probs_b.bias": ("block_sparse_moe.e_score_correction_bias", "mlp.gate.e_score_correction_bias"),
    }
    | {
        f"indexer.{kind}.weight": (f"self_attn.index_{kind}.weight", f"self_attn.indexer.{kind}.weight")
        for kind in ("q_proj", "k_proj", "q_norm", "k_norm")
    },
    experts=EXPERTS,
    special={
        f"ffn_{kind}{ending}.weight": partial(_apart, half=half)
        for half, kind in enumerate(("gate", "up"))
        for ending in ("", "_shexp")
    },
)


def _from_checkpoint(config: Config, tensors: Sequence[TensorInfo]) -> Graph:
    text, catalogue = text_section(config), catalogue_of(config, tensors)
    tied = config.flag("tie_word_embeddings", default=text.flag("tie_word_embeddings", default=False))
    stored = CheckpointSource(catalogue, _NAMES, tied)

    def find(name: str, shape: tuple[int, ...]) -> Expression:
        found = stored(name, shape)
        return OnePlus(found) if name.endswith("norm.weight") else found

    graph = build(_read_config(config), find)
    vision = sum(catalogue.ignore(prefix) for prefix in _VISION)
    left_out = (f"{vision} tensors of the vision tower are left out: the model reads text alone",) if vision else ()
    return replace(graph, notes=(*graph.notes, *left_out, *catalogue.finish()))


def _read_config(config: Config) -> Family:
    text = text_section(config)
    expect_all(text, _IMPLEMENTED)
    expect_all(text.section(SPARSE), _IMPLEMENTED_SPARSE)
    layers, rope = text.integer("num_hidden_layers"), read_rope(text)
    routed = text.marked("mlp_layer_types", layers, "sparse", "dense") or _flags(text, "moe_layer_freq", layers, 1)
    text.expect("first_k_dense_replace", leading_layers(routed))
    dimensions = Family.from_config(
        text,
        rotary_size=rope.size,
        rope_base=rope.base,
        dense_size=0 if all(routed) else text.integer("dense_intermediate_size", default=_DENSE_SIZE),
        shared_size=text.integer("shared_intermediate_size", default=_SHARED_SIZE),
        routed=routed,
        selecting=_read_selecting(text, layers),
    )
    check(dimensions, text.origin)
    return dimensions


def _flags(section: Config, key: str, layers: int, default: int) -> tuple[bool, ...]:
    """A list of ones and zeros, one for each layer."""
    return tuple(map(bool, section.integers(key, layers) if key in section else [default] * layers))


def _read_selecting(text: Config, layers: int) -> tuple[bool, ...]:
    """As it is listed by transformers, or on the Hub. Raises BadInput for values beside the index keys."""
    sparse = text.section(SPARSE)
    listed = _flags(sparse, "sparse_attention_freq", layers, 0)
    selecting = text.marked("layer_types", layers, "minimax_m3_sparse", "full_attention") or listed
    without_values = _flags(sparse, "sparse_disable_index_value", layers, 1)
    for layer in range(layers):
        if selecting[layer] and not without_values[layer]:
            raise BadInput(f"{sparse.origin}: sparse_disable_index_value is 0 for layer {layer}, expected 1")
    return selecting


def _from_gguf(metadata: Config, tensors: Sequence[TensorInfo]) -> Graph:
    catalogue, vocabulary = open_gguf(metadata, tensors)
    layers = metadata.integer(f"{NAME}.block_count")
    leading = metadata.integer(f"{NAME}.leading_dense_block_count", default=0)
    shared, size = (metadata.integer(f"{NAME}.expert_{key}") for key in ("shared_count", "feed_forward_length"))
    later = tuple(layer >= leading for layer in range(layers))
    dimensions = Family.from_gguf(
        metadata, NAME, vocabulary=vocabulary, clamp=CLAMP, shared_size=shared * size, routed=later, selecting=later
    )
    check(dimensions, metadata.origin)
    graph = build(dimensions, gguf_source(catalogue))
    catalogue.finish()
    return graph


ARCHITECTURE = Architecture(
    name=NAME,
    model_types=("minimax_m3_vl", "minimax_m3_vl_text", "minimax_m3"),
    pre_tokenizer="minimax-m2",
    from_checkpoint=_from_checkpoint,
    from_gguf=_from_gguf,
    gguf_metadata=gguf_metadata,
    harmless=_HARMLESS,
    harmless_metadata=_HARMLESS_METADATA,
)
