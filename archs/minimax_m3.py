"""MiniMax M3: after a few dense layers, attention to selected blocks of tokens, then experts beside a shared one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from ..errors import BadInput
from .architecture import Architecture, refuse_unlike
from .catalogue import Catalogue
from .config import Config
from .dimensions import Dimensions, FromGraph, constant, of, of_rope, quantity, written
from .expressions import Expression, OnePlus, Rows, TensorInfo
from .graph import MLP, Activation, Attention, BlockSelection, Graph, Layer, MoE, Rope, Router, Score, sequential
from .minimax_m2 import EXPERTS, GGUF_SIGMOID, read_rope
from .shared import (
    ATTENTION_NAMES,
    Builder,
    CheckpointSource,
    Names,
    Source,
    catalogue_of,
    check_heads,
    check_rotary,
    check_top_k,
    expect_all,
    gguf_source,
    open_gguf,
    text_section,
)
from .weights import Role, Weight

NAME = "minimax-m3"
_CLAMP = 7.0  # the only one that llama.cpp has
_SPARSE = "sparse_attention_config"
_DENSE_SIZE, _SHARED_SIZE = 12_288, 3072  # what transformers takes where a configuration says none
_SCALED_ROLES = (Role.ATTENTION_Q, Role.ATTENTION_K, Role.ATTENTION_V, Role.ATTENTION_OUTPUT)
_VISION = (
    *("vision_tower.", "multi_modal_projector.", "patch_merge_mlp."),
    *("model.vision_tower.", "model.multi_modal_projector."),
)
_NEEDS_FLASH_ATTENTION = (
    "llama.cpp selects blocks of tokens with -fa on and one text at a time (llama-server: -np 1) alone; otherwise all "
    "tokens are attended to, which is another model"
)


def _selecting(graph: Graph) -> list[bool]:
    """Of each layer whether its attention selects blocks."""
    return [op.selection is not None for op in graph.operations() if isinstance(op, Attention)]


def _routed(graph: Graph) -> list[bool]:
    """Of each layer whether it has experts."""
    return [any(isinstance(op, MoE) for op in layer.operations) for layer in graph.layers]


def _leading(routed: Sequence[bool]) -> int:
    """How many layers come before the first with experts."""
    return [*routed, True].index(True)


def _of_selection(get: Callable[[BlockSelection], int]) -> FromGraph:
    def find(graph: Graph) -> int | None:
        found = (op.selection for op in graph.operations() if isinstance(op, Attention) and op.selection)
        return next(map(get, found), None)

    return find


def _shared_count(moe: MoE) -> int:
    assert moe.shared
    return moe.shared.up.shape[0] // moe.expert_size


def _routed_scale(moe: MoE) -> float:
    assert isinstance(moe.router, Router)
    return moe.router.scale


@dataclass(frozen=True)
class _Dimensions(Dimensions):
    """`routed` layers have experts, `selecting` ones look at blocks of tokens; what no layer has is of size 0."""

    layers: int = quantity("num_hidden_layers", "block_count", lambda graph: len(graph.layers))
    dense_size: int = quantity(gguf="feed_forward_length", from_graph=of(MLP, lambda mlp: mlp.up.shape[0]), default=0)
    heads: int = quantity("num_attention_heads", "attention.head_count", of(Attention, lambda op: op.heads))
    key_value_heads: int = quantity(
        "num_key_value_heads", "attention.head_count_kv", of(Attention, lambda op: op.key_value_heads)
    )
    head_size: int = quantity(
        "head_dim", ("attention.key_length", "attention.value_length"), of(Attention, lambda op: op.head_size)
    )
    epsilon: float = quantity(
        "rms_norm_eps", "attention.layer_norm_rms_epsilon", lambda graph: graph.final_norm.epsilon
    )
    rotary_size: int = quantity(gguf="rope.dimension_count", from_graph=of_rope(lambda rope: rope.size))
    rope_base: float = quantity(gguf="rope.freq_base", from_graph=of_rope(lambda rope: rope.base))
    experts: int = quantity(("num_local_experts", "num_experts"), "expert_count", of(MoE, lambda moe: moe.experts))
    top_k: int = quantity("num_experts_per_tok", "expert_used_count", of(MoE, lambda moe: moe.router.top_k))
    expert_size: int = quantity(
        ("intermediate_size", "moe_intermediate_size"),
        "expert_feed_forward_length",
        of(MoE, lambda moe: moe.expert_size),
    )
    shared_count: int = written("expert_shared_count", of(MoE, _shared_count))
    routed_scale: float = quantity("routed_scaling_factor", "expert_weights_scale", of(MoE, _routed_scale), default=2.0)
    normalized: bool = constant("expert_weights_norm", True)
    gating: int = constant("expert_gating_func", GGUF_SIGMOID)
    leading: int = written("leading_dense_block_count", lambda graph: _leading(_routed(graph)))
    index_heads: int = quantity(
        (f"{_SPARSE}.sparse_num_index_heads", "index_n_heads"),
        "attention.indexer.head_count",
        _of_selection(lambda selection: selection.heads),
        default=4,
    )
    index_size: int = quantity(
        (f"{_SPARSE}.sparse_index_dim", "index_head_dim"),
        "attention.indexer.key_length",
        _of_selection(lambda selection: selection.head_size),
        default=128,
    )
    blocks: int = quantity(
        (f"{_SPARSE}.sparse_topk_blocks", "index_topk_blocks"),
        "attention.indexer.top_k",
        _of_selection(lambda selection: selection.top_k),
        default=16,
    )
    block_size: int = quantity(
        (f"{_SPARSE}.sparse_block_size", "index_block_size"),
        "attention.indexer.block_size",
        _of_selection(lambda selection: selection.block_size),
        default=128,
    )
    local: int = quantity(
        (f"{_SPARSE}.sparse_local_block", "index_local_blocks"),
        "attention.indexer.local_blocks",
        _of_selection(lambda selection: selection.local),
        default=1,
    )
    clamp: float = quantity("swiglu_limit", default=_CLAMP)
    shared_size: int = quantity()
    routed: Sequence[bool] = quantity()
    selecting: Sequence[bool] = quantity()


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

    graph = _build(_read_config(config), find)
    vision = sum(catalogue.ignore(prefix) for prefix in _VISION)
    left_out = (f"{vision} tensors of the vision tower are left out: the model reads text alone",) if vision else ()
    return replace(graph, notes=(*graph.notes, *left_out, *catalogue.finish()))


def _read_config(config: Config) -> _Dimensions:
    text = text_section(config)
    expect_all(text, _IMPLEMENTED)
    expect_all(text.section(_SPARSE), _IMPLEMENTED_SPARSE)
    layers, rope = text.integer("num_hidden_layers"), read_rope(text)
    routed = text.marked("mlp_layer_types", layers, "sparse", "dense") or _flags(text, "moe_layer_freq", layers, 1)
    text.expect("first_k_dense_replace", _leading(routed))
    dimensions = _Dimensions.from_config(
        text,
        rotary_size=rope.size,
        rope_base=rope.base,
        dense_size=0 if all(routed) else text.integer("dense_intermediate_size", default=_DENSE_SIZE),
        shared_size=text.integer("shared_intermediate_size", default=_SHARED_SIZE),
        routed=routed,
        selecting=_read_selecting(text, layers),
    )
    _check(dimensions, text.origin)
    return dimensions


def _flags(section: Config, key: str, layers: int, default: int) -> tuple[bool, ...]:
    """A list of ones and zeros, one for each layer."""
    return tuple(map(bool, section.integers(key, layers) if key in section else [default] * layers))


def _read_selecting(text: Config, layers: int) -> tuple[bool, ...]:
    """As it is listed by transformers, or on the Hub. Raises BadInput for values beside the index keys."""
    sparse = text.section(_SPARSE)
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
    dimensions = _Dimensions.from_gguf(
        metadata, NAME, vocabulary=vocabulary, clamp=_CLAMP, shared_size=shared * size, routed=later, selecting=later
    )
    _check(dimensions, metadata.origin)
    graph = _build(dimensions, gguf_source(catalogue))
    catalogue.finish()
    return graph


def _check(d: _Dimensions, origin: str) -> None:
    check_heads(origin, d.heads, d.key_value_heads)
    check_top_k(origin, d.top_k, d.experts)
    check_rotary(origin, "rotary_dim", d.rotary_size, d.head_size)
    if not any(d.selecting):
        return
    check_rotary(origin, "rotary_dim of index heads", d.rotary_size, d.index_size)
    if d.index_heads != d.key_value_heads:
        raise BadInput(
            f"{origin}: {d.index_heads} index heads, expected one for each of the {d.key_value_heads} key-value heads"
        )
    if d.local > d.blocks:
        raise BadInput(f"{origin}: {d.local} local blocks, expected at most the {d.blocks} that a token sees")


def _build(d: _Dimensions, source: Source) -> Graph:
    builder = Builder(d, d.epsilon, source)
    rope, norms = Rope(d.rotary_size, d.rope_base), (d.head_size, d.head_size)

    def selection(blk: str) -> BlockSelection:
        def matrix(kind: str, heads: int) -> Weight:
            return builder.weight(f"{blk}.indexer.{kind}.weight", Role.BLOCK_INDEX, heads * d.index_size, d.hidden)

        return BlockSelection(
            head_size=d.index_size,
            block_size=d.block_size,
            top_k=d.blocks,
            local=d.local,
            query=matrix("q_proj", d.index_heads),
            key=matrix("k_proj", 1),
            query_norm=builder.norm(f"{blk}.indexer.q_norm.weight", d.index_size),
            key_norm=builder.norm(f"{blk}.indexer.k_norm.weight", d.index_size),
            rope=rope,
        )

    def attention(blk: str, selecting: bool) -> Attention:
        whole = builder.attention(blk, d.heads, d.key_value_heads, d.head_size, rope, norms)
        return replace(whole, selection=selection(blk)) if selecting else whole

    def dense(blk: str) -> MLP:
        return replace(builder.gated_mlp(blk, d.dense_size), activation=Activation.SWIGLU_OAI, clamp=d.clamp)

    def experts(blk: str) -> MoE:
        router = Router(
            weight=builder.weight(f"{blk}.ffn_gate_inp.weight", Role.ROUTER, d.experts, d.hidden),
            bias=builder.weight(f"{blk}.exp_probs_b.bias", Role.ROUTER_BIAS, d.experts),
            score=Score.SIGMOID,
            top_k=d.top_k,
            scale=d.routed_scale,
        )
        shape = (d.experts, d.expert_size, d.hidden)
        return builder.experts(blk, router, Activation.SWIGLU_OAI, shape, d.shared_size, d.clamp)

    def layer(index: int) -> Layer:
        blk = f"blk.{index}"
        mixed = sequential(builder.norm(f"{blk}.attn_norm.weight", d.hidden), attention(blk, d.selecting[index]))
        norm = builder.norm(f"{blk}.ffn_norm.weight", d.hidden)
        return Layer(index, (mixed, sequential(norm, experts(blk) if d.routed[index] else dense(blk))))

    graph = builder.graph(NAME, tuple(layer(index) for index in range(d.layers)))
    notes = (_NEEDS_FLASH_ATTENTION,) if graph.needs_flash_attention else ()
    return replace(graph, scaled_roles=_SCALED_ROLES, notes=notes)


def _gguf_metadata(graph: Graph) -> dict[str, Any]:
    """Raises BadInput for what llama.cpp would compute otherwise, or not load."""
    routed, operations = _routed(graph), [*graph.operations()]
    later = [layer >= _leading(routed) for layer in range(len(routed))]
    mixtures = [op for op in operations if isinstance(op, MoE)]
    uneven = any(moe.shared and moe.shared.up.shape[0] % moe.expert_size for moe in mixtures)
    unlike = {
        "no experts (moe_layer_freq)": not mixtures,
        "layers with experts before dense ones (moe_layer_freq)": routed != later,
        "selected blocks in other layers than those with experts (sparse_attention_freq)": _selecting(graph) != routed,
        f"a swiglu_limit other than {_CLAMP:g}": any(
            op.clamp != _CLAMP for op in operations if isinstance(op, MLP | MoE)
        ),
        "a shared expert that is no multiple of the others (shared_intermediate_size)": uneven,
    }
    refuse_unlike(graph, unlike)
    return _Dimensions.metadata(graph)


ARCHITECTURE = Architecture(
    name=NAME,
    model_types=("minimax_m3_vl", "minimax_m3_vl_text", "minimax_m3"),
    pre_tokenizer="minimax-m2",
    from_checkpoint=_from_checkpoint,
    from_gguf=_from_gguf,
    gguf_metadata=_gguf_metadata,
    harmless=_HARMLESS,
    harmless_metadata=_HARMLESS_METADATA,
)
