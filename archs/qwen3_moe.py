"""Qwen3-MoE (30B-A3B, 235B-A22B, Coder): attention that norms each head, then softmax-routed SwiGLU experts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from ..errors import BadInput
from .architecture import Architecture, refuse_unlike
from .config import Config
from .dimensions import Dimensions, first, of, of_rope, of_yarn, quantity, written
from .expressions import TensorInfo
from .graph import MLP, Activation, Attention, Graph, Layer, MoE, Rope, Router, Score, sequential
from .shared import (
    ATTENTION_BIAS_NAMES,
    ATTENTION_NAMES,
    DENSE_NAMES,
    EXPERT_NAMES,
    WHOLE_NAMES,
    Builder,
    Names,
    Source,
    check_heads,
    check_rotary,
    check_top_k,
    expect_all,
    gguf_source,
    open_gguf,
    read_checkpoint,
    read_yarn,
    rope_section,
    yarn_of,
)
from .weights import Role

NAME = "qwen3moe"
_ROPE_BASE = 1e4  # what transformers takes where a configuration says none
_SCALED_ROLES = (  # what llama.cpp multiplies by a `.scale`
    Role.ATTENTION_Q,
    Role.ATTENTION_K,
    Role.ATTENTION_V,
    Role.ATTENTION_OUTPUT,
    Role.EXPERT_GATE,
    Role.EXPERT_UP,
    Role.EXPERT_DOWN,
)


@dataclass(frozen=True)
class _Dimensions(Dimensions):
    """`dense` are the layers without experts; a `window` of 0 is none."""

    layers: int = quantity("num_hidden_layers", "block_count", lambda graph: len(graph.layers))
    heads: int = quantity("num_attention_heads", "attention.head_count", of(Attention, lambda op: op.heads))
    key_value_heads: int = quantity(
        "num_key_value_heads", "attention.head_count_kv", of(Attention, lambda op: op.key_value_heads)
    )
    head_size: int = quantity(
        gguf=("attention.key_length", "attention.value_length"), from_graph=of(Attention, lambda op: op.head_size)
    )
    epsilon: float = quantity(
        "rms_norm_eps", "attention.layer_norm_rms_epsilon", lambda graph: graph.final_norm.epsilon, default=1e-6
    )
    rotary_size: int = written("rope.dimension_count", of_rope(lambda rope: rope.size))
    rope_base: float = quantity(gguf="rope.freq_base", from_graph=of_rope(lambda rope: rope.base), default=_ROPE_BASE)
    scaling: str = quantity(gguf="rope.scaling.type", from_graph=of_yarn(lambda yarn: "yarn"), default="none")
    yarn_factor: float = quantity(gguf="rope.scaling.factor", from_graph=of_yarn(lambda yarn: yarn.factor), default=1.0)
    yarn_context: int = quantity(
        gguf="rope.scaling.original_context_length", from_graph=of_yarn(lambda yarn: yarn.original_context), default=0
    )
    experts: int = quantity(("num_experts", "num_local_experts"), "expert_count", of(MoE, lambda moe: moe.experts))
    top_k: int = quantity("num_experts_per_tok", "expert_used_count", of(MoE, lambda moe: moe.router.top_k))
    expert_size: int = quantity(
        "moe_intermediate_size", "expert_feed_forward_length", of(MoE, lambda moe: moe.expert_size)
    )
    normalized: bool = quantity("norm_topk_prob", default=False)
    biased: bool = quantity("attention_bias", default=False)
    window: int = quantity()
    dense: tuple[int, ...] = quantity()
    dense_size: int = quantity()


# What llama.cpp computes whatever a configuration says.
_IN_LLAMA: Mapping[str, Any] = {"normalized": True, "biased": False, "window": 0, "dense": (), "dense_size": 0}
_IMPLEMENTED: Mapping[str, Sequence[object]] = {
    "hidden_act": ["silu"],
    "partial_rotary_factor": [1.0],
    "qkv_bias": [False],
    "use_qk_norm": [True],
    "shared_expert_intermediate_size": [0],
}
_HARMLESS = (
    "max_window_layers",  # transformers gives all layers the window or none
    *("intermediate_size", "sliding_window"),  # read where layers are dense, where windows are used
)
_HARMLESS_METADATA = (
    "vocab_size",  # the embedding says it
    *("feed_forward_length", "expert_shared_feed_forward_length"),  # of layers that such files do not have
)
_NAMES = Names(
    layers=("model.layers.{}.",),
    whole=WHOLE_NAMES,
    layer=ATTENTION_NAMES | ATTENTION_BIAS_NAMES | DENSE_NAMES | {"ffn_gate_inp.weight": ("mlp.gate.weight",)},
    experts=EXPERT_NAMES,
)


def _from_checkpoint(config: Config, tensors: Sequence[TensorInfo]) -> Graph:
    return read_checkpoint(config, tensors, _NAMES, partial(_build, _read_config(config)))


def _read_config(config: Config) -> _Dimensions:
    expect_all(config, _IMPLEMENTED)
    rope = rope_section(config)
    rope.expect("partial_rotary_factor", 1.0)
    yarn = read_yarn(rope, config.integer("max_position_embeddings"))
    base = rope.number("rope_theta", default=config.number("rope_theta", default=_ROPE_BASE))
    head_size = config.integer("hidden_size") // config.integer("num_attention_heads")
    windowed, dense = config.flag("use_sliding_window", default=False), _dense_layers(config)
    dimensions = _Dimensions.from_config(
        config,
        head_size=config.integer("head_dim", default=head_size),
        rope_base=base,
        scaling="yarn" if yarn else "none",
        yarn_factor=yarn.factor if yarn else 1.0,
        yarn_context=yarn.original_context if yarn else 0,
        window=config.integer("sliding_window") if windowed else 0,
        dense=dense,
        dense_size=config.integer("intermediate_size") if dense else 0,
    )
    _check(dimensions, config.origin)
    return dimensions


def _dense_layers(config: Config) -> tuple[int, ...]:
    """Those that are listed, and of the others all but every so many."""
    layers, step = config.integer("num_hidden_layers"), config.integer("decoder_sparse_step", default=1)
    listed = config.get("mlp_only_layers") or []
    if not isinstance(listed, list) or not all(type(layer) is int and 0 <= layer < layers for layer in listed):
        raise BadInput(f"{config.origin}: mlp_only_layers is {listed!r}, expected numbers of the {layers} layers")
    return tuple(layer for layer in range(layers) if layer in listed or (layer + 1) % step)


def _from_gguf(metadata: Config, tensors: Sequence[TensorInfo]) -> Graph:
    catalogue, vocabulary = open_gguf(metadata, tensors)
    metadata.expect(f"{NAME}.rope.scaling.type", "none", "yarn")
    dimensions = _Dimensions.from_gguf(metadata, NAME, vocabulary=vocabulary, **_IN_LLAMA)
    _check(dimensions, metadata.origin)
    graph = _build(dimensions, gguf_source(catalogue))
    catalogue.finish()
    return graph


def _check(d: _Dimensions, origin: str) -> None:
    check_heads(origin, d.heads, d.key_value_heads)
    check_top_k(origin, d.top_k, d.experts)
    check_rotary(origin, "head_dim", d.head_size, d.head_size)


def _build(d: _Dimensions, source: Source) -> Graph:
    builder = Builder(d, d.epsilon, source)
    yarn = yarn_of(d.yarn_factor, d.yarn_context) if d.scaling == "yarn" else None
    rope, norms = Rope(d.head_size, d.rope_base, yarn=yarn), (d.head_size, d.head_size)

    def attention(blk: str) -> Attention:
        plain = builder.attention(blk, d.heads, d.key_value_heads, d.head_size, rope, norms)
        return replace(builder.biased(blk, plain) if d.biased else plain, window=d.window or None)

    def experts(blk: str) -> MoE:
        weight = builder.weight(f"{blk}.ffn_gate_inp.weight", Role.ROUTER, d.experts, d.hidden)
        router = Router(weight, None, Score.SOFTMAX, d.top_k, normalize=d.normalized)
        return builder.experts(blk, router, Activation.SWIGLU, (d.experts, d.expert_size, d.hidden))

    def layer(index: int) -> Layer:
        blk = f"blk.{index}"
        mixed = sequential(builder.norm(f"{blk}.attn_norm.weight", d.hidden), attention(blk))
        inner = builder.gated_mlp(blk, d.dense_size) if index in d.dense else experts(blk)
        return Layer(index, (mixed, sequential(builder.norm(f"{blk}.ffn_norm.weight", d.hidden), inner)))

    graph = builder.graph(NAME, tuple(layer(index) for index in range(d.layers)))
    return replace(graph, scaled_roles=_SCALED_ROLES)


def _gguf_metadata(graph: Graph) -> dict[str, Any]:
    """Raises BadInput for what llama.cpp would compute otherwise, or not load."""
    attention, experts = first(graph, Attention), first(graph, MoE)
    unlike = {
        "dense layers (mlp_only_layers, decoder_sparse_step)": first(graph, MLP),
        "a sliding window (use_sliding_window)": attention and attention.window,
        "biases in attention (attention_bias)": attention and attention.output_bias,
        "shares of experts that do not add up to 1 (norm_topk_prob false)": (
            experts and isinstance(experts.router, Router) and not experts.router.normalize
        ),
    }
    refuse_unlike(graph, unlike)
    return _Dimensions.metadata(graph)


ARCHITECTURE = Architecture(
    name=NAME,
    model_types=("qwen3_moe",),
    pre_tokenizer="qwen2",
    from_checkpoint=_from_checkpoint,
    from_gguf=_from_gguf,
    gguf_metadata=_gguf_metadata,
    harmless=_HARMLESS,
    harmless_metadata=_HARMLESS_METADATA,
)
